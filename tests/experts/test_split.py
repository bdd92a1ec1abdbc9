"""How missing experts are split, by arithmetic: no device, no clock."""

import random

import pytest

from lowmoe.experts.split import MISSES, STALE, Costs, Line, MissSplit

EXPERT = 85_000_000
FAST_GPU = 1e12


def learned(cpu: float, copy: float, delay: float = 0.0) -> MissSplit:
    """A split that has seen a machine of these bandwidths.

    delay: seconds that an expert copied holds up the CPU, in those that it takes the CPU itself.
    """
    split = MissSplit("auto", Costs(EXPERT, FAST_GPU))
    first = EXPERT / cpu
    for _ in range(200):
        split.copied(1, EXPERT / copy)
        for n_here, n_more, n_copied in ((1, 0, 0), (2, 0, 1), (1, 0, 1), (3, 3, 0)):
            alone = first * (n_here + n_more / 3)
            # Until the CPU is done it is delayed: T = alone + delay * first * T / (EXPERT / copy).
            until_then = alone / (1 - delay * copy / cpu)
            all_of_them = alone + delay * first * n_copied
            split.computed_here(n_here, n_more, n_copied, min(until_then, all_of_them))
    return split


def ones(n: int) -> list[int]:
    return [1] * n


# --- a line


def test_a_line_finds_the_factors_that_make_what_it_sees() -> None:
    line, luck = Line(1.0, 0.3, 1.0), random.Random(1)
    for _ in range(400):
        given = (luck.randint(1, 4), luck.randint(0, 6), luck.randint(0, 2))
        found = 2.5 * given[0] + 0.2 * given[1] + 0.7 * given[2]
        line.learn(given, found * luck.uniform(0.95, 1.05))
    # Factors drift by a twentieth of the first a layer, as much as what is seen is off.
    assert line.factors == pytest.approx([2.5, 0.2, 0.7], abs=0.25)


@pytest.mark.parametrize("change", [0.1, 0.5, 2, 10])
def test_a_line_follows_a_change_within_ten_sums(change: float) -> None:
    line = Line(1.0)
    for _ in range(50):
        line.learn((2,), 2.0)
    for _ in range(10):
        line.learn((2,), 2.0 * change)
    assert line.at(1) == pytest.approx(change, rel=0.1)


def test_one_hiccup_does_not_unlearn_a_line() -> None:
    line = Line(1.0)
    for _ in range(50):
        line.learn((1,), 1.0)
    line.learn((1,), 1000.0)
    assert line.at(1) < 3
    for _ in range(10):
        line.learn((1,), 1.0)
    assert line.at(1) == pytest.approx(1, rel=0.05)


def test_no_factor_is_ever_negative() -> None:
    line = Line(1.0, 1.0)
    for _ in range(50):
        line.learn((2, 1), 1.0)
        line.learn((1, 0), 1.0)
    assert line.factors[0] > 0
    assert line.factors[1] >= 0


def test_what_takes_no_time_at_all_is_learned_as_next_to_none() -> None:
    line = Line(1.0)
    for _ in range(1000):
        line.learn((1,), 0.0)
    assert 0 < line.at(1) < 1e-3


# --- the split


@pytest.mark.parametrize("n", [1, 2, 8])
def test_who_is_told_where_to_compute_does_so_whatever_it_costs(n: int) -> None:
    costs = Costs(EXPERT, FAST_GPU)
    assert MissSplit("cpu", costs).n_here(ones(n)) == n
    assert MissSplit("page", costs).n_here(ones(n)) == 0
    assert MissSplit("page", costs).n_here_of_prompt(ones(n)) == 0


def test_only_auto_learns() -> None:
    for misses in MISSES:
        split = MissSplit(misses, Costs(EXPERT, FAST_GPU))
        before = [list(line.factors) for line in (split.costs.cpu, split.costs.copy)]
        split.computed_here(1, 0, 0, 1.0)
        split.copied(1, 1.0)
        now = [line.factors for line in (split.costs.cpu, split.costs.copy)]
        assert (now == before) == (misses != "auto")


