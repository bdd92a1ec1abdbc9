"""Rotary positions."""

import math

import torch
from torch import Tensor

from lowmoe.spec import LinearScaling, LongScaling, Rope, WavelengthScaling, YarnScaling


def rope_frequencies(rope: Rope, head_size: int, n_tokens: int = 0) -> Tensor:
    """Radians that each pair of a head's channels turns by from token to token, [pairs] float32.

    n_tokens: the most a conversation may have, which some scalings depend on.
    """
    size = rope.size or head_size
    exponents = torch.arange(0, size, 2).float() / size
    plain = 1.0 / rope.theta**exponents
    match rope.scaling:
        case None:
            return plain
        case LinearScaling():
            return plain / rope.scaling.factor
        case WavelengthScaling():
            return _by_wavelength(plain, rope.scaling)
        case YarnScaling():
            return _yarn(plain, rope.theta, size, rope.scaling)
        case LongScaling():
            long = n_tokens > rope.scaling.n_original
            return plain / torch.tensor(rope.scaling.long if long else rope.scaling.short)


def rope_length(rope: Rope, n_tokens: int = 0) -> float:
    """What turned channels are multiplied by.  n_tokens: as in rope_frequencies."""
    match rope.scaling:
        case YarnScaling():
            return rope.scaling.length
        case LongScaling():
            long = n_tokens > rope.scaling.n_original
            return rope.scaling.long_length if long else rope.scaling.short_length
        case _:
            return 1.0


def _by_wavelength(plain: Tensor, scaling: WavelengthScaling) -> Tensor:
    wavelengths = 2 * math.pi / plain
    slow, fast = scaling.n_original / scaling.low, scaling.n_original / scaling.high
    if slow == fast:  # no ramp between them
        return torch.where(wavelengths > slow, plain / scaling.factor, plain)
    kept = (scaling.n_original / wavelengths - scaling.low) / (scaling.high - scaling.low)
    kept = kept.clamp(0, 1)
    return (1 - kept) * plain / scaling.factor + kept * plain


def _yarn(plain: Tensor, theta: float, size: int, scaling: YarnScaling) -> Tensor:
    def channel(turns: float) -> float:
        """Which pair of channels turns so many times in n_original tokens."""
        ratio = scaling.n_original / (turns * 2 * math.pi)
        return size * math.log(ratio) / (2 * math.log(theta))

    low, high = channel(scaling.beta_fast), channel(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    width = high - low if high != low else 0.001  # a step, without dividing by zero
    slowed = ((torch.arange(size // 2).float() - low) / width).clamp(0, 1)
    return slowed * plain / scaling.factor + (1 - slowed) * plain


def rope_angles(
    rope: Rope, head_size: int, first: int, count: int, n_tokens: int = 0
) -> tuple[Tensor, Tensor]:
    """cos and sin of the angles at positions first..first+count, times the length that turned
    channels are to have, [T, channels that turn] float32 each.

    Source: RoFormer, arXiv 2104.09864; the halves of a head turn together, as in transformers.
    """
    positions = torch.arange(first, first + count).float()
    angles = torch.outer(positions, rope_frequencies(rope, head_size, n_tokens))
    angles = torch.cat([angles, angles], dim=-1)
    length = rope_length(rope, n_tokens)
    return angles.cos() * length, angles.sin() * length


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each head's first channels to its position.  x: [T, heads, D], cos, sin: [T, some]."""
    size = cos.shape[-1]
    turning, still = x[..., :size], x[..., size:]
    first, second = turning.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    turned = turning * cos[:, None].to(x.dtype) + turned * sin[:, None].to(x.dtype)
    return turned if size == x.shape[-1] else torch.cat([turned, still], dim=-1)
