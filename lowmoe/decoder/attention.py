"""Attention over the cache.

Knows:        grouped heads, causal and sliding masks.
Ignorant of:  layers before and after, weight formats.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lowmoe.decoder.kv_cache import LayerCache
from lowmoe.decoder.rope import rope_angles, rotate
from lowmoe.decoder.weights import LayerWeights
from lowmoe.kernels import Kernels
from lowmoe.spec import GroupedQueryAttention


def attend(
    x: Tensor,
    weights: LayerWeights,
    spec: GroupedQueryAttention,
    cache: LayerCache,
    first: int,
    kernels: Kernels,
) -> Tensor:
    """Grouped-query attention.  x: [T, H], tokens at positions first on.  Returns [T, H].

    Source: arXiv 2305.13245.
    """
    n_tokens, d = x.shape[0], spec.head_size
    sizes = [spec.q_size, spec.kv_size, spec.kv_size]
    parts = torch.split(kernels.linear(x, weights.qkv), sizes, dim=1)
    q = parts[0].view(n_tokens, spec.n_heads, d)  # [T, A, D]
    k, v = (p.view(n_tokens, spec.n_kv_heads, d) for p in parts[1:])  # [T, B, D] each
    cos, sin = rope_angles(spec.rope, d, first, n_tokens)
    keys, values = cache.append(rotate(k, cos, sin), v, first)  # [S, B, D] each
    out = F.scaled_dot_product_attention(
        rotate(q, cos, sin).transpose(0, 1)[None],
        keys.transpose(0, 1)[None],
        values.transpose(0, 1)[None],
        attn_mask=visible(n_tokens, first, spec.window),
        enable_gqa=spec.n_kv_heads != spec.n_heads,
    )  # [1, A, T, D]
    return kernels.linear(out[0].transpose(0, 1).reshape(n_tokens, -1), weights.attention_out)


def visible(n_tokens: int, first: int, window: int | None) -> Tensor | None:
    """Which cached token each new one sees, [T, S] bool; None where it is all of them."""
    if n_tokens == 1 and (window is None or first < window):
        return None
    asking = torch.arange(first, first + n_tokens)[:, None]
    asked = torch.arange(first + n_tokens)[None]
    mask = asked <= asking
    return mask if window is None else mask & (asked > asking - window)
