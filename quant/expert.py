"""One expert as bytes: gate, up and down, in each of the formats a folder can hold.

An expert is y = down (act(gate x) * (up x)), gate and up [I, H], down [H, I], or without a gate
y = down act(up x): then there is only up wherever gate and up are named. Its bytes come in parts,
one for each plane; a format without planes has one part. Parts are what the store moves:

    trellis  part p = plane p of gate|up, then plane p of down
    nf4      gate, up, down
    plain    gate, up, down in bfloat16, float16 or float32

In a trellis plane gate and up are one matrix whose 64-row blocks alternate, gate first, so that
one stream of words feeds both halves of an activation. Both are padded to whole blocks.

Knows:        what an expert's bytes are and how to read them.
Ignorant of:  where they are kept, which expert it is, what it is an expert of.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from quant import nf4
from quant.encode import Encode, encode_planes
from quant.layout import BLOCK_ROWS, REGION_ALIGNMENT, PlaneLayout, round_up
from quant.matrix import Matrix, Nf4Matrix, TrellisMatrix
from quant.trellis import TrellisCode


@dataclass(frozen=True, slots=True)
class Expert:
    """An expert ready for use. gate_up: [2 * gate rows, H], see `blocked`; down: [H, I].

    blocked: gate_up's 64-row blocks alternate gate, up; else its first half is gate; gated: else
    gate_up is up alone, in either case the first I of its rows.
    """

    gate_up: Matrix
    down: Matrix
    n_inner: int
    blocked: bool
    gated: bool = True

    def split(self, both: Tensor) -> tuple[Tensor, Tensor | None]:
        """What is activated, and what multiplies it, None where nothing does: gate x and up x, or
        up x alone, out of gate_up x.  both: [T, gate_up rows].  Returns [T, I] each.
        """
        if not self.gated:
            return both[:, : self.n_inner], None
        if not self.blocked:
            return both[:, : self.n_inner], both[:, self.n_inner :]
        halves = both.view(both.shape[0], -1, 2, BLOCK_ROWS)
        gate, up = (halves[:, :, h].reshape(both.shape[0], -1) for h in (0, 1))
        return gate[:, : self.n_inner], up[:, : self.n_inner]


@dataclass(frozen=True, slots=True, kw_only=True)
class InputCovariances:
    """Covariances of what gate and up, and down, multiply; see encode_planes.  None: unknown."""

    gate_up: Tensor | None = None
    down: Tensor | None = None


NO_COVARIANCES = InputCovariances()


class ExpertFormat(Protocol):
    """How the bytes of every expert of one layer are to be read."""

    @property
    def part_bytes(self) -> tuple[int, ...]:
        """The size of each part."""

    def pack(
        self,
        gate: Tensor | None,
        up: Tensor,
        down: Tensor,
        d_in: Tensor,
        d_inner: Tensor,
        *,
        encode: Encode = encode_planes,
        inputs: InputCovariances = NO_COVARIANCES,
    ) -> list[Tensor]:
        """The parts of an expert, uint8 each.  d_in [H], d_inner [I]: its input transforms.

        gate: None for an expert without one, which the format must be for.
        """

    def open(self, parts: tuple[Tensor, ...], d_in: Tensor, d_inner: Tensor) -> Expert:
        """An expert over its parts, nothing copied; fewer parts than written mean fewer planes."""


@dataclass(frozen=True, slots=True)
class TrellisFormat:
    """Planes of 2 bits a weight."""

    n_hidden: int
    n_inner: int
    n_planes: int
    code: TrellisCode
    gated: bool = True

    @property
    def gate_up(self) -> PlaneLayout:
        n_rows = round_up(self.n_inner, BLOCK_ROWS)
        return PlaneLayout(n_rows * (2 if self.gated else 1), self.n_hidden)

    @property
    def down(self) -> PlaneLayout:
        return PlaneLayout(self.n_hidden, self.n_inner)

    @property
    def part_bytes(self) -> tuple[int, ...]:
        return (self.gate_up.plane_bytes + self.down.plane_bytes,) * self.n_planes

    def pack(
        self,
        gate: Tensor | None,
        up: Tensor,
        down: Tensor,
        d_in: Tensor,
        d_inner: Tensor,
        *,
        encode: Encode = encode_planes,
        inputs: InputCovariances = NO_COVARIANCES,
    ) -> list[Tensor]:
        wide = _wide(gate, up, gated=self.gated)
        n_rows = self.gate_up.n_out // len(wide)
        both = torch.zeros(len(wide), n_rows, self.n_hidden, dtype=up.dtype)
        for half, weights in zip(both, wide, strict=True):
            half[: self.n_inner] = weights
        blocks = both.view(len(wide), -1, BLOCK_ROWS, self.n_hidden).transpose(0, 1)
        blocks = blocks.reshape(self.gate_up.n_out, self.n_hidden)
        stacks = [
            encode(blocks, d_in, self.gate_up, self.code, self.n_planes, inputs.gate_up),
            encode(down, d_inner, self.down, self.code, self.n_planes, inputs.down),
        ]
        return [torch.cat(parts) for parts in zip(*stacks, strict=True)]

    def open(self, parts: tuple[Tensor, ...], d_in: Tensor, d_inner: Tensor) -> Expert:
        cut = self.gate_up.plane_bytes
        end = cut + self.down.plane_bytes
        return Expert(
            TrellisMatrix(self.gate_up, self.code, tuple(p[:cut] for p in parts), d_in),
            TrellisMatrix(self.down, self.code, tuple(p[cut:end] for p in parts), d_inner),
            self.n_inner,
            blocked=True,
            gated=self.gated,
        )


@dataclass(frozen=True, slots=True)
class Nf4Format:
    """bitsandbytes' 4-bit normal floats, for comparison."""

    n_hidden: int
    n_inner: int
    gated: bool = True

    @property
    def gate_up(self) -> nf4.Nf4Layout:
        return nf4.Nf4Layout(self.n_inner * (2 if self.gated else 1), self.n_hidden)

    @property
    def down(self) -> nf4.Nf4Layout:
        return nf4.Nf4Layout(self.n_hidden, self.n_inner)

    @property
    def part_bytes(self) -> tuple[int, ...]:
        return (self.gate_up.matrix_bytes + self.down.matrix_bytes,)

    def pack(
        self,
        gate: Tensor | None,
        up: Tensor,
        down: Tensor,
        d_in: Tensor,
        d_inner: Tensor,
        *,
        encode: Encode = encode_planes,
        inputs: InputCovariances = NO_COVARIANCES,
    ) -> list[Tensor]:
        wide = torch.cat(_wide(gate, up, gated=self.gated))
        return [torch.cat([nf4.encode(wide), nf4.encode(down)])]

    def open(self, parts: tuple[Tensor, ...], d_in: Tensor, d_inner: Tensor) -> Expert:
        cut = self.gate_up.matrix_bytes
        end = cut + self.down.matrix_bytes
        return Expert(
            Nf4Matrix(self.gate_up, parts[0][:cut]),
            Nf4Matrix(self.down, parts[0][cut:end]),
            self.n_inner,
            blocked=False,
            gated=self.gated,
        )


