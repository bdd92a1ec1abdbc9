"""Counts what the store was asked for and what it had to move.

Knows:        bytes, requests, seconds in which the disk was busy.
Ignorant of:  tokens and layers.
"""

import threading
import time
from collections import Counter
from dataclasses import dataclass, field, fields
from typing import TypeAlias

LayerBytes: TypeAlias = tuple[int, int, int]  # on the GPU, from RAM, over the bus


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Totals since the store was made; subtract two to get those of a span of time.

    gpu_requests, ram_requests, disk_requests: experts lent that were on the GPU or in RAM when
    asked for, or in neither; gpu_bytes, ram_bytes: bytes of all experts lent there; disk_bytes:
    bytes read from disk, guesses and what was read unasked included; disk_busy_s: seconds with at
    least one read under way.
    copied_bytes: sent from RAM to the GPU, passed_bytes those of them that were computed with there
    and did not stay; copied_s: seconds that copies took, as far as they have come.
    layers: of layers whose experts are in several places, how many had so many bytes of them
    computed on the GPU, read from RAM and sent over the bus, at the same time.
    guessed, guessed_right: experts read ahead, and those of them that were then asked for.
    coarse: experts lent with their first parts only; promoted: experts sent from RAM to the GPU
    that were to stay.
    """

    gpu_requests: int = 0
    gpu_bytes: int = 0
    ram_requests: int = 0
    disk_requests: int = 0
    ram_bytes: int = 0
    disk_bytes: int = 0
    disk_busy_s: float = 0.0
    copied_bytes: int = 0
    passed_bytes: int = 0
    copied_s: float = 0.0
    layers: Counter[LayerBytes] = field(default_factory=Counter)
    guessed: int = 0
    guessed_right: int = 0
    coarse: int = 0
    promoted: int = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        sums = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        return Traffic(**sums)

    def __sub__(self, earlier: "Traffic") -> "Traffic":
        return Traffic(
            **{f.name: getattr(self, f.name) - getattr(earlier, f.name) for f in fields(self)}
        )


class Ledger:
    """The running totals; reads are counted from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ram_requests = self._disk_requests = self._ram_bytes = self._disk_bytes = 0
        self._guessed = self._guessed_right = self._coarse = 0
        self._busy_s = 0.0
        self._reads = 0
        self._busy_since = 0.0

    def lent(self, *, in_ram: int, on_disk: int, expert_bytes: int) -> None:
        """So many experts were lent, all of one size."""
        self._ram_requests += in_ram
        self._disk_requests += on_disk
        self._ram_bytes += (in_ram + on_disk) * expert_bytes

    def lent_coarse(self, bytes_less: int) -> None:
        """One of what was lent was not whole, but so many bytes less."""
        self._coarse += 1
        self._ram_bytes -= bytes_less

    def guess(self, *, right: bool) -> None:
        """An expert is read ahead; or, later, one that was is asked for."""
        self._guessed += not right
        self._guessed_right += right

    def guess_dropped(self) -> None:
        """One is not read after all."""
        self._guessed -= 1

    @property
    def n_reads_now(self) -> int:
        """Reads under way."""
        return self._reads

    def read_begins(self) -> None:
        """A read from disk is under way."""
        with self._lock:
            if self._reads == 0:
                self._busy_since = time.perf_counter()
            self._reads += 1

    def read_ends(self, n_bytes: int) -> None:
        """It has ended, with so many bytes."""
        with self._lock:
            self._reads -= 1
            self._disk_bytes += n_bytes
            if self._reads == 0:
                self._busy_s += time.perf_counter() - self._busy_since

    def traffic(self) -> Traffic:
        """The totals so far."""
        with self._lock:
            running = time.perf_counter() - self._busy_since if self._reads else 0.0
            return Traffic(
                ram_requests=self._ram_requests,
                disk_requests=self._disk_requests,
                ram_bytes=self._ram_bytes,
                disk_bytes=self._disk_bytes,
                disk_busy_s=self._busy_s + running,
                guessed=self._guessed,
                guessed_right=self._guessed_right,
                coarse=self._coarse,
            )
