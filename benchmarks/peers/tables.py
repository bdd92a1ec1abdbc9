"""Turns as tables: medians, spreads, ratios, shares of what the machine allows.

Knows:        how samples are summed up and printed.
Ignorant of:  how they were taken.
"""

import statistics
from collections.abc import Sequence

from benchmarks.peers.turns import Turn

LINKS = ("narrow", "wide", "flipped")


def of_contender(turns: Sequence[Turn], name: str) -> list[Turn]:
    """The turns of one contender."""
    return [turn for turn in turns if turn.contender == name]


def median_rate(turns: Sequence[Turn]) -> float:
    """tokens/s over all samples."""
    return statistics.median(rate for turn in turns for rate in turn.rates)


def fastest(turns: Sequence[Turn], *, side: str, bits: int) -> str:
    """The name of a side's contender with the highest median.  There must be one."""
    names = {t.contender for t in turns if t.side == side and t.bits == bits}
    if not names:
        raise SystemExit(
            f"others disturbed every turn of {side} at {bits} bits. Wait until the machine is "
            "quiet, or allow more with --max-others-cores."
        )
    return max(sorted(names), key=lambda name: median_rate(of_contender(turns, name)))


def round_ratios(turns: Sequence[Turn], name: str, other: str) -> list[float]:
    """In every round both took part in: median of the one over median of the other."""
    mine = {(t.stage, t.round): median_rate([t]) for t in of_contender(turns, name)}
    theirs = {(t.stage, t.round): median_rate([t]) for t in of_contender(turns, other)}
    return [mine[key] / theirs[key] for key in sorted(mine.keys() & theirs.keys())]


def bandwidth_shares(turns: Sequence[Turn]) -> list[float]:
    """Of what RAM gave around each turn, the share that its samples took for weights."""
    return [
        rate * turn.bytes_per_token / turn.observed.ceiling_bytes_s
        for turn in turns
        for rate in turn.rates
    ]


def print_table(turns: Sequence[Turn], *, moves_weights: bool) -> None:
    """One line for each contender and state of the link, in the order of their first turns.

    moves_weights: whether every token reads its weights, as in decode but not in prefill.
    """
    columns = f"{'MB/token':>10}{'GB/s':>7}{'of RAM':>8}{'disk MB/token':>15}"
    print(
        f"{'':36}{'link':>8}{'tokens/s':>10}{'min - max':>18}{'n':>4}"
        + (columns if moves_weights else "")
    )
    for name in dict.fromkeys(turn.contender for turn in turns):
        for link in LINKS:
            those = [turn for turn in of_contender(turns, name) if turn.observed.link == link]
            if those:
                bandwidth = _bandwidth(those) if moves_weights else ""
                print(f"{name:36}{link:>8}{_rates(those)}{bandwidth}")


def _rates(turns: Sequence[Turn]) -> str:
    rates = [rate for turn in turns for rate in turn.rates]
    span = f"{min(rates):.2f} - {max(rates):.2f}"
    return f"{statistics.median(rates):10.2f}{span:>18}{len(rates):4}"


def _bandwidth(turns: Sequence[Turn]) -> str:
    disk = statistics.median(x for turn in turns for x in turn.disk_bytes_per_token)
    per_token, share = turns[0].bytes_per_token, statistics.median(bandwidth_shares(turns))
    rate = median_rate(turns) * per_token / 1e9
    return f"{per_token / 1e6:10.0f}{rate:7.1f}{share:8.0%}{disk / 1e6:15.1f}"


def print_ceiling(turns: Sequence[Turn]) -> None:
    """What memory gave before and after the turns, by the state of the link."""
    states = [state for turn in turns for state in (turn.observed.before, turn.observed.after)]
    for link in sorted({state.link for state in states}):
        those = [state for state in states if state.link == link]
        reads = sorted(state.read_all for state in those)
        trip = statistics.median(state.round_trip_ns for state in those)
        print(
            f"RAM reads, link {link}: {statistics.median(reads):.1f} GB/s "
            f"({reads[0]:.1f} - {reads[-1]:.1f}), a cache line there and back {trip:.0f} ns, "
            f"{len(those)} readings"
        )
    others = statistics.median(turn.observed.others_cores for turn in turns)
    print(
        f"other processes took {others:.2f} cores (at most "
        f"{max(turn.observed.others_cores for turn in turns):.2f}), the host "
        f"{max(turn.observed.steal for turn in turns):.1%} at most"
    )


def print_ratio(turns: Sequence[Turn], name: str, other: str) -> float:
    """How one contender stands to another, round by round; returns the median."""
    ratios = round_ratios(turns, name, other)
    if not ratios:
        raise SystemExit(
            f"others disturbed every round of {name} and {other}. Wait until the machine is quiet, "
            "or allow more with --max-others-cores."
        )
    middle = statistics.median(ratios)
    print(
        f"{name} is {middle:.2f} times {other} "
        f"({min(ratios):.2f} - {max(ratios):.2f}, {len(ratios)} rounds)"
    )
    for link in LINKS:
        sides = [
            [t for t in of_contender(turns, n) if t.observed.link == link] for n in (name, other)
        ]
        if all(sides):
            print(f"  link {link}: {median_rate(sides[0]) / median_rate(sides[1]):.2f}")
    return middle
