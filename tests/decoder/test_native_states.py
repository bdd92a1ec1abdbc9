"""Layers that keep states, in native code: what is kept, how far it is taken back, what is refused.

What is computed is held to torch in test_native.py.
"""

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conversations import interrupted, runtime_over, session_over
from tiny_models import in_chunks
from torch import Tensor
from trellis_models import TrellisModel, trellis_model
from trellis_shapes import DEMANDING_SHAPES

from lowmoe.decoder.decoder import Decoder
from lowmoe.decoder.state_cache import TAIL_TOKENS, states_bytes
from lowmoe.engine.answer import Answer
from lowmoe.engine.batch import Batch
from lowmoe.engine.options import SamplingOptions
from lowmoe.errors import FolderError
from lowmoe.kernels import cpu

N_TOKENS = 199
MOST_TOGETHER = 3


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(0, 97, (N_TOKENS,), generator=torch.Generator().manual_seed(3))


@pytest.fixture(
    scope="module",
    params=[
        "delta nets on either side, gates behind attention",
        "lightning on either side, norms kept",
    ],
)
def native(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TrellisModel]:
    shape = DEMANDING_SHAPES[request.param]
    with trellis_model(tmp_path_factory.mktemp("model") / "folder", shape) as model:
        yield model


@pytest.mark.parametrize("n_kept", [0, 60, 84, 100])
def test_a_conversation_is_taken_back_and_goes_on_bit_for_bit(
    native: TrellisModel, ids: Tensor, n_kept: int
) -> None:
    with native.decoder(native.native()) as decoder:
        cache = decoder.new_cache(N_TOKENS)
        if n_kept:
            decoder.forward(ids[:n_kept], cache)
        wanted = decoder.logits(decoder.forward(ids[n_kept:], cache))
        cache = decoder.new_cache(N_TOKENS)
        if n_kept in (60, 84):
            decoder.forward(ids[:n_kept], cache)
        decoder.forward(ids[cache.n_tokens : 100], cache)
        decoder.forward(torch.full((40,), 5), cache)
        assert cache.keep(n_kept) == n_kept
        found = decoder.logits(decoder.forward(ids[n_kept:], cache))
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("count", [1, 30])
def test_an_interrupted_pass_leaves_what_was_there(
    native: TrellisModel, ids: Tensor, at: int, count: int
) -> None:
    with native.decoder(native.native()) as decoder:
        wanted = in_chunks(decoder, ids, [70, N_TOKENS - 70])
        cache: Any = decoder.new_cache(N_TOKENS)
        decoder.forward(ids[:70], cache)
        interrupted(decoder, at)(torch.full((count,), 6), cache)
        assert cache.n_tokens == 70
        assert torch.equal(decoder.logits(decoder.forward(ids[70:], cache)), wanted[70:])


def answered(batch: Batch, *prompts: list[int], reuse: bool = False) -> list[list[int]]:
    """Contexts with 20 tokens after the prompts, which join as there is room; scores that are asked
    for may fail, and the step is tried again.
    """
    options = SamplingOptions(temperature=0.0, max_new_tokens=20)
    answers = [
        Answer(batch.runtime, ids, options, end_ids=set(), spelled=False, reuse=reuse)
        for ids in prompts
    ]
    waiting = list(answers)
    while waiting or batch.answers:
        while waiting and batch.n_free:
            batch.join(waiting.pop(0))
        with contextlib.suppress(FolderError):
            batch.step()
    return [answer.context for answer in answers]


def batch_over(decoder: Decoder) -> Batch:
    batch = Batch(runtime_over(decoder, MOST_TOGETHER))
    batch.chunk_tokens = 40
    return batch


def test_answers_that_come_and_go_have_the_tokens_they_have_alone(
    native: TrellisModel, ids: Tensor
) -> None:
    prompts = [ids[first : first + n].tolist() for first, n in ((0, 90), (3, 7), (50, 41), (9, 1))]
    with native.decoder(native.native(n_sequences=MOST_TOGETHER)) as decoder:
        wanted = [answered(batch_over(decoder), prompt)[0] for prompt in prompts]
        assert answered(batch_over(decoder), *prompts) == wanted


def test_the_next_turn_goes_on_from_the_last_of_its_own_conversation(
    native: TrellisModel, ids: Tensor
) -> None:
    prompts = [ids[first : first + 60].tolist() for first in (0, 70)]
    with native.decoder(native.native(n_sequences=MOST_TOGETHER)) as decoder:
        batch = batch_over(decoder)
        for context in answered(batch, *prompts):
            conversation = batch.take(context)
            assert conversation.keep(context) == 79  # the last token was never run
            conversation.taken = False
        for prompt in prompts:
            conversation = batch.take([*prompt, 5])
            assert conversation.keep([*prompt[:-3], 5, 5, 5, 5]) == 59 - TAIL_TOKENS
            conversation.taken = False


