"""Rotary positions."""

import torch
from torch import Tensor

from lowmoe.spec import Rope


def rope_frequencies(rope: Rope, head_size: int) -> Tensor:
    """Radians that each pair of a head's channels turns by from token to token, [D / 2] float32."""
    exponents = torch.arange(0, head_size, 2).float() / head_size
    return 1.0 / rope.theta**exponents


def rope_angles(rope: Rope, head_size: int, first: int, count: int) -> tuple[Tensor, Tensor]:
    """cos and sin of the angles at positions first..first+count, [T, D] float32 each.

    Source: RoFormer, arXiv 2104.09864; the halves of a head turn together, as in transformers.
    """
    positions = torch.arange(first, first + count).float()
    angles = torch.outer(positions, rope_frequencies(rope, head_size))
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each head to its position.  x: [T, heads, D], cos and sin: [T, D]."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return x * cos[:, None].to(x.dtype) + turned * sin[:, None].to(x.dtype)
