"""Which experts that are missing from a GPU the CPU computes, and which are brought there.

Costs are learned from what this very run did: how long the CPU took for some experts, how long
copies took, how much copies slowed the CPU down, since both read the same RAM. A layer lasts as
long as the slower of its two sides; the split that balances them is taken. Where one side does
everything the other is tried now and then, for a little of the time, in case it has become faster.

Knows:        seconds that experts took; who waits for whom.
Ignorant of:  devices, clocks, which experts they are, what the bits mean.
"""

from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

Misses: TypeAlias = Literal["cpu", "page", "auto"]
MISSES: tuple[Misses, ...] = get_args(Misses)

# Before anything is measured, and for good where nothing is to depend on measuring: bytes a second
# of the CPU and of copies on a machine of two channels of DDR5 and PCIe 4 x16.
NOMINAL_CPU, NOMINAL_COPY = 60e9, 20e9
# A token more costs the CPU a third of the expert's first (lowmoe/kernels/cpu/matrix.h multiplies
# three in the time of one), and a GPU of 1 TB/s and 200e12 operations a second a thirtieth.
MORE_ON_CPU, MORE_ON_GPU = 1 / 3, 1 / 30
# How far a cost may wander from one layer to the next, and how far one measurement is off, as
# shares: so the latest five count most, and twice the cost is learned within ten layers.
DRIFT, NOISE = 0.05, 0.1
MOST_SURPRISE = 4.0  # times what was expected that one measurement may say: hosts have hiccups
NOMINAL_BRING_S = 60e-6  # of the host's time: a thread told, a few launches
# Less of a layer's time than this is not worth the bus; it is within what costs are off.
WORTH_BRINGING = 0.02
PROBE_SHARE = 0.01  # of the time, for trying the side that does nothing
STALE = 32  # layers after which what a side costs may have changed


class Line:
    """A sum of factors times what is given, the factors learned from sums that were observed.

    A Kalman filter whose factors drift; the first factor is the measure of all.
    Source: Kalman, "A new approach to linear filtering and prediction problems", 1960.
    """

    def __init__(self, *factors: float) -> None:
        """factors: to begin with, any of them may be as far off as the first is large."""
        self.factors, self._least = list(factors), 1e-4 * factors[0]
        n, doubt = len(factors), factors[0] ** 2
        self._doubt = [[doubt if i == j else 0.0 for j in range(n)] for i in range(n)]

    def at(self, *given: float) -> float:
        """The sum expected."""
        return sum(f * x for f, x in zip(self.factors, given, strict=True))

    def learn(self, given: Sequence[float], found: float) -> None:
        """A sum was observed.  given: of which at least one is not 0."""
        expected, doubt = self.at(*given), self._doubt
        found = min(found, MOST_SURPRISE * expected)
        most, drift = self.factors[0] ** 2, (DRIFT * self.factors[0]) ** 2
        for i, row in enumerate(doubt):
            row[i] = min(row[i] + drift, most)
        along = [sum(d * x for d, x in zip(row, given, strict=True)) for row in doubt]
        variance = sum(a * x for a, x in zip(along, given, strict=True))
        whole = variance + (NOISE * expected) ** 2
        for i, a in enumerate(along):
            self.factors[i] = max(0.0, self.factors[i] + a / whole * (found - expected))
            for j, other in enumerate(along):
                doubt[i][j] -= a * other / whole
        self.factors[0] = max(self._least, self.factors[0])


class Costs:
    """Seconds, for experts that are all of one size.

    cpu: of an expert of one token, of each token more, of each expert that is copied meanwhile;
    copy: of an expert; gpu: of an expert of one token and of each token more; bring: of the host,
    to have any brought at all.
    """

    def __init__(self, expert_bytes: int, gpu_bandwidth: float) -> None:
        """gpu_bandwidth: bytes a second that the GPU's memory moves."""
        cpu, gpu = expert_bytes / NOMINAL_CPU, expert_bytes / gpu_bandwidth
        # As long as nothing else is known, the CPU alone takes all that RAM gives.
        self.cpu = Line(cpu, cpu * MORE_ON_CPU, cpu)
        self.copy = Line(expert_bytes / NOMINAL_COPY)
        self.gpu = Line(gpu, gpu * MORE_ON_GPU)
        self.bring = Line(NOMINAL_BRING_S)

    def here(self, n_experts: int, n_more: int, n_copied: int) -> float:
        """Of the CPU's side, while others are copied for as long as that takes."""
        if n_experts == 0:
            return 0.0
        first, more, delay = self.cpu.factors
        alone, copy = first * n_experts + more * n_more, self.copy.factors[0]
        to_the_end = alone + delay * n_copied
        # Copies that outlast the CPU delay it by those made until then.
        return min(to_the_end, alone / (1 - delay / copy)) if delay < copy else to_the_end

    def there(self, n_experts: int, n_more: int) -> float:
        """Of the GPU's side: each computed while the next is copied."""
        if n_experts == 0:
            return 0.0
        copy, last = self.copy.factors[0], self.gpu.at(1, n_more / n_experts)
        return max(copy * n_experts + last, copy + self.gpu.at(n_experts, n_more))