def test_a_step_that_failed_is_computed_again_from_a_state_before_it(
    native: TrellisModel, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [ids[:50].tolist(), ids[20:60].tolist()]
    with native.decoder(native.native(n_sequences=MOST_TOGETHER)) as decoder:
        wanted = answered(batch_over(decoder), *prompts)
        logits, n_asked = type(decoder).logits, itertools.count(1)

        def failing(self: Decoder, hidden: Tensor) -> Tensor:
            found = logits(self, hidden)
            if next(n_asked) % 7 == 0:
                raise FolderError("the disk is gone")
            return found

        monkeypatch.setattr(type(decoder), "logits", failing)
        # What was computed token by token is computed anew, many at a time, which rounds otherwise:
        # here never so that another token is the likeliest.
        assert answered(batch_over(decoder), *prompts) == wanted
    assert next(n_asked) > 20 + 20 // 7


def test_a_prompt_asked_again_is_not_computed_again_and_scored_alike(
    native: TrellisModel, ids: Tensor
) -> None:
    prompt = ids[:110].tolist()
    with native.decoder(native.native()) as decoder:
        session, scores = session_over(decoder), []
        for n_wanted in (0, 109):
            n_kept = session.rewind(prompt[:-1])
            assert n_kept == n_wanted
            for _ in session.forward(prompt[n_kept:-1]):
                pass
            (hidden,) = session.forward(prompt[-1:])
            scores.append(decoder.logits(hidden))
            for token in range(30):  # an answer
                list(session.forward([token]))
    assert torch.equal(*scores)


def test_states_do_not_change_what_they_began_from(native: TrellisModel, ids: Tensor) -> None:
    with native.decoder(native.native()) as decoder:
        cache: Any = decoder.new_cache(N_TOKENS)
        decoder.forward(ids[:50], cache)
        kept = {i: layer.at(50) for i, layer in cache.states.items()}
        before = {i: [t.clone() for t in state] for i, state in kept.items()}
        decoder.forward(ids[50:90], cache)
    for layer_id, state in kept.items():
        assert all(map(torch.equal, state, before[layer_id]))
        assert all(t.isfinite().all() and t.any() for t in state)


def test_caches_take_no_more_than_was_announced(native: TrellisModel, ids: Tensor) -> None:
    computation = native.native()
    one = cpu.kv_head_bytes("float16", 16)
    # Of three layers one has keys and values, two heads each.
    found = computation.cache_bytes(1) - states_bytes(native.spec)
    assert found == 2 * 2 * one * cpu.PAGE_TOKENS
    with native.decoder(computation) as decoder:
        cache: Any = decoder.new_cache(1024)
        before = cpu.allocated_bytes()
        decoder.forward(ids[:20], cache)
        assert cpu.allocated_bytes() - before == found


@pytest.mark.parametrize(
    ("ends", "count", "complaint"),
    [
        ([2, 1], 2, "stops out of order"),
        ([0, 2], 2, "stops out of order"),
        ([1], 2, "the last stop must be after the last token"),
        ([3], 2, "the last stop must be after the last token"),
        ([], 2, "the last stop must be after the last token"),
        ([257], 257, "no tokens, or more than the engine was made for"),
        ([0], 0, "no tokens, or more than the engine was made for"),
    ],
)
def test_stops_that_fit_no_pass_are_refused(
    native: TrellisModel, ends: list[int], count: int, complaint: str
) -> None:
    states: Any = native.native()._states
    x = torch.zeros(257, native.spec.n_hidden)
    with pytest.raises(ValueError, match=complaint):
        _run(states, 0, ends, x, count)


def test_a_layer_that_is_not_there_is_refused(native: TrellisModel) -> None:
    states: Any = native.native()._states
    x = torch.zeros(1, native.spec.n_hidden)
    with pytest.raises(ValueError, match="no such layer"):
        _run(states, 2, [1], x, 1)


def _run(states: Any, number: int, ends: list[int], x: Tensor, count: int) -> None:
    """Without states, which are not looked at before all else is checked."""
    if states._delta_net is not None:
        states._delta_net.run(number, 0, 0, [(end, 0, 0) for end in ends], x.data_ptr(), count)
    else:
        states._lightning.run(number, 0, [(end, 0) for end in ends], x.data_ptr(), count)