@dataclass(frozen=True, slots=True)
class PlainFormat:
    """Unquantized weights in a float dtype."""

    n_hidden: int
    n_inner: int
    dtype: torch.dtype
    gated: bool = True

    @property
    def _gate_up_rows(self) -> int:
        return self.n_inner * (2 if self.gated else 1)

    @property
    def _gate_up_bytes(self) -> int:
        n_weights = self._gate_up_rows * self.n_hidden
        return round_up(n_weights * self.dtype.itemsize, REGION_ALIGNMENT)

    @property
    def part_bytes(self) -> tuple[int, ...]:
        return (self._gate_up_bytes + self.n_inner * self.n_hidden * self.dtype.itemsize,)

    def pack(
        self,
        gate: Tensor | None,
        up: Tensor,
        down: Tensor,
        d_in: Tensor,
        d_inner: Tensor,
        *,
        encode: Encode = encode_planes,
        inputs: InputCovariances = NO_COVARIANCES,
    ) -> list[Tensor]:
        buffer = torch.zeros(self.part_bytes[0], dtype=torch.uint8)
        self.fill(buffer, iter([*_wide(gate, up, gated=self.gated), down]))
        return [buffer]

    def fill(self, buffer: Tensor, matrices: Iterator[Tensor]) -> None:
        """Write an expert into a buffer of at least part_bytes, converting to the dtype.

        matrices: gate, if there is one, up and down; none is kept while the next is made.
        """
        gate_up, down = self._views(buffer)
        for rows in (*gate_up.split(self.n_inner), down):
            rows[:] = next(matrices)

    def _views(self, buffer: Tensor) -> tuple[Tensor, Tensor]:
        row_bytes = self.n_hidden * self.dtype.itemsize
        gate_up = buffer[: self._gate_up_rows * row_bytes].view(self.dtype)
        end = self._gate_up_bytes + self.n_inner * row_bytes
        down = buffer[self._gate_up_bytes : end].view(self.dtype)
        return gate_up.view(-1, self.n_hidden), down.view(self.n_hidden, self.n_inner)

    def open(self, parts: tuple[Tensor, ...], d_in: Tensor, d_inner: Tensor) -> Expert:
        gate_up, down = self._views(parts[0])
        return Expert(gate_up, down, self.n_inner, blocked=False, gated=self.gated)


def _wide(gate: Tensor | None, up: Tensor, *, gated: bool) -> list[Tensor]:
    """What is multiplied by an expert's input, [I, H] each."""
    assert (gate is not None) == gated
    return [up] if gate is None else [gate, up]
