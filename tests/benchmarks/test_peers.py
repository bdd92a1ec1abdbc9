"""What the comparison with llama.cpp makes of its samples; that both sides get the same tokens."""

import argparse
from collections.abc import Sequence
from itertools import pairwise

import pytest

from benchmarks.peers.machine_state import MachineState
from benchmarks.peers.observation import Observation
from benchmarks.peers.samples import Sample, take_samples
from benchmarks.peers.shapes import SHAPES, Shape
from benchmarks.peers.tables import bandwidth_shares, fastest, round_ratios
from benchmarks.peers.turns import Turn
from lowmoe.families import read_config

NARROW = MachineState(read_one=40.0, read_all=40.0, round_trip_ns=80)
WIDE = MachineState(read_one=40.0, read_all=80.0, round_trip_ns=400)


def a_turn(
    name: str,
    rates: Sequence[float],
    *,
    round: int = 0,
    after: MachineState = NARROW,
    stage: str = "duel",
) -> Turn:
    samples = [Sample(tokens_per_s=rate, disk_bytes_per_token=0) for rate in rates]
    observed = Observation(
        result={"bytes_per_token": 1e9, "samples": samples},
        before=NARROW,
        after=after,
        others_cores=0.0,
        steal=0.0,
        attempts=1,
        disturbed=False,
    )
    side = name.split()[0]
    return Turn(contender=name, side=side, bits=4, stage=stage, round=round, observed=observed)


def listened_to(measure: str, tokens: int) -> list[list[int] | None]:
    """Every call that take_samples makes; None: the cache is emptied."""
    calls: list[list[int] | None] = []
    arguments = argparse.Namespace(measure=measure, tokens=tokens, samples=2, warm_ups=1)
    found = take_samples(
        lambda: calls.append(None),
        lambda ids: calls.append(list(ids)),
        n_vocab=1000,
        arguments=arguments,
    )
    assert len(found) == 2
    return calls


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_a_shape_is_the_same_model_in_lowmoe(shape: Shape) -> None:
    spec = read_config(shape.lowmoe_config()).spec
    (layer,) = set(spec.layers)
    experts, attention = layer.feed_forward, layer.attention
    assert len(spec.layers) == shape.n_layers
    assert (spec.n_hidden, spec.n_vocab) == (shape.n_hidden, shape.n_vocab)
    assert (experts.n_experts, experts.n_inner) == (shape.n_experts, shape.n_inner)
    assert experts.router.n_active == shape.n_active
    assert attention.q_size == shape.n_heads * shape.head_size
    assert attention.kv_size == shape.n_kv_heads * shape.head_size


def test_decode_runs_token_by_token_after_one_that_is_not_timed() -> None:
    calls = listened_to("decode", 5)
    assert [call for call in calls if call is None] == [None] * 3
    assert [len(call) for call in calls if call is not None] == [1] * 6 * 3
    assert calls[0] is None


def test_prefill_runs_all_tokens_at_once_in_an_empty_cache() -> None:
    calls = listened_to("prefill", 5)
    assert [None if call is None else len(call) for call in calls] == [None, 5] * 3


def test_both_sides_are_given_the_same_tokens_and_every_sample_others() -> None:
    calls = listened_to("prefill", 5)
    assert calls == listened_to("prefill", 5)
    prompts = [call for call in calls if call is not None]
    assert all(one != other for one, other in pairwise(prompts))


def test_a_ratio_compares_turns_of_the_same_round_only() -> None:
    turns = [
        a_turn("llama.cpp a", [10.0], stage="field"),
        a_turn("lowmoe", [30.0, 20.0, 20.0], round=0),
        a_turn("llama.cpp a", [10.0], round=0),
        a_turn("lowmoe", [60.0], round=1),
        a_turn("llama.cpp a", [20.0], round=1),
        a_turn("lowmoe", [99.0], round=2),
    ]
    assert round_ratios(turns, "lowmoe", "llama.cpp a") == [2.0, 3.0]


def test_the_fastest_has_the_highest_median_not_the_highest_sample() -> None:
    turns = [
        a_turn("llama.cpp a", [10.0, 11.0, 90.0]),
        a_turn("llama.cpp b", [12.0, 12.0, 12.0]),
        a_turn("lowmoe", [50.0]),
    ]
    assert fastest(turns, side="llama.cpp", bits=4) == "llama.cpp b"


def test_no_setting_is_fastest_where_none_was_measured() -> None:
    with pytest.raises(SystemExit, match="at 2 bits"):
        fastest([a_turn("llama.cpp a", [10.0])], side="llama.cpp", bits=2)


def test_shares_of_bandwidth_refer_to_the_state_around_their_own_turn() -> None:
    still, flipped = a_turn("a", [20.0]), a_turn("a", [30.0], after=WIDE)
    # 20 GB/s of 40, and 30 GB/s of the mean of 40 and 80.
    assert bandwidth_shares([still, flipped]) == [0.5, 0.5]
    assert (still.observed.link, flipped.observed.link) == ("narrow", "flipped")
