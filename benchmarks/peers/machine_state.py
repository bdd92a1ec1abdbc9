"""What the machine allows at this moment: read bandwidth, and how its cores are joined.

Knows:        how machine_state.cpp is compiled and what it prints.
Ignorant of:  models, engines.
"""

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.processes import last_line

SOURCE = Path(__file__).with_suffix(".cpp")
# Cores under one last-level cache answered within 130 ns, others took 450 and more (2 cores of a
# virtual EPYC 9005).
SAME_CACHE_NS = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineState:
    """read_one, read_all: GB/s (1e9) by one thread and by all; round_trip_ns: between two cores."""

    read_one: float
    read_all: float
    round_trip_ns: float

    @property
    def link(self) -> str:
        """Narrow: the cores share one way to memory; wide: they do not."""
        return "narrow" if self.round_trip_ns < SAME_CACHE_NS else "wide"


class MachineProbe:
    """Compiled once, asked often; each answer takes about a second and 1 GiB of memory."""

    def __init__(self, work: Path, n_threads: int, *, autogroup_nice: int | None = None) -> None:
        """work: where the program is put; autogroup_nice: last_line's."""
        compiler = os.environ.get("CXX") or shutil.which("c++")
        if compiler is None:
            raise SystemExit("no C++ compiler was found. Install one, or set CXX.")
        self._autogroup_nice = autogroup_nice
        self._command = [str((work / "machine_state").resolve()), str(n_threads)]
        flags = ["-O3", "-march=native", "-std=c++20", "-pthread"]
        subprocess.run([compiler, *flags, str(SOURCE), "-o", self._command[0]], check=True)

    def measure(self) -> MachineState:
        """The state now."""
        line = last_line(self._command, autogroup_nice=self._autogroup_nice)
        return MachineState(**json.loads(line))
