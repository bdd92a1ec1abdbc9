"""What the CPU's kernel for many tokens says: the bits that tiles on a card must have.

Knows:        the native kernel, what it asks of its operands.
Ignorant of:  CUDA.
"""

import torch
from torch import Tensor

from cuda_ext import ops
from cuda_ext.launches import COUNTER_BYTES, tiles
from lowmoe.kernels.cpu import _native
from quant.layout import BLOCK_COLUMNS, REGION_ALIGNMENT, PlaneLayout
from tests.cuda_ext.samples import SCALE_UNIT, TABLE

FEWEST_TOKENS = ops.MOST_DECODED + 1  # that tiles are for


def _aligned(plane: Tensor) -> Tensor:
    """The same bytes where the CPU's kernels, which ask for it, find them aligned."""
    room = torch.empty(plane.shape[0] + REGION_ALIGNMENT, dtype=torch.uint8)
    start = -room.data_ptr() % REGION_ALIGNMENT
    return room[start : start + plane.shape[0]].copy_(plane)


def cpu_tiles(
    planes: tuple[Tensor, ...], layout: PlaneLayout, codes: Tensor, scales: Tensor
) -> Tensor:
    """What the CPU's kernel for many tokens says of any number of tokens, [T, padded rows]."""
    few = max(0, FEWEST_TOKENS - codes.shape[0])  # fewer are multiplied otherwise
    codes, scales = (torch.nn.functional.pad(x, (0, 0, 0, few)) for x in (codes, scales))
    y = torch.empty(codes.shape[0], layout.padded_rows)
    _native.multiply_blocks(
        isa="scalar",
        planes=[_aligned(plane) for plane in planes],
        n_out=layout.n_out,
        n_in=layout.n_in,
        table=(TABLE.int() + 64).to(torch.uint8),
        scale_unit=SCALE_UNIT,
        codes=codes,
        scales=scales,
        sums=codes.view(codes.shape[0], -1, BLOCK_COLUMNS).sum(2, dtype=torch.int32),
        first_block=0,
        y=y,
    )
    return y[: y.shape[0] - few]


def workspace(
    n_tokens: int = 0, n_hidden: int = 0, n_active: int = 0, n_multiprocessors: int = 4
) -> Tensor:
    """Beyond its counters it may hold anything: NaN."""
    n_bytes = tiles.workspace_bytes(n_multiprocessors, n_tokens, n_hidden, 0, n_active)
    space = torch.full((n_bytes,), 255, dtype=torch.uint8)
    space[:COUNTER_BYTES] = 0
    return space