class MissSplit:
    """Splits the missing experts of layers.

    misses: "cpu", "page" (all are brought) or "auto", which alone learns costs: what is brought by
    the others does not depend on how fast anything was.
    """

    def __init__(self, misses: Misses, costs: Costs) -> None:
        self.misses, self.costs = misses, costs
        self._earned_s = 0.0
        self._since_here = self._since_there = 0

    # --- decisions

    def n_here(self, n_tokens: Sequence[int]) -> int:
        """When decoding: how many of some experts the CPU computes, the first ones.

        n_tokens: of each expert, ascending.
        """
        if self.misses != "auto":
            return len(n_tokens) if self.misses == "cpu" else 0
        seconds = self._seconds(n_tokens)
        chosen = self._or_probe(seconds, _best(seconds))
        self._since_there = 0 if chosen < len(n_tokens) else self._since_there + 1
        self._since_here = 0 if chosen > 0 else self._since_here + 1
        return chosen

    def n_here_of_prompt(self, n_tokens: Sequence[int]) -> int:
        """The same for a prompt, of whose experts most have many tokens."""
        return 0 if self.misses == "page" else _best(self._seconds(n_tokens))

    def _seconds(self, n_tokens: Sequence[int]) -> list[float]:
        """That the layer takes if the CPU computes the first 0, 1, ... experts."""
        n, more, more_here = len(n_tokens), sum(n_tokens) - len(n_tokens), 0
        bring = self.costs.bring.factors[0]
        seconds = [bring + self.costs.there(n, more)]
        for n_here, count in enumerate(n_tokens, start=1):
            more_here += count - 1
            here = self.costs.here(n_here, more_here, n - n_here)
            there = self.costs.there(n - n_here, more - more_here)
            seconds.append(bring + max(here, there) if there else here)
        return seconds

    def _or_probe(self, seconds: list[float], best: int) -> int:
        """The best, or where it leaves one side without work and there is time for it, another."""
        self._earned_s = min(self._earned_s + PROBE_SHARE * seconds[best], max(seconds))
        other = best
        if best == len(seconds) - 1 and self._since_there >= STALE:
            other = best - 1
        elif best == 0 and self._since_here >= STALE:
            other = 1
        extra = seconds[other] - seconds[best]
        if other == best or extra > self._earned_s:
            return best
        self._earned_s -= extra
        return other

    # --- what happened

    def computed_here(self, n_experts: int, n_more: int, n_copied: int, seconds: float) -> None:
        """The CPU took so long, while up to n_copied experts were copied."""
        if self.misses == "auto":
            until_then = min(n_copied, seconds / self.costs.copy.factors[0])
            self.costs.cpu.learn((n_experts, n_more, until_then), seconds)

    def brought(self, seconds: float) -> None:
        """The host took so long to have some brought and computed with, waiting left out."""
        if self.misses == "auto":
            self.costs.bring.learn((1,), seconds)

    def copied(self, n_experts: int, seconds: float) -> None:
        """Copying took so long."""
        if self.misses == "auto":
            self.costs.copy.learn((n_experts,), seconds)

    def computed_there(self, n_experts: int, n_more: int, seconds: float) -> None:
        """The GPU took so long."""
        if self.misses == "auto":
            self.costs.gpu.learn((n_experts, n_more), seconds)


def _best(seconds: list[float]) -> int:
    """Where the least is, or the end if that is little more: what is not brought takes no bus."""
    least = min(seconds)
    if seconds[-1] * (1 - WORTH_BRINGING) <= least:
        return len(seconds) - 1
    return seconds.index(least)
