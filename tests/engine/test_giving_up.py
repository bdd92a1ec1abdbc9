"""A prompt that nobody waits for any more is not read to its end, and leaves nothing behind."""

from collections.abc import Collection, Iterator
from pathlib import Path

import pytest
from test_batch import all_of, answer_to, prompt
from test_gpu_in_part import Workplace

from lowmoe.engine.answer import Answer
from lowmoe.engine.batch import Batch
from lowmoe.engine.load import load_folder
from lowmoe.engine.load_options import LoadOptions
from lowmoe.engine.runtime import Runtime
from lowmoe.experts.hybrid import HybridExperts
from lowmoe.experts.ledger import Traffic
from lowmoe.experts.store import ExpertStore
from tests.least_ram import least_ram

PROMPT = prompt(seed=3, n_tokens=40)


@pytest.fixture(params=["on the CPU", "cpu", "page"])
def runtime(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, home: Path, model_folder: Path
) -> Iterator[Runtime]:
    """Of two layers; on the CPU, with most experts on disk, or with a GPU that has not all of them,
    by its misses.
    """
    if request.param == "on the CPU":
        runtime = with_least_ram(model_folder)
    else:
        work = Workplace(monkeypatch, model_folder)
        runtime = work.load(5, misses=request.param, sequences=2)
    assert isinstance(runtime.store, HybridExperts) == (request.param != "on the CPU")
    yield runtime
    runtime.close()


def with_least_ram(model_folder: Path) -> Runtime:
    """Two experts fit."""

    def load(ram: int) -> Runtime:
        return load_folder(model_folder, LoadOptions(threads=1, sequences=2, ram=ram))

    return load(least_ram(load))


def cancelled_at_first_layer(answer: Answer, patch: pytest.MonkeyPatch) -> list[int]:
    """Cancel an answer while its first layer is computed.  Returns the layers that want experts."""
    want, layers = ExpertStore.want, list[int]()

    def cancelling(store: ExpertStore, layer_id: int, expert_ids: Collection[int]) -> None:
        want(store, layer_id, expert_ids)
        layers.append(layer_id)
        answer.cancel()

    patch.setattr(ExpertStore, "want", cancelling)
    return layers


def test_a_cancelled_prompt_ends_before_its_next_layer(runtime: Runtime) -> None:
    assert len(runtime.spec.layers) == 2
    batch, answer = Batch(runtime), answer_to(runtime, PROMPT)
    batch.join(answer)
    with pytest.MonkeyPatch.context() as patch:
        layers = cancelled_at_first_layer(answer, patch)
        assert batch.step() == [answer]
    assert layers == [0]
    assert answer.end == "cancelled"
    assert answer.conversation.n_tokens == 0
    assert batch.answers == ()
    layer = runtime.spec.layers[0].feed_forward
    assert 0 < n_requests(batch.tally.prompts) <= layer.n_experts
    assert n_requests(batch.tally.traffic) == 0


def test_what_it_read_is_not_put_down_to_others_that_are_decoded(runtime: Runtime) -> None:
    batch, other, answer = (
        Batch(runtime),
        answer_to(runtime, PROMPT[:9]),
        answer_to(runtime, PROMPT),
    )
    batch.join(other)
    while other.has_new is False:
        batch.step()
    batch.join(answer)
    before = n_requests(batch.tally.traffic)
    with pytest.MonkeyPatch.context() as patch:
        cancelled_at_first_layer(answer, patch)
        assert set(map(id, batch.step())) == {id(answer), id(other)}
    of_token = sum(layer.feed_forward.router.n_active for layer in runtime.spec.layers)
    assert n_requests(batch.tally.traffic) - before == of_token


def n_requests(traffic: Traffic) -> int:
    return traffic.gpu_requests + traffic.ram_requests + traffic.disk_requests


def test_others_go_on_as_if_nothing_had_been(runtime: Runtime) -> None:
    short = PROMPT[:9]
    wanted = all_of(Batch(runtime), answer_to(runtime, short), answer_to(runtime, PROMPT))
    batch, other, answer = Batch(runtime), answer_to(runtime, short), answer_to(runtime, PROMPT)
    batch.join(other)
    found = []
    while not found:
        batch.step()
        found = other.take()
    batch.join(answer)
    with pytest.MonkeyPatch.context() as patch:
        cancelled_at_first_layer(answer, patch)
        batch.step()
    assert answer.end == "cancelled"
    while batch.answers:
        batch.step()
    found += other.take()
    again = all_of(batch, answer_to(runtime, PROMPT))
    assert [[token.id for token in tokens] for tokens in (found, again[0])] == [
        [token.id for token in tokens] for tokens in wanted
    ]
