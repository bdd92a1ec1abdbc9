"""Traces of routing, and what tiers would have made of them."""

from collections import OrderedDict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MixtralForCausalLM

import lowmoe
from lowmoe.engine.record import record
from lowmoe.errors import FolderError
from lowmoe.experts.trace import RoutingTrace, read_trace, write_trace
from lowmoe.families.aliases import ALIASES
from lowmoe.families.routing_fits import FITS
from lowmoe.plan.policies import NAMES, counted, halves, policy_of
from lowmoe.plan.simulate import Replayed, replay
from lowmoe.plan.synthetic_trace import synthetic_trace


def trace_of(experts: np.ndarray, n_experts: int) -> RoutingTrace:
    return RoutingTrace(
        experts=experts.astype(np.uint16),
        begins=(0,),
        n_experts=(n_experts,) * experts.shape[1],
        model="a test",
        config=ALIASES["mixtral-8x7b"].config,
    )


def drawn(n_tokens: int, n_layers: int, n_experts: int, n_active: int, seed: int) -> RoutingTrace:
    """Skewed, and each token without repeats."""
    rng = np.random.default_rng(seed)
    scores = rng.gumbel(size=(n_tokens, n_layers, n_experts)) + rng.gumbel(size=n_experts)
    return trace_of(np.argsort(-scores, axis=2)[:, :, :n_active], n_experts)


def in_ram(trace: RoutingTrace, name: str, n_slots: int, *, warm: int = 0) -> Replayed:
    make = partial(policy_of, name, trace, counted(trace))
    return replay(trace, n_gpu=0, n_ram=n_slots, policy=make, warm=warm)


def lru_hit_rate(trace: RoutingTrace, n_slots: int) -> float:
    """The textbook, a list for each layer, the latest used last; its experts are used at once."""
    lists: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(trace.n_layers)]
    hits = asked = 0
    for token in trace.experts:
        for held, used in zip(lists, token, strict=True):
            found = [expert for expert in used.tolist() if expert in held]
            asked, hits = asked + len(used), hits + len(found)
            for expert in used.tolist():
                held.pop(expert, None)
                held[expert] = None
            while len(held) > n_slots // trace.n_layers:
                held.popitem(last=False)
    return hits / asked


@pytest.mark.parametrize("n_slots", [6, 9, 12, 15, 21])
def test_lru_in_the_store_is_the_textbooks(n_slots: int) -> None:
    """But for layers that have more than their share until all have theirs."""
    trace = drawn(300, 3, 8, 2, seed=1)
    found = in_ram(trace, "lru", n_slots).ram
    assert found == pytest.approx(lru_hit_rate(trace, n_slots), abs=0.02)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(4, 20))
def test_nothing_beats_knowing_the_future(seed: int, n_slots: int) -> None:
    trace = drawn(60, 3, 8, 2, seed)
    ceiling = in_ram(trace, "belady", n_slots).ram
    for name in NAMES:
        # Layers get their shares in the order of uses, which policies do not change but guesses do.
        assert in_ram(trace, name, n_slots).ram <= ceiling + 0.02


def test_with_room_for_all_only_first_uses_miss() -> None:
    trace = drawn(200, 3, 8, 2, seed=2)
    for name in NAMES:
        assert in_ram(trace, name, 24, warm=100).ram == 1.0


def test_slots_of_a_gpu_serve_what_they_hold_and_ram_the_rest() -> None:
    trace = drawn(200, 3, 8, 2, seed=3)
    make = partial(policy_of, "decayed", trace, counted(trace))
    found = replay(trace, n_gpu=10, n_ram=14, policy=make)
    assert 10 / 24 < found.gpu < 1  # they are filled evenly, and then follow use
    assert found.gpu + found.ram <= 1
    assert 0 < found.promoted <= 1  # one a pass at most
    everything = replay(trace, n_gpu=24, n_ram=2, policy=make)
    assert everything.gpu == 1.0


