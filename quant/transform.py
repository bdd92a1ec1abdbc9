"""The basis that weights are coded in: x' = H (d * x), W' = W / d H.

H spreads a channel's outliers over its block, d gives noisy channels finer weights. Since H is
orthogonal and symmetric, W' x' = W x.

Knows:        Hadamard blocks, signs, channel scales.
Ignorant of:  what codes W', where activations come from.
"""

import functools
import math

import torch
from torch import Tensor

MAX_HADAMARD = 128
# Channels that calibration found (nearly) silent, or a thousand times louder than the rest, still
# get a weight: c stays within this factor of its geometric mean.
CHANNEL_SCALE_LIMIT = 64.0


def hadamard_size(n_in: int) -> int:
    """The largest power of two up to 128 that divides n_in."""
    return min(n_in & -n_in, MAX_HADAMARD)


@functools.lru_cache(maxsize=16)
def hadamard_matrix(size: int) -> Tensor:
    """The orthonormal Hadamard matrix in Sylvester's order, [size, size] float32."""
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(size)


def _rotate(x: Tensor) -> Tensor:
    size = hadamard_size(x.shape[-1])
    if size == 1:
        return x
    return (x.reshape(-1, size) @ hadamard_matrix(size)).view(x.shape)


def channel_factors(activation_rms: Tensor | None, column_rms: Tensor, *, seed: int) -> Tensor:
    """The vector d of a matrix: a random sign times 1 / c, [n_in] float16.

    activation_rms, column_rms: [n_in]. c = sqrt(activation_rms / column_rms) minimises
    (sum of w^2 c^2) * (sum of a^2 / c^2), the output error where a block spreads the weights' error
    evenly; without activation_rms all channels count alike, c = 1.
    Measured once, SmolLM2-135M at two planes: KL .093 with it, .374 without.
    """
    n_in = column_rms.shape[0]
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (n_in,), generator=generator).float() * 2 - 1
    if activation_rms is None:
        return signs.half()
    quiet = torch.finfo(torch.float32).tiny
    log_c = 0.5 * (
        activation_rms.float().clamp_min(quiet).log() - column_rms.clamp_min(quiet).log()
    )
    log_c -= log_c.median()
    limit = torch.tensor(CHANNEL_SCALE_LIMIT).log().item()
    return (signs * (-log_c.clamp(-limit, limit)).exp()).half()


def transform_activations(x: Tensor, d: Tensor) -> Tensor:
    """x' = H (d * x).  x: [..., n_in] float, d: [n_in].  Returns [..., n_in] float32."""
    return _rotate(x.float() * d.float())


def transform_weights(weights: Tensor, d: Tensor) -> Tensor:
    """W' = W / d H.  weights: [n_out, n_in] float, d: [n_in].  Returns float32 [n_out, n_in]."""
    return _rotate(weights.float() / d.float())


def restore_weights(transformed: Tensor, d: Tensor) -> Tensor:
    """W = W' H * d, the inverse of transform_weights; [n_out, n_in] float32."""
    return _rotate(transformed) * d.float()
