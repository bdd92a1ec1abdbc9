"""Every bit of an activation that is rounded to int8 to meet trellis planes.

A token x [n_in] is turned into the basis of the weights, x' = H (d * x), and rounded with one scale
for each 128 columns. n_in is padded up to a multiple of 64, with zeros:

    codes    [padded_columns]        int8      -127 to 127
    scales   [padded_columns / 128]  float32   the last of fewer columns where 64 are left
    sums     [padded_columns / 64]   int32     of the codes of each 64 columns

    x' is about  codes[k] * scales[k / 128]

Kernels give the same bits in every instruction set, so every rounding is said here, all of float32:

    d * x           d widened from float16, one product
    H               in blocks of the largest power of two up to 128 that divides n_in: for the
                    strides 1, 2, 4, ... in turn, columns k and k + stride become their sum and
                    their difference; at last one product with 1 / sqrt(block)
    amax            the largest magnitude of x' in the group
    scale           amax / 127
    code            x' * (127 / amax), to the nearest, ties to even

A group whose amax is below 2^-100 is silent: scale 0, codes 0; so 127 / amax stays finite. A group
with an infinite or NaN x' has scale NaN and codes 0, so that every product it is in is NaN.

Knows:        bits and roundings.
Ignorant of:  what the activations mean, how products are computed.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from quant.layout import BLOCK_COLUMNS, round_up
from quant.transform import hadamard_size

SCALE_COLUMNS = 128
MOST_CODE = 127
SILENCE = 2.0**-100


@dataclass(frozen=True, slots=True)
class RoundedActivations:
    """codes: [T, padded_columns] int8; scales: [T, groups] float32; sums: [T, blocks] int32."""

    codes: Tensor
    scales: Tensor
    sums: Tensor

    def values(self) -> Tensor:
        """What the codes stand for, [T, padded_columns] float32."""
        scales = self.scales.repeat_interleave(SCALE_COLUMNS, dim=1)
        return self.codes * scales[:, : self.codes.shape[1]]


def round_activations(x: Tensor, d: Tensor) -> RoundedActivations:
    """Turn and round tokens as the drawing above says.  x: [T, n_in] float, d: [n_in] float16."""
    turned = hadamard_in_order(x.float() * d.float())
    n_tokens, n_in = turned.shape
    padded = round_up(n_in, BLOCK_COLUMNS)
    n_groups = round_up(n_in, SCALE_COLUMNS) // SCALE_COLUMNS
    groups = F.pad(turned, (0, n_groups * SCALE_COLUMNS - n_in)).view(n_tokens, n_groups, -1)
    amax = groups.abs().amax(2)  # [T, groups]; NaN where one is
    finite, loud = amax.isfinite(), amax >= SILENCE
    most = torch.tensor(float(MOST_CODE))
    scales = torch.where(loud, amax / most, 0.0).where(finite, torch.nan)
    steps = torch.where(loud & finite, most / amax, 0.0)
    codes = (groups * steps[:, :, None]).round().nan_to_num(0.0).to(torch.int8)
    codes = codes.view(n_tokens, -1)[:, :padded].contiguous()
    sums = codes.view(n_tokens, -1, BLOCK_COLUMNS).sum(2, dtype=torch.int32)
    return RoundedActivations(codes, scales, sums)


def hadamard_in_order(x: Tensor) -> Tensor:
    """H x with one order of roundings.  x: [T, n_in] float32."""
    size = hadamard_size(x.shape[1])
    stride = 1
    while stride < size:
        pairs = x.reshape(-1, 2, stride)
        a, b = pairs[:, 0], pairs[:, 1]
        x = torch.stack([a + b, a - b], dim=1).view(x.shape)
        stride *= 2
    return x * torch.tensor(1 / math.sqrt(size))
