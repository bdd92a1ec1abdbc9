"""Room on a GPU for experts that are passing through: one set arrives while another is used.

Knows:        which set may be written, where its experts' parts are.
Ignorant of:  which experts, tokens, what the bits mean.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lowmoe.experts.pinned_ring import PinnedRing, Sending
from lowmoe.experts.to_gpu import ADDRESS_BYTES, ExpertPlaces
from lowmoe.kernels.gpu import Event, Gpu
from quant.layout import MAX_PLANES

N_SETS = 2
# Of a set, which has at most a quarter of a layer: enough that a launch has work for a whole card,
# little beside 24 GB.
SET_BYTES = 256 * 2**20


@dataclass(slots=True)
class _Set:
    """memory: [n, stride]; table, mirror: [E, 3] on the GPU and in memory to copy from.

    used: after the work that reads it; arrived: after what was copied to it last.
    """

    memory: Tensor
    table: Tensor
    mirror: Tensor
    used: Event | None = None
    arrived: Event | None = None


class Staging:
    """n_staged: how many experts a set has room for; n_parts: of each; expert_bytes: of those."""

    def __init__(
        self, part_bytes: tuple[int, ...], n_experts: int, gpu: Gpu, ring: PinnedRing
    ) -> None:
        """n_experts: the most of any layer."""
        self._places, self._gpu, self._ring = ExpertPlaces(part_bytes), gpu, ring
        self.n_parts, self.expert_bytes, self._next = len(part_bytes), sum(part_bytes), 0
        self.n_staged = _n_staged(part_bytes, n_experts)
        shape, stride = (n_experts, MAX_PLANES), self._places.stride
        self._sets = [
            _Set(
                torch.empty(self.n_staged, stride, dtype=torch.uint8, device=gpu.place),
                torch.zeros(shape, dtype=torch.int64, device=gpu.place),
                gpu.staging(n_experts * MAX_PLANES * ADDRESS_BYTES).view(torch.int64).view(shape),
            )
            for _ in range(N_SETS)
        ]

    @staticmethod
    def needed_bytes(part_bytes: tuple[int, ...], n_experts: int) -> int:
        """GPU memory that it takes."""
        room = _n_staged(part_bytes, n_experts) * ExpertPlaces(part_bytes).stride
        return N_SETS * (room + n_experts * MAX_PLANES * ADDRESS_BYTES)

    @contextmanager
    def passage(self, experts: Mapping[int, Sequence[Tensor]]) -> Iterator["Passage"]:
        """Begin to bring experts of a layer; their parts in RAM are read until the block ends."""
        passage = Passage(self, experts)
        try:
            yield passage
        finally:
            passage.join()

    def bring(self, experts: Sequence[tuple[int, Sequence[Tensor]]]) -> "_Brought":
        """Begin to copy at most n_staged experts, and the table that says where they are."""
        room = self._sets[self._next]
        self._next = (self._next + 1) % N_SETS
        sending = self._ring.begin(partial(self._send, room, experts), room.used)
        return _Brought(room, sending, len(experts))

    def _send(self, room: _Set, experts: Sequence[tuple[int, Sequence[Tensor]]]) -> None:
        if room.arrived is not None:
            room.arrived.wait()  # for the mirror: long ago, for what came with it was used
        room.mirror.zero_()
        for place, (expert_id, parts) in zip(room.memory, experts, strict=False):
            self._ring.send(self._places.of(place), parts)
            addresses = torch.tensor(self._places.addresses(place))
            room.mirror[expert_id, : self.n_parts] = addresses
        self._ring.copies.copy(room.table, room.mirror)
        room.arrived = self._ring.copies.event()

    def arrived(self, brought: "_Brought") -> Tensor:
        """The table that work asked for from now on finds them in, and no others."""
        self._gpu.wait_for(brought.sending.event())
        return brought.room.table

    def done(self, brought: "_Brought") -> None:
        """All work on them has been asked for."""
        brought.room.used = self._gpu.event()


@dataclass(frozen=True, slots=True)
class _Brought:
    room: _Set
    sending: Sending
    n_experts: int


class Passage:
    """Experts of one layer that pass through, as many at a time as there is room for.

    sendings: those begun so far, each with its number of experts.
    """

    def __init__(self, staging: Staging, experts: Mapping[int, Sequence[Tensor]]) -> None:
        self._staging, every = staging, list(experts.items())
        firsts = range(0, len(every), staging.n_staged)
        self._rest = deque(every[first : first + staging.n_staged] for first in firsts)
        self._begun: deque[_Brought] = deque()
        self.sendings: list[tuple[Sending, int]] = []
        for _ in range(N_SETS):
            self._begin_next()

    def tables(self) -> Iterator[Tensor]:
        """Where some of the experts are, for work that is asked for before the next is taken."""
        while self._begun:
            brought = self._begun.popleft()
            yield self._staging.arrived(brought)
            self._staging.done(brought)
            self._begin_next()

    def join(self) -> None:
        """Wait until nothing reads from RAM any more."""
        for sending, _ in self.sendings:
            sending.join()

    def _begin_next(self) -> None:
        if self._rest:
            brought = self._staging.bring(self._rest.popleft())
            self._begun.append(brought)
            self.sendings.append((brought.sending, brought.n_experts))


def _n_staged(part_bytes: tuple[int, ...], n_experts: int) -> int:
    return max(1, min(n_experts // 4, SET_BYTES // ExpertPlaces(part_bytes).stride))
