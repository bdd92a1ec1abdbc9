"""Whole numbers of 2 to 8 bits in 32-bit words, with scales and zeros of groups of columns.

    w[r][c] = (code[r][c] - zero[r][g]) * scale[r][g]        g: the group of column c

GPTQ    qweight [k / p, n]   p = 32 / bits codes a word, the first in the lowest bits; columns lie
                             one below the other
        qzeros  [G, n / p]   in its first version each less one
        scales  [G, n]
        g_idx   [k]          the group of every column; without it, runs of group_size
AWQ     qweight [k, n / 8]   8 codes a word, of rows 0 2 4 6 1 3 5 7
        qzeros  [G, n / 8]   likewise
        scales  [G, n]
packed  weight_packed     [n, k / p]
        weight_scale      [n, G]
        weight_zero_point [n / p, G] words, or [n, G] whole numbers; without it, half of all codes
        weight_g_idx      [k], as above
        weight_shape      [2], n and k

Source: GPTQ, arXiv 2210.17323, as AutoGPTQ and gptqmodel store it (qlinear_cuda_old.py, torch.py);
AWQ, arXiv 2306.00978, as AutoAWQ does (awq/modules/linear/gemm.py, utils/packing_utils.py);
compressed-tensors, compressors/pack_quantized.

Knows:        where codes, zeros and scales lie.
Ignorant of:  how they were chosen.
"""

from collections.abc import Container
from dataclasses import dataclass

import torch
from torch import Tensor

from lowmoe.checkpoint.packings.codes import group_of_columns, scaled_groups, unpack
from lowmoe.checkpoint.packings.packing import (
    SCALE_DTYPES,
    PackedWeight,
    Weight,
    chunks,
    groups,
)

WORD = 32
_WEIGHT = "weight"
# Of each word of AWQ's, which code is the next row's.
_AWQ_PLACE = (0, 4, 1, 5, 2, 6, 3, 7)


def _beside(name: str, suffix: str) -> str:
    return name.removesuffix(_WEIGHT) + suffix


