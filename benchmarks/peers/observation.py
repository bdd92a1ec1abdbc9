"""Does some work on a quiet machine and says what the machine was like meanwhile.

Knows:        the state before and after, what other processes took, when to do it again.
Ignorant of:  what the work is.
"""

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import psutil

from benchmarks.peers.machine_state import MachineProbe, MachineState

MAX_ATTEMPTS = 4
PATIENCE_S = 120.0  # for others to become quiet, before each attempt
GLANCE_S = 1.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation(Generic[T]):
    """What came out, and around it the machine.

    others_cores: processors' worth of time that other processes took; steal: the share of time that
    the host took away; disturbed: others took too much in every attempt, so that this counts for
    nothing.
    """

    result: T
    before: MachineState
    after: MachineState
    others_cores: float
    steal: float
    attempts: int
    disturbed: bool

    @property
    def ceiling_bytes_s(self) -> float:
        """What all threads read from RAM, mean of before and after."""
        return (self.before.read_all + self.after.read_all) / 2 * 1e9

    @property
    def link(self) -> str:
        """The state of both ends, or "flipped"."""
        return self.before.link if self.before.link == self.after.link else "flipped"


def observe(
    work: Callable[[], T], probe: MachineProbe, *, max_others_cores: float
) -> Observation[T]:
    """Wait until others take no more than that, work, and do it again if they took more meanwhile.

    Whether an attempt counts does not depend on what it measured.
    """
    for attempt in range(1, MAX_ATTEMPTS + 1):
        _await_quiet(max_others_cores)
        before, watch = probe.measure(), _Watch()
        result = work()
        others_cores, steal = watch.read()
        observation = Observation(
            result=result,
            before=before,
            after=probe.measure(),
            others_cores=others_cores,
            steal=steal,
            attempts=attempt,
            disturbed=others_cores > max_others_cores,
        )
        if not observation.disturbed:
            break
    return observation


def _await_quiet(max_others_cores: float) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        watch = _Watch()
        time.sleep(GLANCE_S)
        if watch.read()[0] <= max_others_cores:
            return


class _Watch:
    """What the machine did beside this process and its children since this was made."""

    def __init__(self) -> None:
        self._begin = time.monotonic()
        self._own, self._times = _own_s(), psutil.cpu_times()

    def read(self) -> tuple[float, float]:
        """(cores that others took, share of time that the host took)."""
        wall, now = time.monotonic() - self._begin, psutil.cpu_times()
        gone = {name: getattr(now, name) - getattr(self._times, name) for name in now._fields}
        # The kernel counts a guest's time as user time too.
        working = ("user", "nice", "system", "irq", "softirq")
        others = sum(gone[name] for name in working) - (_own_s() - self._own)
        return max(0.0, others) / wall, gone["steal"] / sum(gone.values())


def _own_s() -> float:
    ours = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(used.ru_utime + used.ru_stime for used in ours)
