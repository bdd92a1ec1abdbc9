"""Norms of hidden states and of heads."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lowmoe.spec import ModelSpec


def rms_norm(x: Tensor, weight: Tensor | None, epsilon: float) -> Tensor:
    """x / rms(x) * weight.  x: [..., n] any float dtype, weight: [n], None for ones.

    Computed in float32.  Source: arXiv 1910.07467; rounding to x's dtype before the weight, as
    transformers does.
    """
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    normed = (wide * scale).to(x.dtype)
    return normed if weight is None else weight.to(x.dtype) * normed


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, spec: ModelSpec) -> Tensor:
    """The norm before attention, feed-forward or head.  x: [T, H], weight and bias: [H]."""
    if spec.norm == "rms":
        normed = rms_norm(x, weight, spec.norm_epsilon)
        return normed if bias is None else normed + bias.to(x.dtype)
    return F.layer_norm(x.float(), weight.shape, weight, bias, spec.norm_epsilon).to(x.dtype)
