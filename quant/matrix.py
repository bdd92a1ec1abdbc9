"""A matrix in any of the formats: what kernels multiply with and tests compare.

Knows:        which bytes and vectors belong together to make one matrix.
Ignorant of:  where the bytes lie, layers, models.
"""

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from quant import nf4
from quant.layout import BLOCK_ROWS, PlaneLayout
from quant.transform import restore_weights
from quant.trellis import TrellisCode, decode_planes, gain


@dataclass(frozen=True, slots=True)
class TrellisMatrix:
    """W [n_out, n_in] as a stack of planes of W / d H.

    planes: [plane_bytes] uint8 each; d: [n_in] float16, the input transform all planes share.
    """

    layout: PlaneLayout
    code: TrellisCode
    planes: tuple[Tensor, ...]
    d: Tensor

    @property
    def n_out(self) -> int:
        return self.layout.n_out

    def transformed(self) -> Tensor:
        """W / d H, what a transformed activation is multiplied with; [n_out, n_in] float32."""
        weights = decode_planes(self.planes, self.layout, self.code) * self.gain
        return weights[: self.layout.n_out, : self.layout.n_in]

    @property
    def gain(self) -> float:
        """What makes up for the code's shrinking the weights, see quant/layout.py."""
        return gain(self.planes[-1], self.layout)

    def rows(self, row_ids: Tensor) -> Tensor:
        """The weights of some rows, [len(row_ids), n_in] float32, decoding only their blocks."""
        blocks, place = torch.unique(row_ids // BLOCK_ROWS, return_inverse=True)
        weights = self.of_row_blocks(blocks, blocks.shape[0] * BLOCK_ROWS).transformed()
        return restore_weights(weights[place * BLOCK_ROWS + row_ids % BLOCK_ROWS], self.d)

    def of_row_blocks(self, blocks: Tensor | slice, n_out: int) -> "TrellisMatrix":
        """The matrix of some 64-row blocks, in the order given, of which n_out rows count."""
        few = PlaneLayout(n_out, self.layout.n_in)
        planes = tuple(_take_blocks(plane, self.layout, blocks, few) for plane in self.planes)
        return TrellisMatrix(few, self.code, planes, self.d)


def _take_blocks(
    plane: Tensor, layout: PlaneLayout, blocks: Tensor | slice, few: PlaneLayout
) -> Tensor:
    """The plane of layout `few` that has only these row blocks of `plane`'s."""
    out = torch.zeros(few.plane_bytes, dtype=torch.uint8)
    for (start, size), (to, new_size) in zip(layout.regions(), few.regions(), strict=True):
        region = plane[start : start + size].view(layout.row_blocks, -1)
        out[to : to + new_size] = region[blocks].flatten()
    out[few.gain_offset :] = plane[layout.gain_offset : layout.plane_bytes]
    return out


@dataclass(frozen=True, slots=True)
class Nf4Matrix:
    """W [n_out, n_in] as bitsandbytes' nf4; buffer: [matrix_bytes] uint8."""

    layout: nf4.Nf4Layout
    buffer: Tensor

    @property
    def n_out(self) -> int:
        return self.layout.n_out


Matrix: TypeAlias = Tensor | TrellisMatrix | Nf4Matrix  # a Tensor is the matrix itself


def dequantize(matrix: Matrix) -> Tensor:
    """The weights a matrix stands for, [n_out, n_in]; float32 unless it is a plain tensor."""
    if isinstance(matrix, TrellisMatrix):
        return restore_weights(matrix.transformed(), matrix.d)
    if isinstance(matrix, Nf4Matrix):
        return nf4.decode(matrix.buffer, matrix.layout)
    return matrix
