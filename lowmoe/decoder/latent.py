"""Attention whose cache keeps latent vectors; keys and values are made of them for every pass.

Knows:        maps down to latents and up to heads, which channels turn.
Ignorant of:  layers before and after, weight formats.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lowmoe.decoder.kv_cache import LayerCache
from lowmoe.decoder.mask import visible
from lowmoe.decoder.norm import rms_norm
from lowmoe.decoder.rope import rope_angles, rotate
from lowmoe.decoder.weights import LayerWeights
from lowmoe.kernels import Kernels
from lowmoe.spec import LatentAttention


def latent_values(
    x: Tensor,
    weights: LayerWeights,
    spec: LatentAttention,
    cache: LayerCache,
    first: int,
    kernels: Kernels,
) -> Tensor:
    """What all heads put out, [T, A, value size].  x: [T, H], tokens at positions first on.

    Source: arXiv 2405.04434, section 2.1.
    """
    cos, sin = rope_angles(spec.rope, spec.rope_size, first, x.shape[0], cache.capacity)
    kept = kernels.linear(x, weights.parts["kv_down"])[:, None]  # [T, 1, kv rank + rope size]
    latent, key = torch.split(kept, [spec.kv_rank, spec.rope_size], dim=-1)
    latent = rms_norm(latent, weights.vector("kv_latent_norm"), spec.norm_epsilon)
    latents, turned = cache.append(latent, rotate(key, cos, sin), first)  # [S, 1, ...] each
    keys, values = _unfolded(latents, turned, weights, spec, kernels)
    queries = _queries(x, weights, spec, kernels)
    plain, turning = torch.split(queries, [spec.plain_size, spec.rope_size], dim=-1)
    q = torch.cat([plain, rotate(turning, cos, sin)], dim=-1)
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        keys.transpose(0, 1)[None],
        values.transpose(0, 1)[None],
        attn_mask=visible(x.shape[0], first, None),
        scale=spec.score_scale,
    )  # [1, A, T, value size]
    return out[0].transpose(0, 1)


def _queries(x: Tensor, weights: LayerWeights, spec: LatentAttention, kernels: Kernels) -> Tensor:
    """[T, A, key size], not turned yet."""
    if spec.q_rank is None:
        q = kernels.linear(x, weights.parts["q"])
    else:
        latent = kernels.linear(x, weights.parts["q_down"])
        latent = rms_norm(latent, weights.vector("q_latent_norm"), spec.norm_epsilon)
        q = kernels.linear(latent, weights.parts["q_up"])
    return q.view(x.shape[0], spec.n_heads, spec.key_size)


def _unfolded(
    latents: Tensor, turned: Tensor, weights: LayerWeights, spec: LatentAttention, kernels: Kernels
) -> tuple[Tensor, Tensor]:
    """Keys [S, A, key size] and values [S, A, value size] of all cached tokens."""
    n_cached = latents.shape[0]
    both = kernels.linear(latents[:, 0], weights.parts["kv_up"]).view(n_cached, spec.n_heads, -1)
    plain, values = torch.split(both, [spec.plain_size, spec.value_size], dim=-1)
    shared = turned.expand(n_cached, spec.n_heads, spec.rope_size)
    return torch.cat([plain, shared], dim=-1), values
