"""Norms of hidden states and of heads, and sums of hidden states."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lowmoe.decoder.weights import LayerWeights
from lowmoe.spec import ModelSpec, NormedResidual


def rms_norm(x: Tensor, weight: Tensor | None, epsilon: float) -> Tensor:
    """x / rms(x) * weight.  x: [..., n] any float dtype, weight: [n], None for ones.

    Computed in float32.  Source: arXiv 1910.07467; rounding to x's dtype before the weight, as
    transformers does.
    """
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    normed = (wide * scale).to(x.dtype)
    return normed if weight is None else weight.to(x.dtype) * normed


def residual_sum(
    x: Tensor, normed: Tensor, out: Tensor, how: NormedResidual | None, scale: float
) -> Tensor:
    """What a layer makes of x [T, H], of its norm, and of what was computed from that.

    scale: of what is added, where how does not say.
    """
    if how is not None:
        return how.kept * normed + how.added * out
    return x + (out if scale == 1 else scale * out)


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, spec: ModelSpec) -> Tensor:
    """The norm before attention, feed-forward or head.  x: [T, H], weight and bias: [H]."""
    if spec.norm == "rms":
        normed = rms_norm(x, weight, spec.norm_epsilon)
        return normed if bias is None else normed + bias.to(x.dtype)
    return F.layer_norm(x.float(), weight.shape, weight, bias, spec.norm_epsilon).to(x.dtype)


def normed_output(out: Tensor, name: str, weights: LayerWeights, spec: ModelSpec) -> Tensor:
    """What attention or feed-forward return as it is to be added, [T, H].  name: of its norm."""
    if not spec.norm_after:
        return out
    return norm(out, weights.vector(name), weights.optional(f"{name}_bias"), spec)