@dataclass(frozen=True, slots=True, kw_only=True)
class GptqPacking:
    """group_size: None for one group; less_one: whether zeros are stored less one; reordered:
    whether groups are of columns in an order of their own.
    """

    bits: int
    group_size: int | None
    less_one: bool
    reordered: bool

    def stored(self, name: str, names: Container[str]) -> tuple[str, ...]:
        """Codes, zeros and scales, and groups where they are stored."""
        if not (name.endswith("." + _WEIGHT) and _beside(name, "qweight") in names):
            return ()
        optional = ("g_idx",) if _beside(name, "g_idx") in names else ()
        return tuple(_beside(name, s) for s in ("qweight", "qzeros", "scales", *optional))

    def open(self, weight: Weight) -> PackedWeight:
        """Raises CheckpointError unless all of them cover the weight."""
        n_out, n_in = weight.require_matrix()
        per_word, n_groups = WORD // self.bits, groups(n_in, self.group_size)
        weight.require(_beside(weight.name, "qweight"), ("I32",), (-(-n_in // per_word), n_out))
        weight.require(_beside(weight.name, "qzeros"), ("I32",), (n_groups, -(-n_out // per_word)))
        weight.require(_beside(weight.name, "scales"), SCALE_DTYPES, (n_groups, n_out))
        g_idx = _beside(weight.name, "g_idx")
        if self.reordered or g_idx in weight.files:
            weight.require(g_idx, ("I32", "I64"), (n_in,))
        return _GptqWeight(weight, self)


@dataclass(frozen=True, slots=True)
class _GptqWeight:
    weight: Weight
    packing: GptqPacking

    def rows(self, first: int, count: int) -> Tensor:
        """Rows of the matrix, which are columns of the file: all of it is read."""
        files, name, bits = self.weight.files, self.weight.name, self.packing.bits
        n_in, end = self.weight.shape[1], first + count
        words = files.read_whole(_beside(name, "qzeros"))
        if self.packing.less_one:
            # To whole words, as it was taken off: a zero of 0 borrowed from the one above it.
            words += sum(1 << shift for shift in range(0, WORD, bits))
        zeros = unpack(words, bits)[:, first:end].T.to(torch.float32)
        scales = files.read_whole(_beside(name, "scales"))[:, first:end].T.to(torch.float32)
        group_of = _stored_groups(
            self.weight, _beside(name, "g_idx"), self.packing.group_size, scales.shape[1]
        )
        words = files.read_whole(_beside(name, "qweight"))[:, first:end]
        out = torch.empty(count, n_in)
        for start, stop in chunks(0, count, n_in):
            codes = unpack(words[:, start:stop].T, bits)[:, :n_in]
            out[start:stop] = scaled_groups(codes, zeros[start:stop], scales[start:stop], group_of)
        return out


@dataclass(frozen=True, slots=True, kw_only=True)
class AwqPacking:
    """4 bits, rows out of order within words.  group_size: None for one group."""

    group_size: int | None

    def stored(self, name: str, names: Container[str]) -> tuple[str, ...]:
        """Codes, zeros and scales."""
        if not (name.endswith("." + _WEIGHT) and _beside(name, "qweight") in names):
            return ()
        return tuple(_beside(name, s) for s in ("qweight", "qzeros", "scales"))

    def open(self, weight: Weight) -> PackedWeight:
        """Raises CheckpointError unless all of them cover the weight."""
        n_out, n_in = weight.require_matrix()
        n_groups, n_words = groups(n_in, self.group_size), -(-n_out // len(_AWQ_PLACE))
        weight.require(_beside(weight.name, "qweight"), ("I32",), (n_in, n_words))
        weight.require(_beside(weight.name, "qzeros"), ("I32",), (n_groups, n_words))
        weight.require(_beside(weight.name, "scales"), SCALE_DTYPES, (n_groups, n_out))
        return _AwqWeight(weight, self.group_size)


@dataclass(frozen=True, slots=True)
class _AwqWeight:
    weight: Weight
    group_size: int | None

    def rows(self, first: int, count: int) -> Tensor:
        """Rows of the matrix, which are columns of the file: all of it is read."""
        files, name, n_in = self.weight.files, self.weight.name, self.weight.shape[1]
        end, per_word = first + count, len(_AWQ_PLACE)
        zeros = _in_order(files.read_whole(_beside(name, "qzeros")))[:, first:end]
        zeros = zeros.T.to(torch.float32)
        scales = files.read_whole(_beside(name, "scales"))[:, first:end].T.to(torch.float32)
        group_of = group_of_columns(n_in, self.group_size)
        words = files.read_whole(_beside(name, "qweight"))
        out = torch.empty(count, n_in)
        for start, stop in chunks(first, count, n_in, step=per_word):
            before = start // per_word * per_word
            codes = _in_order(words[:, before // per_word : -(-stop // per_word)])
            here = slice(start - first, stop - first)
            out[here] = scaled_groups(
                codes[:, start - before : stop - before].T, zeros[here], scales[here], group_of
            )
        return out


def _in_order(words: Tensor) -> Tensor:
    """The codes of AWQ's words [m, w] as [m, 8 w], uint8."""
    codes = unpack(words, 4).view(*words.shape, len(_AWQ_PLACE))
    return codes[:, :, _AWQ_PLACE].flatten(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class WordPacking:
    """compressed-tensors' packed words.

    schemes: pairs of bits and group size that config.json allows, None for one group.
    """

    schemes: tuple[tuple[int, int | None], ...]

    def stored(self, name: str, names: Container[str]) -> tuple[str, ...]:
        """Codes, scales and shape, and zeros and groups where they are stored."""
        if name + "_packed" not in names:
            return ()
        optional = [s for s in ("_shape", "_zero_point", "_g_idx") if name + s in names]
        return tuple(name + s for s in ("_packed", "_scale", *optional))

    def open(self, weight: Weight) -> PackedWeight:
        """Raises CheckpointError unless all of them cover the weight."""
        n_out, n_in = weight.require_matrix()
        bits, size = self._scheme(weight, n_in)
        n_words, n_groups = -(-n_in * bits // WORD), groups(n_in, size)
        name, files = weight.name, weight.files
        weight.require(name + "_packed", ("I32",), (n_out, n_words))
        weight.require(name + "_scale", SCALE_DTYPES, (n_out, n_groups))
        if name + "_shape" in files:
            weight.require(name + "_shape", ("I64", "I32"), (2,))
            if files.read_whole(name + "_shape").tolist() != [n_out, n_in]:
                raise weight.damaged(
                    f"weight_shape is {files.read_whole(name + '_shape').tolist()}",
                    f"config.json needs {[n_out, n_in]}",
                )
        if name + "_zero_point" in files:
            if files.entry(name + "_zero_point").dtype == "I32":
                weight.require(name + "_zero_point", ("I32",), (-(-n_out * bits // WORD), n_groups))
            else:
                weight.require(name + "_zero_point", ("I8",), (n_out, n_groups))
        if name + "_g_idx" in files:
            weight.require(name + "_g_idx", ("I32", "I64"), (n_in,))
        return _WordsWeight(weight, bits, size)

    def _scheme(self, weight: Weight, n_in: int) -> tuple[int, int | None]:
        """Which of the schemes a weight has; the first, if it has none, for the error it makes."""
        packed = weight.files.entry(weight.name + "_packed").shape[-1:]
        scale = weight.files.entry(weight.name + "_scale").shape[-1:]
        for bits, size in self.schemes:
            if packed == (-(-n_in * bits // WORD),) and scale == (groups(n_in, size),):
                return bits, size
        return self.schemes[0]


@dataclass(frozen=True, slots=True)
class _WordsWeight:
    weight: Weight
    bits: int
    group_size: int | None

    def rows(self, first: int, count: int) -> Tensor:
        """Rows of the matrix, of which nothing else is read."""
        files, name, n_in = self.weight.files, self.weight.name, self.weight.shape[1]
        words = files.read_stored(name + "_packed", first, count)
        scales = files.read_stored(name + "_scale", first, count).to(torch.float32)
        zeros = self._zeros(first, count, scales)
        group_of = _stored_groups(self.weight, name + "_g_idx", self.group_size, scales.shape[1])
        out = torch.empty(count, n_in)
        for start, end in chunks(0, count, n_in):
            codes = unpack(words[start:end], self.bits)[:, :n_in]
            out[start:end] = scaled_groups(codes, zeros[start:end], scales[start:end], group_of)
        return out

    def _zeros(self, first: int, count: int, scales: Tensor) -> Tensor:
        """[count, G] float32.  Codes have half of their range added, and so have zeros in words."""
        files, name, half = (
            self.weight.files,
            self.weight.name + "_zero_point",
            1 << (self.bits - 1),
        )
        if name not in files:
            return torch.full_like(scales, half)
        if files.entry(name).dtype == "I8":
            return files.read_stored(name, first, count).to(torch.float32) + half
        zeros = unpack(files.read_whole(name).T, self.bits).T
        return zeros[first : first + count].to(torch.float32)


def _stored_groups(weight: Weight, name: str, size: int | None, n_groups: int) -> Tensor | None:
    """The group of every column, checked; None where they are runs of the same length."""
    n_in = weight.shape[1]
    usual = group_of_columns(n_in, size)
    if name not in weight.files:
        return usual
    group_of = weight.files.read_whole(name).to(torch.int64)
    if n_in and not 0 <= int(group_of.min()) <= int(group_of.max()) < n_groups:
        raise weight.damaged(
            f"groups are {int(group_of.min())} to {int(group_of.max())}",
            f"there are {n_groups} of them",
        )
    runs = torch.arange(n_in) // (size or max(n_in, 1))
    return usual if torch.equal(group_of, runs) else group_of
