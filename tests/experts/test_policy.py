import hypothesis.strategies as st
import pytest
from hypothesis import given

from lowmoe.experts.policy import DECAY, Popularity, UsePolicy


def test_an_expert_never_used_is_worth_least() -> None:
    policy = UsePolicy()
    policy.record(0, [1])
    for _ in range(1000):
        policy.record(0, [2])
    assert policy.worth((0, 9)) < policy.worth((0, 1)) < policy.worth((0, 2))


def test_a_use_counts_half_after_43_uses_of_its_layer() -> None:
    policy = UsePolicy()
    policy.record(0, [1])
    for _ in range(43):
        policy.record(0, [2])
    assert policy.worth((0, 1))[0] == pytest.approx(0.5, abs=0.005)
    assert pytest.approx(0.5, abs=0.005) == DECAY**43


def test_a_popularity_counts_as_if_it_had_been_so_for_ever() -> None:
    policy, started = UsePolicy(), UsePolicy(start=Popularity({(0, 1): 0.5, (0, 2): 1.0}))
    # Every second use is of both. After a thousand, decay**1000 = 1e-7 of the start is missing.
    for n in range(1000):
        policy.record(0, [1, 2] if n % 2 else [2])
    # Half a step before or after such a use, the mean of which the popularity is.
    assert policy.worth((0, 1))[0] == pytest.approx(started.worth((0, 1))[0], rel=1 - DECAY)
    assert policy.worth((0, 2))[0] == pytest.approx(started.worth((0, 2))[0], rel=1e-6)


def test_a_popularity_is_forgotten_like_uses() -> None:
    policy = UsePolicy(start=Popularity({(0, 1): 1.0}))
    for _ in range(200):
        policy.record(0, [2])
    assert policy.worth((0, 2)) > policy.worth((0, 1))


def test_what_is_alike_keeps_its_order() -> None:
    keys = [(1, 0), (0, 3), (0, 1), (0, 2)]
    assert Popularity().ordered(keys) == keys
    assert Popularity({(0, 1): 0.1}).ordered(keys) == [(0, 1), (1, 0), (0, 3), (0, 2)]


def test_frequency_beats_recency() -> None:
    policy = UsePolicy()
    for _ in range(3):
        policy.record(0, [1])
    policy.record(0, [2])
    assert policy.worth((0, 1)) > policy.worth((0, 2))


def test_recency_breaks_a_tie_between_layers() -> None:
    policy = UsePolicy()
    policy.record(0, [5])
    policy.record(1, [5])
    assert policy.worth((0, 5))[0] == policy.worth((1, 5))[0]
    assert policy.worth((0, 5)) < policy.worth((1, 5))


def test_time_passes_for_a_layer_only_when_it_is_used() -> None:
    policy = UsePolicy()
    policy.record(0, [1])
    for _ in range(500):
        policy.record(1, [1])
    assert policy.worth((0, 1))[0] == 1.0


@given(st.lists(st.sets(st.integers(0, 3), min_size=1), min_size=1, max_size=60))
def test_worth_is_the_sum_of_all_uses_each_decayed_since(uses: list[set[int]]) -> None:
    policy = UsePolicy(decay=0.9)
    for expert_ids in uses:
        policy.record(7, sorted(expert_ids))
    for expert_id in range(4):
        wanted = sum(0.9**age for age, used in enumerate(reversed(uses)) if expert_id in used)
        assert policy.worth((7, expert_id))[0] == pytest.approx(wanted)
