"""Slots of RAM, each the size of one expert, never more of them than the budget allows.

Knows:        buffers, which expert fills which slot, what is lent or being filled.
Ignorant of:  how slots are filled, whose turn it is to leave.
"""

from concurrent.futures import Future
from dataclasses import dataclass, field

from torch import Tensor

from lowmoe.checkpoint.buffers import Arena
from lowmoe.checkpoint.files import ALIGNMENT
from lowmoe.experts.policy import Key
from quant.layout import round_up

# Slots are made so many bytes at a time, or one by one where one is larger: see buffers.py.
ARENA_BYTES = 64 * 2**20


@dataclass(slots=True, eq=False)
class Slot:
    """Room for one expert.  filling: done once the buffers hold `key`; lent: how often lent out."""

    buffers: list[Tensor]
    key: Key | None = None
    filling: "Future[None] | None" = None
    lent: int = 0
    guessed: bool = False  # read ahead and not yet asked for
    coarse: bool = False  # only its first parts were read; refining: the others are, or were
    refining: "Future[None] | None" = None
    _ready: bool = (
        False  # once seen: asking a Future takes a lock, and this is asked at every token
    )

    @property
    def is_ready(self) -> bool:
        """Whether it holds its expert."""
        if not self._ready:
            self._ready = self.is_settled and not self.has_failed
        return self._ready

    @property
    def is_whole(self) -> bool:
        """Whether it holds all parts of its expert."""
        if self.coarse and self.refining is not None and self.refining.done():
            self.coarse = self.refining.exception() is not None
            self.refining = None
        return self.is_ready and not self.coarse

    @property
    def is_settled(self) -> bool:
        """Whether nothing is being read into it, be it that reading succeeded or failed."""
        if self.refining is not None and not self.refining.done():
            return False
        return self._ready or (self.filling is not None and self.filling.done())

    @property
    def has_failed(self) -> bool:
        if self._ready or self.filling is None or not self.filling.done():
            return False
        return self.filling.exception() is not None


@dataclass(slots=True)
class RamTier:
    """Slots, made as they are needed up to n_slots, then reused.

    buffer_bytes: the sizes of a slot's buffers; each starts where direct reads may.
    """

    buffer_bytes: tuple[int, ...]
    n_slots: int
    residents: dict[Key, Slot] = field(default_factory=dict)
    by_layer: dict[int, list[Key]] = field(default_factory=dict)  # the same, of every layer seen
    _n_made: int = 0
    _free: list[Slot] = field(default_factory=list)
    _arena: Arena | None = None
    _n_left: int = 0  # slots that still fit into the arena

    @property
    def slot_bytes(self) -> int:
        return sum(self.buffer_bytes)

    @property
    def used_bytes(self) -> int:
        return self._n_made * self.slot_bytes

    @property
    def is_full(self) -> bool:
        """Whether every slot there may be holds an expert, or is to."""
        return not self._free and self._n_made == self.n_slots

    def take_free(self) -> Slot | None:
        """An empty slot, or None when the budget is spent."""
        if self._free:
            return self._free.pop()
        if self._n_made == self.n_slots:
            return None
        if self._arena is None or self._n_left == 0:
            sizes = sum(round_up(n, ALIGNMENT) for n in self.buffer_bytes)
            n_more = min(max(1, ARENA_BYTES // sizes), self.n_slots - self._n_made)
            self._arena, self._n_left = Arena(n_more * sizes), n_more  # it may be refused the bytes
        self._n_made += 1
        self._n_left -= 1
        return Slot([self._arena.take(n, ALIGNMENT) for n in self.buffer_bytes])

    def settle(self, slot: Slot, key: Key) -> None:
        """This slot will hold this expert."""
        assert key not in self.residents
        slot.key = key
        self.residents[key] = slot
        self.by_layer.setdefault(key[0], []).append(key)

    def clear(self, slot: Slot) -> None:
        """Drop what a slot holds; nothing is written back, the disk still has it."""
        assert slot.lent == 0
        assert slot.key is not None
        del self.residents[slot.key]
        self.by_layer[slot.key[0]].remove(slot.key)
        slot.key, slot.filling, slot.guessed, slot._ready = None, None, False, False
        slot.coarse, slot.refining = False, None
        self._free.append(slot)
