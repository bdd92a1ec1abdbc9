"""Reads trellis planes: bytes in, weights out. Slow and right; every kernel is held to it.

Knows:        the trellis code's parameters and table, how windows become weights.
Ignorant of:  how codes were chosen, Hadamard transforms, files.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from quant.layout import (
    BLOCK_COLUMNS,
    BLOCK_ROWS,
    SCALE_LEVELS,
    SLICES,
    SYMBOL_BITS,
    WORDS,
    PlaneLayout,
)

# Trained by Lloyd iterations on a Gaussian source coded by this very trellis, then rounded to
# 7 bits, which costs nothing (.07918 against .07919) and lets AVX2's maddubs never saturate.
WINDOW_6_TABLE = (
    -63, -17, 1, 22, -6, -28, 38, 12, 6, 24, -42, -11, 40, 14, -4, -23,
    -19, -41, 19, 0, -26, -7, 11, 39, 28, 6, -12, -29, 16, 53, -22, -2,
    2, 23, -44, -18, 32, 10, -7, -27, -33, -12, 6, 25, -2, -19, 43, 18,
    24, 2, -14, -51, 10, 35, -23, -7, -10, -37, 25, 6, -28, -4, 13, 62,
)  # fmt: skip
TABLE_LIMIT = 63


@dataclass(frozen=True, slots=True)
class TrellisCode:
    """The parameters of a trellis code, as a folder's manifest keeps them.

    window_bits: bits of the word that choose a weight, 2 new ones and the rest shared with its
    neighbours; table: 2**window_bits signed 7-bit values; table_unit: the weight that 1 in the
    table stands for where the scale is 1, so that a unit Gaussian is coded at scale 1.
    """

    window_bits: int = 6
    group_size: int = BLOCK_COLUMNS
    table: tuple[int, ...] = WINDOW_6_TABLE
    table_unit: float = 2.65267 / TABLE_LIMIT

    def __post_init__(self) -> None:
        if not 2 * SYMBOL_BITS <= self.window_bits <= 10:
            raise ValueError(f"window_bits is {self.window_bits}, but 4 to 10 are implemented")
        if self.group_size != BLOCK_COLUMNS:
            raise ValueError(f"group_size is {self.group_size}, but {BLOCK_COLUMNS} is implemented")
        if len(self.table) != 2**self.window_bits:
            raise ValueError(
                f"the table has {len(self.table)} values, but a window of {self.window_bits} bits "
                f"needs {2**self.window_bits}"
            )
        if max(map(abs, self.table)) > TABLE_LIMIT or not 0 < self.table_unit < float("inf"):
            raise ValueError(f"table values must lie in ±{TABLE_LIMIT} and their unit be positive")

    @property
    def scale_unit(self) -> float:
        """What row_scale * nibble * table value is multiplied by to give a plane's weight."""
        return self.table_unit / SCALE_LEVELS


DEFAULT_CODE = TrellisCode()


def group_scales(plane: Tensor, layout: PlaneLayout) -> Tensor:
    """The 4-bit scale of every (row, 64 columns), [padded_rows, column_blocks] uint8, 0 to 15."""
    start = layout.group_scale_offset
    packed = plane[start : start + layout.group_scale_bytes]
    packed = packed.view(layout.row_blocks, layout.column_blocks, BLOCK_ROWS // 2)
    nibbles = torch.cat([packed & 15, packed >> 4], dim=2)  # [row_blocks, column_blocks, 64]
    return nibbles.transpose(1, 2).reshape(layout.padded_rows, layout.column_blocks)


def row_scales(plane: Tensor, layout: PlaneLayout) -> Tensor:
    """The scale of every row, [padded_rows] float16."""
    start = layout.row_scale_offset
    return plane[start : start + layout.row_scale_bytes].view(torch.float16)


def gain(plane: Tensor, layout: PlaneLayout) -> float:
    """What the weights of a stack that ends with this plane are to be multiplied by."""
    start = layout.gain_offset
    return float(plane[start : start + 4].view(torch.float32))


def table_values(plane: Tensor, layout: PlaneLayout, code: TrellisCode) -> Tensor:
    """The table value of every weight, [padded_rows, padded_columns] int8: the integer part.

    plane: [plane_bytes] uint8.
    """
    code_bytes = plane[: layout.code_bytes].view(-1, 8)
    # Four neighbouring columns share all but their first and last bits: byte q of a word and the
    # low bits of byte q + 1 hold their windows, so one look-up in a table of quads gives all four.
    windows = code_bytes.to(torch.int32)
    windows = windows | windows.roll(-1, dims=1) << 8
    windows &= 2 ** (3 * SYMBOL_BITS + code.window_bits) - 1
    blocks = windows.view(layout.row_blocks, layout.column_blocks, SLICES, WORDS, 4, 2)
    #        [row_blocks, 4, words, 2, column_blocks, slices]: rows and quads of columns, in order
    in_order = blocks.permute(0, 4, 3, 5, 1, 2).reshape(-1)
    quads = _quad_table(code).index_select(0, in_order)
    return quads.view(torch.int8).view(layout.padded_rows, layout.padded_columns)


@functools.lru_cache(maxsize=8)
def _quad_table(code: TrellisCode) -> Tensor:
    """[2**(6 + window_bits)] int32, each the four int8 table values of four windows in a row."""
    bits = torch.arange(2 ** (3 * SYMBOL_BITS + code.window_bits))
    shifts = SYMBOL_BITS * torch.arange(4)
    windows = bits[:, None] >> shifts & (2**code.window_bits - 1)
    table = torch.tensor(code.table, dtype=torch.int8)
    return table[windows].contiguous().view(torch.int32).flatten()


def decode_plane(plane: Tensor, layout: PlaneLayout, code: TrellisCode) -> Tensor:
    """The weights that one plane codes, [padded_rows, padded_columns] float32."""
    scales = group_scales(plane, layout).float() * row_scales(plane, layout).float()[:, None]
    weights = table_values(plane, layout, code).float()
    groups = weights.view(layout.padded_rows, layout.column_blocks, BLOCK_COLUMNS)
    groups *= (scales * code.scale_unit)[:, :, None]
    return weights


def decode_planes(planes: tuple[Tensor, ...], layout: PlaneLayout, code: TrellisCode) -> Tensor:
    """The weights that a stack of planes codes together, [padded_rows, padded_columns] float32.

    Of least squared error; what multiplies activations has `gain` on top, see quant/matrix.py.
    """
    weights = decode_plane(planes[0], layout, code)
    for plane in planes[1:]:
        weights += decode_plane(plane, layout, code)
    return weights
