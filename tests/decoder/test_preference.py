"""Experts at hand are preferred just as far as is said, natively as in torch."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trellis_shapes import GPU_SHAPES, MIXTRAL, TWO_PLANES

import lowmoe
from lowmoe.decoder.preference import Preference
from lowmoe.decoder.router import route_sigmoid, route_softmax
from lowmoe.engine import load_on_gpu
from lowmoe.engine.generate import Session
from lowmoe.engine.load import load_folder
from lowmoe.engine.load_options import LoadOptions
from lowmoe.engine.options import SamplingOptions
from lowmoe.errors import UsageError
from lowmoe.experts.gpu_slots import GpuSlots
from lowmoe.families import read_config
from lowmoe.loader.synthetic import write_synthetic
from lowmoe.spec import SigmoidRouter, SoftmaxRouter
from tests.engine.test_gpu_in_part import Workplace
from tests.least_ram import least_ram

BUDGET = 0.2
TEXT = [5, 60, 7, 120, 9, 33, 71, 200, 13, 44] * 3


@settings(deadline=None, max_examples=200)
@given(
    data=st.data(),
    n_experts=st.integers(2, 20),
    renormalize=st.booleans(),
    sigmoid=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_one_at_hand_replaces_just_those_that_are_within_the_budget_likelier(
    data: st.DataObject, n_experts: int, renormalize: bool, sigmoid: bool, seed: int
) -> None:
    n_active = data.draw(st.integers(1, n_experts - 1))
    torch.manual_seed(seed)
    logits, at_hand = torch.randn(1, n_experts), torch.rand(n_experts) < 0.5
    factors = torch.ones(n_experts).masked_fill(at_hand, 1 / (1 - BUDGET))
    kind: Any = (SigmoidRouter if sigmoid else SoftmaxRouter)(
        n_active=n_active, renormalize=renormalize
    )
    route: Any = route_sigmoid if sigmoid else route_softmax
    weights, ids = route(logits, kind, None, factors)
    likely = (torch.sigmoid(logits) if sigmoid else torch.softmax(logits, -1))[0]
    chosen, others = ids[0].tolist(), set(range(n_experts)) - set(ids[0].tolist())
    for e in chosen:
        for f in others:
            if at_hand[e] and not at_hand[f]:
                assert likely[e] >= (1 - BUDGET) * likely[f] * (1 - 1e-6)
            elif at_hand[f] and not at_hand[e]:
                assert likely[e] >= likely[f] / (1 - BUDGET) * (1 - 1e-6)
            else:
                assert likely[e] >= likely[f]
    wanted = likely[ids[0]]
    torch.testing.assert_close(weights[0], wanted / wanted.sum() if renormalize else wanted)


def test_torch_and_native_code_prefer_alike(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Rounded otherwise, they send most tokens alike; without the factors they would not.
    def at_hand(layer_id: int, expert_id: int) -> bool:
        return (layer_id + expert_id) % 2 == 0

    sent: dict[str, list[Any]] = {}
    for isa in ("native", "torch", "native, none preferred"):
        if isa == "torch":
            monkeypatch.setenv("LOWMOE_ISA", "torch")
        else:
            monkeypatch.delenv("LOWMOE_ISA", raising=False)
        runtime = load_folder(model_folder, LoadOptions(cache_aware_routing=0.9))
        computation: Any = runtime.decoder.computation
        if isa != "native, none preferred":
            for layer_id in range(2):
                computation.preference.look(layer_id, at_hand)
        torch.manual_seed(0)
        x = torch.randn(200, runtime.spec.n_hidden)
        sent[isa] = [computation.route(x, i).expert_ids.sort(1).values for i in range(2)]
        runtime.close()
    for layer_id in range(2):
        same = (sent["native"][layer_id] == sent["torch"][layer_id]).float().mean()
        other = (
            (sent["native"][layer_id] == sent["native, none preferred"][layer_id]).float().mean()
        )
        assert same > 0.99
        assert other < 0.8
        parity = sent["native"][layer_id] % 2 == layer_id % 2
        assert parity.float().mean() > 0.8  # nearly all to those at hand


def hit_share(folder: Path, ram: int, **options: Any) -> tuple[float, tuple[str, ...]]:
    runtime = load_folder(folder, LoadOptions(bits=6, ram=ram, context=64, **options))
    session = Session(runtime)
    for _ in session.token_ids(TEXT, SamplingOptions(temperature=0.0, max_new_tokens=20)):
        pass
    statistics = session.statistics()
    runtime.close()
    return statistics.hit_rate.ram, statistics.trades


def test_it_raises_the_hit_rate_and_is_named(model_folder: Path) -> None:
    ram = int(least_ram(lambda ram: hit_share(model_folder, ram)) * 1.05)
    plain, none = hit_share(model_folder, ram)
    preferring, trades = hit_share(model_folder, ram, cache_aware_routing=0.5)
    assert none == ()
    assert trades == ("cache-aware routing within 50%",)
    assert preferring > plain


def test_where_all_is_in_ram_it_changes_nothing(model_folder: Path) -> None:
    found = []
    for budget in (None, 0.9):
        with lowmoe.load(model_folder, cache_aware_routing=budget) as model:
            session = model.session
            assert session is not None
            store: Any = model.runtime.store
            for _ in session.forward(TEXT):
                pass
            while not store.is_complete:
                for _ in session.forward([1]):
                    pass
            session.rewind([])
            found.append(model.logits(TEXT))
    # A softmax by another way of adding up.
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("budget", [0.0, 1.0, -0.1, 2.0, float("nan")])
def test_a_budget_is_a_share(budget: float) -> None:
    with pytest.raises(UsageError, match="must be above 0 and below 1"):
        LoadOptions(cache_aware_routing=budget)


def test_a_layer_without_anyone_at_hand_prefers_none(model_folder: Path) -> None:
    runtime = load_folder(model_folder, LoadOptions())
    preference = Preference(runtime.spec, BUDGET)
    preference.look(0, lambda layer_id, expert_id: expert_id == 1)
    assert preference.factors[0].tolist() == pytest.approx([1, 1.25, 1, 1])
    preference.look(0, lambda layer_id, expert_id: False)
    assert preference.factors[0].tolist() == [1, 1, 1, 1]
    runtime.close()


@pytest.mark.parametrize("chunk", [1, 5, 30])
def test_a_card_prefers_the_experts_it_has(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, home: Path, chunk: int
) -> None:
    # All but certain that a token goes to those there, so that a prompt's tokens together do, too.
    work, found = Workplace(monkeypatch, model_folder), {}
    for budget in (None, 0.999):
        runtime = work.load(4, cache_aware_routing=budget)
        session = Session(runtime)
        session.chunk_tokens = chunk
        for _ in session.forward(TEXT):
            pass
        traffic = runtime.store.traffic()
        missed = traffic.ram_requests + traffic.disk_requests
        found[budget] = traffic.gpu_requests / (traffic.gpu_requests + missed)
        assert len(runtime.trades) == (budget is not None)
        runtime.close()
    assert found[None] < 0.9
    assert found[0.999] > found[None]


def test_a_card_that_has_them_all_prefers_none(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    # Slots for all, so that it is computed as if there were some elsewhere.
    work, found = Workplace(monkeypatch, model_folder), []
    monkeypatch.setattr(GpuSlots, "candidate", lambda slots, can_come: None)
    place = load_on_gpu.place_on_gpu

    def with_all(*arguments: Any) -> Any:
        found_place = place(*arguments)
        assert found_place is not None
        return replace(found_place, division=replace(found_place.division, n_slots=8))

    for budget in (None, 0.5):
        work.give(4)
        with monkeypatch.context() as patch:
            patch.setattr("lowmoe.engine.load.place_on_gpu", with_all)
            runtime = load_folder(work.folder, LoadOptions(bits=4, cache_aware_routing=budget))
        session = Session(runtime)
        found.append(torch.cat([session.logits(h) for h in session.forward(TEXT)]))
        runtime.close()
    # The same experts and weights, summed in the same order.
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


def folder_of(tmp_path: Path, name: str) -> Path:
    """A model of which some layers are plain or experts are shared."""
    config = MIXTRAL | GPU_SHAPES[name].config
    write_synthetic(
        tmp_path / "model",
        config,
        read_config(config),
        TWO_PLANES,
        name="tiny",
        progress=lambda done, total: None,
    )
    return tmp_path / "model"


@pytest.mark.parametrize(
    "name",
    [
        "sigmoids not renormalized, no groups",
        "softmax with a bias of the choice",
        "sinks, biases everywhere, another activation, odd sizes",
    ],
)
def test_a_card_that_has_some_refuses_it_for_other_routers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: Path, name: str
) -> None:
    work = Workplace(monkeypatch, folder_of(tmp_path, name))
    work.give(3)
    asked = LoadOptions(bits=4, gpu="4090", cache_aware_routing=BUDGET)
    with pytest.raises(UsageError, match=r"^.* is for routers by a softmax without biases only.*$"):
        load_folder(work.folder, asked)
    runtime = load_folder(work.folder, replace(asked, gpu="auto"), work.reports)
    assert runtime.gpu is None
    assert "computing on the CPU: cache_aware_routing is 0.2" in work.reports.notes[0]
    runtime.close()


def test_a_card_prefers_among_a_softmax_beside_plain_layers_and_shared_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    name = "shared experts that weigh themselves, plain layers"
    work, found = Workplace(monkeypatch, folder_of(tmp_path, name)), {}
    for budget in (None, 0.999):
        runtime = work.load(4, cache_aware_routing=budget)
        session = Session(runtime)
        for _ in session.forward([t % 97 for t in TEXT]):
            pass
        for token in TEXT:
            for _ in session.forward([token % 97]):
                pass
        traffic = runtime.store.traffic()
        missed = traffic.ram_requests + traffic.disk_requests
        found[budget] = traffic.gpu_requests / (traffic.gpu_requests + missed)
        runtime.close()
    assert found[0.999] > found[None]
