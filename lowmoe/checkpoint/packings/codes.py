"""Codes of a few bits into numbers, in plain torch.

Knows:        bits in words, scales and zeros of groups, 8-bit floats.
Ignorant of:  files, names, which program packed what.
"""

import torch
from torch import Tensor


def unpack(words: Tensor, bits: int) -> Tensor:
    """The codes in words, lowest bits first.

    words: [n, m] int32, little-endian; bits: 2, 4 or 8.
    Returns [n, 32 m / bits] uint8.
    """
    n_rows, n_words = words.shape
    # Flat first: of a single column torch calls any stride contiguous, and cannot view it as bytes.
    octets = words.contiguous().flatten().view(torch.uint8).view(n_rows, n_words * words.itemsize)
    if bits == 8:
        return octets
    mask = 2**bits - 1
    return torch.stack([(octets >> s) & mask for s in range(0, 8, bits)], dim=-1).flatten(1)


def looked_up(octets: Tensor, table: Tensor, *, low_first: bool) -> Tensor:
    """The numbers that 4-bit codes stand for.

    octets: [...] uint8, two codes each, the one in the low bits first or second; table: [16]
    float32. Returns [..., 2].
    """
    octet = torch.arange(256)
    low, high = table[octet & 15], table[octet >> 4]
    # Two float32 travel as one int64, so that each byte costs one look-up.
    pairs = torch.stack([low, high] if low_first else [high, low], dim=-1).view(torch.int64)
    found = torch.index_select(pairs.flatten(), 0, octets.flatten().int())
    return found.view(torch.float32).view(*octets.shape, 2)


def scaled_groups(
    codes: Tensor, zeros: Tensor | None, scales: Tensor, group_of: Tensor | None
) -> Tensor:
    """(code - zero) * scale in float32: of few-bit codes and 16-bit scales, exact.

    codes: [n, k]; zeros, scales: [n, G] float32, zeros None for 0; group_of: [k] the group of every
    column, None for G runs of the same length.
    """
    numbers = codes.to(torch.float32)
    shape = (codes.shape[0], scales.shape[1], -1)
    runs = numbers.view(shape) if group_of is None else numbers
    if zeros is not None:
        runs -= zeros[:, :, None] if group_of is None else zeros[:, group_of]
    runs *= scales[:, :, None] if group_of is None else scales[:, group_of]
    return numbers


def group_of_columns(n_columns: int, size: int | None) -> Tensor | None:
    """For scaled_groups: groups of a size from the left; None where all are of the same length."""
    if size is None or n_columns % size == 0:
        return None
    return torch.arange(n_columns) // size


def is_e4m3_nan(octets: Tensor) -> bool:
    """Whether any 8-bit float is NaN: all bits but the sign's."""
    return bool(((octets & 127) == 127).any())


def from_e4m3(octets: Tensor) -> Tensor:
    """8-bit floats of 4 exponent bits into float32, NaN not allowed.

    octets: any shape, uint8. torch's own conversion is five times slower. Shifted by 7 bits, sign,
    exponent and mantissa lie where float16 has them, whose exponents are 8 larger.
    Source: OCP 8-bit floating point, arXiv 2209.05433.
    """
    halves = (octets.view(torch.int8).to(torch.int16) << 7) & ~(1 << 14)
    return halves.view(torch.float16).to(torch.float32).mul_(256.0)
