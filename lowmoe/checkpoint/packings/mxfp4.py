"""4-bit floats in blocks of 32 that share a power of two: experts of a layer in one tensor.

    NAME_blocks  [E, n, k / 32, 16] uint8, two codes each, the one in the low bits first
    NAME_scales  [E, n, k / 32]     uint8, exponents with 127 added
    w[e][c][r] = value(code c of row r) * 2 ^ (scale - 127)

The model wants [E, k, n]: rows and columns change places.
Source: OCP Microscaling Formats 1.0; openai/gpt-oss, gpt_oss/torch/weights.py.

Knows:        what blocks and scales mean.
Ignorant of:  which rows of a matrix are whose.
"""

from collections.abc import Container
from dataclasses import dataclass

import torch
from torch import Tensor

from lowmoe.checkpoint.packings.codes import looked_up
from lowmoe.checkpoint.packings.packing import PackedWeight, Weight, chunks

BLOCK = 32
_SIZES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
VALUES = torch.tensor([*_SIZES, *(-size for size in _SIZES)])
NAN = 255  # as an exponent


@dataclass(frozen=True, slots=True, kw_only=True)
class Mxfp4Packing:
    """Stacks of experts' matrices."""

    def stored(self, name: str, names: Container[str]) -> tuple[str, ...]:
        """Blocks and scales."""
        both = name + "_blocks", name + "_scales"
        return both if both[0] in names or both[1] in names else ()

    def open(self, weight: Weight) -> PackedWeight:
        """Raises CheckpointError unless blocks and scales cover the weight."""
        if len(weight.shape) != 3 or weight.shape[1] % BLOCK:
            raise weight.damaged(
                f"config.json needs {list(weight.shape)}",
                f"MXFP4 stacks experts' matrices, whose inputs are blocks of {BLOCK}",
            )
        n_experts, n_in, n_out = weight.shape
        scales = n_experts, n_out, n_in // BLOCK
        weight.require(weight.name + "_blocks", ("U8",), (*scales, BLOCK // 2))
        weight.require(weight.name + "_scales", ("U8",), scales)
        return _Mxfp4Weight(weight)


@dataclass(frozen=True, slots=True)
class _Mxfp4Weight:
    weight: Weight

    def rows(self, first: int, count: int) -> Tensor:
        """Some experts, [count, k, n]."""
        _, n_in, n_out = self.weight.shape
        blocks = self.weight.files.read_stored(self.weight.name + "_blocks", first, count)
        scales = self.weight.files.read_stored(self.weight.name + "_scales", first, count)
        if bool((scales == NAN).any()):
            raise self.weight.damaged("a scale is NaN", "weights are finite numbers")
        flat, powers = blocks.view(-1, BLOCK // 2), scales.view(-1, 1)
        out = torch.empty(flat.shape[0], BLOCK)
        for start, end in chunks(0, flat.shape[0], BLOCK):
            numbers = looked_up(flat[start:end], VALUES, low_first=True)
            exponents = powers[start:end].to(torch.int32) - 127
            torch.ldexp(numbers.flatten(1), exponents, out=out[start:end])
        return out.view(count, n_out, n_in).transpose(1, 2)
