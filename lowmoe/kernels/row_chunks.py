"""Cuts a matrix into rows, so that few weights at a time are decoded, whatever its size.

Knows:        where a run of rows lies in the bytes of each format, how large a chunk is.
Ignorant of:  what chunks are multiplied with.
"""

import math
from collections.abc import Iterator

import torch

from quant.layout import BLOCK_ROWS, PlaneLayout
from quant.matrix import Matrix, Nf4Matrix, TrellisMatrix
from quant.nf4 import BLOCK_WEIGHTS, SCALES_BLOCK, Nf4Layout

# Two planes of 4096 x 4096 on two cores: 38 ms with 2**20 and 2**22, 55 with 2**18, 92 with 2**24.
CHUNK_WEIGHTS = 2**20


def row_chunks(matrix: Matrix) -> Iterator[tuple[int, Matrix]]:
    """(first row, the matrix of some rows), from top to bottom."""
    if isinstance(matrix, TrellisMatrix):
        n_out, n_in, step = matrix.n_out, matrix.layout.n_in, BLOCK_ROWS
    elif isinstance(matrix, Nf4Matrix):
        n_out, n_in = matrix.n_out, matrix.layout.n_in
        step = _nf4_step(n_in)
    else:
        (n_out, n_in), step = matrix.shape, 1
    n_rows = _rows(n_in, step)
    for first in range(0, n_out, n_rows):
        yield first, _cut(matrix, first, min(first + n_rows, n_out))


def most_chunk_weights(n_out: int, n_in: int) -> int:
    """The most weights, padding included, in a chunk of such a matrix in any format."""
    rows = min(n_out, max(_rows(n_in, step) for step in (1, BLOCK_ROWS, _nf4_step(n_in))))
    layout = PlaneLayout(rows, n_in)
    return layout.padded_rows * layout.padded_columns


def _rows(n_in: int, step: int) -> int:
    return max(step, CHUNK_WEIGHTS // n_in // step * step)


def _nf4_step(n_in: int) -> int:
    """Rows after which a second-level block of nf4's scales ends: they lie one after the other."""
    whole = BLOCK_WEIGHTS * SCALES_BLOCK
    return whole // math.gcd(n_in, whole)


def _cut(matrix: Matrix, first: int, end: int) -> Matrix:
    if isinstance(matrix, TrellisMatrix):
        if (first, end) == (0, matrix.n_out):
            return matrix
        blocks = slice(first // BLOCK_ROWS, -(-end // BLOCK_ROWS))
        return matrix.of_row_blocks(blocks, end - first)
    if isinstance(matrix, Nf4Matrix):
        return _nf4_rows(matrix, first, end)
    return matrix[first:end]


def _nf4_rows(matrix: Nf4Matrix, first: int, end: int) -> Nf4Matrix:
    layout, old = matrix.layout, matrix.buffer
    few = Nf4Layout(end - first, layout.n_in)
    n_before = first * layout.n_in
    new = torch.zeros(few.matrix_bytes, dtype=torch.uint8)
    new[: few.code_bytes] = old[n_before // 2 :][: few.code_bytes]
    new[few.absmax_offset :][: few.n_blocks] = old[
        layout.absmax_offset + n_before // BLOCK_WEIGHTS :
    ][: few.n_blocks]
    scales = old[layout.second_offset :][: (layout.second_count + 1) * 4].view(-1, 4)
    begin = n_before // (BLOCK_WEIGHTS * SCALES_BLOCK)
    kept = torch.cat([scales[begin : begin + few.second_count], scales[-1:]]).flatten()
    new[few.second_offset :][: kept.numel()] = kept
    return Nf4Matrix(few, new)
