"""Chooses the codes of trellis planes natively: quant/encode.py's algorithm, many times as fast.

Knows:        what the native encoder wants, how rows coded apart become a plane.
Ignorant of:  how codes are chosen, where weights and covariances come from.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lowmoe.kernels.cpu import WINDOW_BITS, _native
from quant.encode import OWN_DEPTH_SHARE, feedback_factors, place_rows, transformed_covariance
from quant.layout import BLOCK_ROWS, PlaneLayout
from quant.transform import hadamard_size
from quant.trellis import TrellisCode

# So many weights are coded in one call: Ctrl-C is heard between two, and what is not float32 is
# converted for one. 16 M weights are a tenth of a second's work, and 64 row blocks of the widest
# matrices, enough to share among threads.
CHUNK_WEIGHTS = 2**24


@dataclass(frozen=True, slots=True, kw_only=True)
class NativeEncoder:
    """isa: one of lowmoe.kernels.cpu.isas(); threads: how many encode.

    Neither changes a byte.
    """

    isa: str
    threads: int

    def encode(
        self,
        weights: Tensor,
        d: Tensor,
        layout: PlaneLayout,
        code: TrellisCode,
        n_planes: int,
        covariance: Tensor | None = None,
    ) -> list[Tensor]:
        """What quant.encode.encode_planes does; costs that are all but equal may go the other way.

        code.window_bits: at most WINDOW_BITS.  Raises ValueError for weights that are not finite or
        too large for float16 scales.
        """
        metric = transformed_covariance(covariance, d)
        inputs = _Inputs(
            d=d.float(),
            table=_table_of_all_windows(code),
            unit=code.table_unit,
            metric=metric,
            factors=None if metric is None else feedback_factors(metric),
        )
        planes = [torch.zeros(layout.plane_bytes, dtype=torch.uint8) for _ in range(n_planes)]
        products = []
        for first, last in _row_chunks(layout):
            part = PlaneLayout(last - first, layout.n_in)
            rows, sums = self._encode_rows(weights[first:last], part, inputs, n_planes)
            for plane, of_rows in zip(planes, rows, strict=True):
                place_rows(plane, layout, of_rows, part, first)
            products.append(sums)
        _set_gains(planes, layout, torch.cat(products))
        return planes

    def _encode_rows(
        self, weights: Tensor, layout: PlaneLayout, inputs: "_Inputs", n_planes: int
    ) -> tuple[list[Tensor], Tensor]:
        """Planes without gains, and what gains need, [row blocks, 1 + planes]; see encoder.h."""
        planes = [torch.zeros(layout.plane_bytes, dtype=torch.uint8) for _ in range(n_planes)]
        products = torch.zeros(layout.row_blocks, 1 + n_planes, dtype=torch.float64)
        _native.encode(
            isa=self.isa,
            threads=self.threads,
            weights=weights.float().contiguous(),
            d=inputs.d,
            h=hadamard_size(layout.n_in),
            table=inputs.table,
            unit=inputs.unit,
            metric=inputs.metric,
            factors=inputs.factors,
            own_share=OWN_DEPTH_SHARE,
            planes=planes,
            products=products,
        )
        return planes, products


@dataclass(frozen=True, slots=True, kw_only=True)
class _Inputs:
    """What is the same for all rows; see encoder.h."""

    d: Tensor
    table: Tensor
    unit: float
    metric: Tensor | None
    factors: Tensor | None


def _row_chunks(layout: PlaneLayout) -> Iterator[tuple[int, int]]:
    """The rows of each call, [first, last): whole row blocks, whatever the threads."""
    step = max(1, CHUNK_WEIGHTS // (layout.padded_columns * BLOCK_ROWS)) * BLOCK_ROWS
    for first in range(0, layout.n_out, step):
        yield first, min(first + step, layout.n_out)


def _table_of_all_windows(code: TrellisCode) -> Tensor:
    """[2**WINDOW_BITS] int8; a narrower window is the low bits of a wider one."""
    assert code.window_bits <= WINDOW_BITS
    return torch.tensor(code.table, dtype=torch.int8).repeat(2**WINDOW_BITS // len(code.table))


def _set_gains(planes: list[Tensor], layout: PlaneLayout, products: Tensor) -> None:
    """products: [row blocks, 1 + planes]; the order of exact sums makes no difference."""
    energy, *kept = (math.fsum(blocks.tolist()) for blocks in products.unbind(1))
    for plane, product in zip(planes, kept, strict=True):
        gain = energy / product if product > 0 else 1.0
        plane[layout.gain_offset :][:4].view(torch.float32).fill_(gain)
