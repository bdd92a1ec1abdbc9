"""Slots of RAM, each the size of one expert, never more of them than the budget allows.

Knows:        buffers, which expert fills which slot, what is lent or being filled.
Ignorant of:  how slots are filled, whose turn it is to leave.
"""

import contextlib
import mmap
import sys
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowmoe.experts.policy import Key


@dataclass(slots=True, eq=False)
class Slot:
    """Room for one expert.  filling: done once the buffers hold `key`; lent: how often lent out."""

    buffers: list[Tensor]
    key: Key | None = None
    filling: "Future[None] | None" = None
    lent: int = 0
    guessed: bool = False  # read ahead and not yet asked for
    _ready: bool = False  # once seen: asking a Future takes a lock, and this is asked at every token

    @property
    def is_ready(self) -> bool:
        """Whether it holds its expert."""
        if not self._ready:
            self._ready = self.is_settled and not self.has_failed
        return self._ready

    @property
    def is_settled(self) -> bool:
        """Whether nothing is being read into it, be it that reading succeeded or failed."""
        return self._ready or (self.filling is not None and self.filling.done())

    @property
    def has_failed(self) -> bool:
        if self._ready or self.filling is None or not self.filling.done():
            return False
        return self.filling.exception() is not None


@dataclass(slots=True)
class RamTier:
    """Slots, made as they are needed up to n_slots, then reused.

    buffer_bytes: the sizes of a slot's buffers; each starts on a page, as O_DIRECT wants.
    """

    buffer_bytes: tuple[int, ...]
    n_slots: int
    residents: dict[Key, Slot] = field(default_factory=dict)
    _n_made: int = 0
    _free: list[Slot] = field(default_factory=list)

    @property
    def slot_bytes(self) -> int:
        return sum(self.buffer_bytes)

    @property
    def used_bytes(self) -> int:
        return self._n_made * self.slot_bytes

    def take_free(self) -> Slot | None:
        """An empty slot, or None when the budget is spent."""
        if self._free:
            return self._free.pop()
        if self._n_made == self.n_slots:
            return None
        self._n_made += 1
        return Slot([page_aligned(n) for n in self.buffer_bytes])

    def settle(self, slot: Slot, key: Key) -> None:
        """This slot will hold this expert."""
        assert key not in self.residents
        slot.key = key
        self.residents[key] = slot

    def clear(self, slot: Slot) -> None:
        """Drop what a slot holds; nothing is written back, the disk still has it."""
        assert slot.lent == 0
        assert slot.key is not None
        del self.residents[slot.key]
        slot.key, slot.filling, slot.guessed, slot._ready = None, None, False, False
        self._free.append(slot)


def page_aligned(n_bytes: int) -> Tensor:
    """Zeroed memory of its own, uint8, in large pages where the kernel gives them."""
    if sys.platform == "win32":
        return torch.frombuffer(mmap.mmap(-1, n_bytes), dtype=torch.uint8)
    # Private, because Linux as it comes gives huge pages to private memory only.
    pages = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # 4 KiB pages cost up to 13 % of read bandwidth; a kernel built without larger ones refuses.
        with contextlib.suppress(OSError):
            pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)
