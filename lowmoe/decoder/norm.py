"""Root-mean-square norm."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / rms(x) * weight.  x: [T, H] any float dtype, weight: [H]; computed in float32.

    Source: arXiv 1910.07467; rounding to x's dtype before the weight, as transformers does.
    """
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return weight.to(x.dtype) * (wide * scale).to(x.dtype)
