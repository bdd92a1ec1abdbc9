"""The lowest tier: experts on disk, in a model folder or in a checkpoint.

Knows:        how to fill an expert's buffers from files, who names a checkpoint's tensors.
Ignorant of:  who asks, how many buffers there are, when.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lowmoe.checkpoint.files import ALIGNMENT
from lowmoe.checkpoint.folder import ModelFolder
from lowmoe.checkpoint.tensors import CheckpointFiles
from lowmoe.families import Family
from lowmoe.spec import Piece, Role
from quant.expert import PlainFormat
from quant.layout import round_up


class ExpertSource(Protocol):
    """Where experts are read from; called from several threads at once."""

    @property
    def buffer_bytes(self) -> tuple[int, ...]:
        """The size of each buffer that one expert fills, page-aligned sizes."""

    def read(self, layer_id: int, expert_id: int, buffers: list[Tensor]) -> int:
        """Fill the buffers, [buffer_bytes] uint8 each.  Returns the bytes read from disk."""


@dataclass(frozen=True, slots=True)
class CoarseFirst:
    """An expert in two reads.  first: of its first parts; rest: of the others."""

    first: ExpertSource
    rest: ExpertSource

    @property
    def n_first(self) -> int:
        """Of how many parts its first read is."""
        return len(self.first.buffer_bytes)


class FolderExperts:
    """Experts of a model folder, in some or all of the parts it holds."""

    def __init__(
        self, folder: ModelFolder, parts: tuple[str, ...], part_bytes: tuple[int, ...]
    ) -> None:
        self._folder, self._parts = folder, parts
        self.buffer_bytes = tuple(round_up(n, ALIGNMENT) for n in part_bytes)

    def read(self, layer_id: int, expert_id: int, buffers: list[Tensor]) -> int:
        """Fill the buffers, one a part."""
        return self._folder.read_expert(layer_id, expert_id, self._parts, buffers)


class CheckpointExperts:
    """Unquantized experts, straight from a checkpoint, in the dtype asked for."""

    def __init__(self, checkpoint: CheckpointFiles, family: Family, dtype: torch.dtype) -> None:
        experts = family.spec.uniform_experts()
        self._gated = experts.gated
        self.format = PlainFormat(family.spec.n_hidden, experts.n_inner, dtype, gated=experts.gated)
        self._checkpoint, self._family = checkpoint, family.as_found(checkpoint.names())
        self.buffer_bytes = tuple(round_up(n, ALIGNMENT) for n in self.format.part_bytes)

    def read_matrices(self, layer_id: int, expert_id: int) -> tuple[Tensor | None, Tensor, Tensor]:
        """gate [I, H], None where there is none, up [I, H] and down [H, I], in the dtype of the
        file, float32 if packed.
        """
        read = [self._checkpoint.read_piece(p) for p in self._pieces(layer_id, expert_id)]
        return read[0] if self._gated else None, read[-2], read[-1]

    def _pieces(self, layer_id: int, expert_id: int) -> list[Piece]:
        names = ("gate", "up", "down") if self._gated else ("up", "down")
        return [self._family.piece(Role(name, layer_id, expert_id)) for name in names]

    @property
    def reading_bytes(self) -> int:
        """What a read holds beside its buffer: a matrix in float32, and what it is made of."""
        return 2 * 4 * self.format.n_hidden * self.format.n_inner

    def read(self, layer_id: int, expert_id: int, buffers: list[Tensor]) -> int:
        """Fill the one buffer, a matrix at a time."""
        pieces = self._pieces(layer_id, expert_id)
        self.format.fill(buffers[0], map(self._checkpoint.read_piece, pieces))
        return sum(map(self._checkpoint.stored_bytes, pieces))