def test_where_gpu_and_ram_have_room_for_all_only_what_has_just_left_is_read_again() -> None:
    trace = drawn(200, 3, 8, 2, seed=7)
    make = partial(policy_of, "decayed", trace, counted(trace))
    found = replay(trace, n_gpu=10, n_ram=14, policy=make)
    # One expert leaves the GPU a pass at most, and is in RAM from the next on.
    assert 1 - found.gpu - found.ram <= 1 / (trace.n_layers * trace.n_active)
    assert replay(trace, n_gpu=0, n_ram=24, policy=make, warm=0).ram == 1.0


def test_halves_are_the_trace() -> None:
    trace = drawn(9, 2, 8, 2, seed=4)
    first, second = halves(trace)
    assert np.array_equal(np.concatenate([first.experts, second.experts]), trace.experts)


def test_a_trace_is_read_as_it_was_written(tmp_path: Path) -> None:
    trace = drawn(20, 3, 8, 2, seed=5)
    write_trace(tmp_path / "t.npz", trace)
    found = read_trace(tmp_path / "t.npz")
    assert np.array_equal(found.experts, trace.experts)
    assert (found.begins, found.n_experts, found.model) == ((0,), (8, 8, 8), "a test")
    assert dict(found.config) == dict(trace.config)


@pytest.mark.parametrize("how", ["empty", "text", "cut", "beyond", "missing"])
def test_what_is_no_trace_is_refused(tmp_path: Path, how: str) -> None:
    path, trace = tmp_path / "t.npz", drawn(20, 3, 8, 2, seed=6)
    if how == "beyond":
        trace.experts[3, 1, 0] = 8
    write_trace(path, trace)
    if how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("Once upon a time")
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-40])
    elif how == "missing":
        path.unlink()
    said = "there is no such file" if how == "missing" else "no trace of routing"
    with pytest.raises(FolderError, match=said) as refused:
        read_trace(path)
    assert "pickle" not in str(refused.value)
    assert f"--out {path}" not in str(refused.value)  # it may be a text of the user's


def test_what_is_recorded_is_where_transformers_routes(
    talking_checkpoint: Path, tmp_path: Path
) -> None:
    lowmoe.quantize(talking_checkpoint, tmp_path / "folder", format="fp32")
    ids = list(range(5, 45))
    with lowmoe.load(tmp_path / "folder") as model:
        trace = record(model.runtime, [ids[:25], ids[25:]], lambda done, total: None)
        n_active = model.runtime.spec.layers[0].feed_forward.router.n_active
    assert trace.begins == (0, 25)
    theirs = MixtralForCausalLM.from_pretrained(talking_checkpoint, dtype=torch.float32)
    for part, found in ((ids[:25], trace.experts[:25]), (ids[25:], trace.experts[25:])):
        with torch.no_grad():
            logits = theirs(torch.tensor([part]), output_router_logits=True).router_logits
        for layer, scores in enumerate(logits):
            wanted = scores.topk(n_active).indices.sort().values
            assert np.array_equal(np.sort(found[:, layer], 1), wanted.numpy())


def repeats(trace: RoutingTrace) -> tuple[float, float]:
    """How often a token uses any expert of the one before, and how often each of them."""
    pairs = [
        (len(set(a.tolist()) & set(b.tolist())))
        for before, after in zip(trace.experts[:-1], trace.experts[1:], strict=True)
        for a, b in zip(before, after, strict=True)
    ]
    counts = np.array(pairs)
    return float((counts > 0).mean()), float(counts.mean() / trace.n_active)


def test_drawn_mixtrals_repeat_as_the_published_one() -> None:
    trace = synthetic_trace("mixtral-8x7b", 400)
    any_repeat, _ = repeats(trace)
    assert 0.45 < any_repeat < 0.67  # of layers; arXiv 2401.04088, table 5
    shares = np.array([np.bincount(trace.experts[:, i].reshape(-1)) for i in range(32)]) / 800
    # Theirs lie between .06 and .19; each of ours is uncertain by .012 after 400 tokens.
    assert shares.min() > 0.06 - 0.03
    assert shares.max() < 0.19 + 0.03


def test_drawn_qwen3s_repeat_as_the_published_one() -> None:
    _, each = repeats(synthetic_trace("qwen3-30b-a3b", 100))
    assert each == pytest.approx(0.45, abs=0.03)


def test_fits_are_of_models_that_are_known() -> None:
    assert set(FITS) <= set(ALIASES)
