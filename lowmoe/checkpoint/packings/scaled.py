"""8-bit weights with a scale for each block, row or tensor.

    weight        [n, k] or [E, n, k], 8-bit floats (e4m3) or whole numbers
    weight_scale  [ceil(n / a), ceil(k / b)] for blocks of a x b; the last of them may be cut short
    w[r][c] = weight[r][c] * scale[r / a][c / b]

Also where they are called weight_scale_inv: both multiply.
Source: deepseek-ai/DeepSeek-V3, inference/fp8_cast_bf16.py and kernel.py; compressed-tensors,
naive_quantized; LLM.int8, arXiv 2208.07339.

Knows:        scales of blocks, rows and tensors.
Ignorant of:  which models use which.
"""

from collections.abc import Container, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowmoe.checkpoint.packings.codes import from_e4m3, is_e4m3_nan
from lowmoe.checkpoint.packings.packing import (
    SCALE_DTYPES,
    PackedWeight,
    Weight,
    chunks,
    groups,
)
from lowmoe.errors import CheckpointError

E4M3, INT8 = "F8_E4M3", "I8"
POWERS = "F8_E8M0"  # scales that are powers of two

# Rows and columns of a block; None for all there are.
Block = tuple[int | None, int | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaledPacking:
    """blocks: sizes that scales may be for; suffix: of the scales' name; dtypes: of the weights."""

    blocks: tuple[Block, ...]
    suffix: str
    dtypes: tuple[str, ...] = (E4M3,)

    def stored(self, name: str, names: Container[str]) -> tuple[str, ...]:
        """The weight under its own name, its scales, and zeros where there are any."""
        if not (name in names and name + self.suffix in names):
            return ()
        zeros = name + "_zero_point"
        return (name, name + self.suffix, *((zeros,) if zeros in names else ()))

    def open(self, weight: Weight) -> PackedWeight:
        """Raises CheckpointError unless the scales are those of one of the blocks."""
        entry = weight.require(weight.name, self.dtypes, weight.shape)
        if len(weight.shape) not in (2, 3):
            raise weight.damaged(
                f"has scales and {len(weight.shape)} dimensions", "matrices have them"
            )
        scale = weight.files.entry(weight.name + self.suffix)
        block = self._block(weight, scale.shape)
        weight.require(weight.name + self.suffix, (*SCALE_DTYPES, POWERS), scale.shape)
        zeros = weight.name + "_zero_point"
        if zeros in weight.files:
            weight.require(zeros, (entry.dtype,), scale.shape)
        return _ScaledWeight(weight, weight.name + self.suffix, zeros, block)

    def _block(self, weight: Weight, found: tuple[int, ...]) -> Block:
        for block in self.blocks:
            if block == (None, None):
                if all(n == 1 for n in found):
                    return block
            elif found == (*weight.shape[:-2], *_grid(weight.shape, block)):
                return block
        sizes = " or ".join(_words(block) for block in self.blocks)
        raise CheckpointError(
            f"{weight.name + self.suffix} is {list(found)}, but scales for {sizes} of a weight of "
            f"{list(weight.shape)} are needed. The weights and config.json look like different "
            "models; download both again."
        )


@dataclass(frozen=True, slots=True)
class _ScaledWeight:
    weight: Weight
    scale: str
    zeros: str
    block: Block

    def rows(self, first: int, count: int) -> Tensor:
        """Rows of a matrix, or matrices of a stack."""
        files, shape = self.weight.files, self.weight.shape
        codes = files.read_stored(self.weight.name, first, count)
        scale = self._part(self.scale, first, count)
        zeros = self._part(self.zeros, first, count) if self.zeros in files else None
        out = torch.empty(count, *shape[1:])
        if len(shape) == 2:
            self._decode(out, codes, scale, zeros, first)
            return out
        for i in range(count):
            # One scale for all of a stack stays one for each.
            which = 0 if self.block == (None, None) else i
            self._decode(out[i], codes[i], scale[which], None if zeros is None else zeros[which], 0)
        return out

    def _part(self, name: str, first: int, count: int) -> Tensor:
        """The scales of these rows, float32; of one scale for all, a view with enough axes."""
        files, shape = self.weight.files, self.weight.shape
        if self.block == (None, None):
            return files.read_whole(name).to(torch.float32).view((1,) * len(shape))
        if len(shape) == 3:
            return files.read_stored(name, first, count).to(torch.float32)
        size = self.block[0] or shape[0]
        start, end = first // size, groups(first + count, size)
        return files.read_stored(name, start, end - start).to(torch.float32)

    def _decode(
        self, out: Tensor, codes: Tensor, scale: Tensor, zeros: Tensor | None, first: int
    ) -> None:
        """Some rows of a matrix.  first: which of the matrix; scale: of its block and further."""
        size = self.block[0] or self.weight.shape[-2]
        before = first // size
        for start, end in chunks(0, *codes.shape):
            numbers = self._numbers(codes[start:end])
            blocks = (torch.arange(first + start, first + end) // size) - before
            of_rows = scale[blocks]
            if zeros is not None:
                numbers -= _over_columns(zeros[blocks], numbers.shape[1], self.block[1])
            _scale_columns(numbers, of_rows, self.block[1])
            out[start:end] = numbers

    def _numbers(self, codes: Tensor) -> Tensor:
        if codes.dtype == torch.int8:
            return codes.to(torch.float32)
        octets = codes.view(torch.uint8)
        if is_e4m3_nan(octets):
            raise self.weight.damaged("holds NaN", "weights are finite numbers")
        return from_e4m3(octets)


def scale_rows(codes: Tensor, scale: Tensor) -> Tensor:
    """Whole numbers with a scale a row.  codes: [n, k] int8; scale: [n] float32."""
    out = torch.empty(codes.shape)
    for start, end in chunks(0, *codes.shape):
        torch.mul(codes[start:end].to(torch.float32), scale[start:end, None], out=out[start:end])
    return out


def _scale_columns(numbers: Tensor, scale: Tensor, size: int | None) -> None:
    """Multiply [n, k] by scales [n, G] of runs of columns, the last of which may be short."""
    n_columns = numbers.shape[1]
    if size is None or size >= n_columns:
        numbers *= scale
        return
    whole = n_columns // size
    runs = numbers[:, : whole * size].unflatten(1, (whole, size))
    runs *= scale[:, :whole, None]
    if n_columns % size:
        numbers[:, whole * size :] *= scale[:, whole:]


def _over_columns(values: Tensor, n_columns: int, size: int | None) -> Tensor:
    if size is None or size >= n_columns:
        return values
    return values.repeat_interleave(size, dim=1)[:, :n_columns]


def _grid(shape: Sequence[int], block: Block) -> tuple[int, int]:
    return groups(shape[-2], block[0]), groups(shape[-1], block[1])


def _words(block: Block) -> str:
    if block == (None, None):
        return "the whole tensor"
    return " x ".join("all" if n is None else str(n) for n in block)
