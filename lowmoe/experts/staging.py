"""Room on a GPU for experts that are passing through: one set arrives while another is used.

Knows:        which set may be written, where its experts' parts are.
Ignorant of:  which experts, tokens, what the bits mean.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowmoe.experts.pinned_ring import PinnedRing
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
    """n_staged: how many experts a set has room for."""

    def __init__(
        self, part_bytes: tuple[int, ...], n_experts: int, gpu: Gpu, ring: PinnedRing
    ) -> None:
        """n_experts: the most of any layer."""
        self._places, self._gpu, self._ring = ExpertPlaces(part_bytes), gpu, ring
        self._n_parts, self._next = len(part_bytes), 0
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

    def bring(self, experts: Mapping[int, Sequence[Tensor]]) -> Tensor:
        """Begin to copy at most n_staged experts of a layer from their parts in RAM.

        Returns the table that work asked for from now on finds them in, and no others; say `done`
        once it has been asked for.
        """
        room = self._sets[self._next]
        copies = self._ring.copies
        if room.arrived is not None:
            room.arrived.wait()  # for the mirror: long ago, for what came with it was used
        if room.used is not None:
            copies.wait_for(room.used)
        room.mirror.zero_()
        for place, (expert_id, parts) in zip(room.memory, experts.items(), strict=False):
            self._ring.send(self._places.of(place), parts)
            addresses = torch.tensor(self._places.addresses(place))
            room.mirror[expert_id, : self._n_parts] = addresses
        copies.copy(room.table, room.mirror)
        room.arrived = copies.event()
        self._gpu.wait_for(room.arrived)
        return room.table

    def done(self) -> None:
        """All work on what was brought last has been asked for."""
        self._sets[self._next].used = self._gpu.event()
        self._next = (self._next + 1) % N_SETS


def _n_staged(part_bytes: tuple[int, ...], n_experts: int) -> int:
    return max(1, min(n_experts // 4, SET_BYTES // ExpertPlaces(part_bytes).stride))