def test_where_the_cpu_takes_all_that_ram_gives_nothing_is_brought() -> None:
    # The reference machine: 80 GB/s for both together, of which PCIe 4 x16 takes 25.
    split = learned(cpu=80e9, copy=25e9, delay=1.0)
    assert [split.n_here(ones(n)) for n in (1, 2, 4, 8)] == [1, 2, 4, 8]


def test_a_cpu_slower_than_its_ram_shares_with_the_bus_and_a_very_slow_one_leaves_it_all() -> None:
    half = learned(cpu=25e9, copy=25e9)
    assert half.n_here(ones(2)) == 1
    assert half.n_here(ones(8)) == 4
    quarter = learned(cpu=25e9, copy=75e9)
    assert quarter.n_here(ones(8)) == 2
    slow = learned(cpu=1e9, copy=25e9)
    assert slow.n_here(ones(2)) == 0
    assert slow.n_here(ones(8)) == 0


def test_a_tie_stays_on_the_cpu() -> None:
    costs = Costs(EXPERT, FAST_GPU)
    costs.cpu.factors, costs.copy.factors, costs.gpu.factors = [1.0, 0.0, 0.0], [1.0], [0.0, 0.0]
    assert MissSplit("auto", costs).n_here([1]) == 1


def test_of_a_prompt_experts_of_few_tokens_stay_and_those_of_many_are_brought() -> None:
    split = learned(cpu=80e9, copy=25e9, delay=1.0)
    counts = [1, 1, 2, 3, 90, 100, 120, 300]
    n_here = split.n_here_of_prompt(counts)
    assert 2 <= n_here <= 4
    assert split.n_here_of_prompt([200] * 8) == 0
    # What is brought need not wait for the CPU, nor the CPU for it.
    seconds = split._seconds(counts)
    assert seconds[n_here] == min(seconds)


def test_a_prompts_split_is_the_same_before_and_after_where_nothing_may_be_measured() -> None:
    split = MissSplit("cpu", Costs(EXPERT, FAST_GPU))
    counts = [1, 1, 2, 3, 4, 9, 100, 120, 300]
    before = split.n_here_of_prompt(counts)
    split.copied(1, 10.0)
    split.computed_here(1, 0, 0, 1e-9)
    assert split.n_here_of_prompt(counts) == before


# --- trying the other side


def simulated(split: MissSplit, layers: int, cpu: float, copy: float) -> tuple[float, int]:
    """Seconds, and how often something was brought; RAM is never short."""
    total, n_brought = 0.0, 0
    for _ in range(layers):
        n_here = split.n_here(ones(2))
        here, there = n_here * EXPERT / cpu, (2 - n_here) * EXPERT / copy
        n_brought += n_here < 2
        total += max(here, there)
        if n_here:
            split.computed_here(n_here, 0, 2 - n_here, here)
        if n_here < 2:
            split.copied(2 - n_here, there)
    return total, n_brought


@pytest.mark.parametrize(("cpu", "copy"), [(80e9, 10e9), (80e9, 25e9), (5e9, 60e9), (2e9, 60e9)])
def test_trying_the_idle_side_costs_a_hundredth(cpu: float, copy: float) -> None:
    split = learned(cpu=cpu, copy=copy)
    total, _ = simulated(split, 4000, cpu, copy)
    best = min(2 / cpu, 2 / copy, max(1 / cpu, 1 / copy)) * EXPERT * 4000
    # And another for what the first try costs, which is taken on trust.
    assert total <= best * 1.02


def test_a_side_that_has_become_fast_is_found() -> None:
    split = learned(cpu=80e9, copy=20e9)
    _, n_brought = simulated(split, 10 * STALE, 80e9, 20e9)
    assert 0 < n_brought < 10
    _, n_brought = simulated(split, 10 * STALE, 80e9, 80e9)
    assert n_brought > 5 * STALE
