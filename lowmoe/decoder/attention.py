"""Attention over the cache.

Knows:        grouped heads, what is done to queries and keys before they meet.
Ignorant of:  layers before and after, weight formats.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lowmoe.decoder.kv_cache import LayerCache
from lowmoe.decoder.latent import latent_values
from lowmoe.decoder.mask import visible
from lowmoe.decoder.norm import rms_norm
from lowmoe.decoder.recurrent import delta_values, lightning_values
from lowmoe.decoder.rope import rope_angles, rotate
from lowmoe.decoder.state_cache import StateCache
from lowmoe.decoder.weights import LayerWeights
from lowmoe.kernels import Kernels
from lowmoe.spec import (
    Attention,
    GatedDeltaNet,
    GroupedQueryAttention,
    LatentAttention,
    LightningAttention,
    QueryTemperature,
)


def attend(
    x: Tensor,
    weights: LayerWeights,
    spec: Attention,
    cache: LayerCache | StateCache,
    first: int,
    kernels: Kernels,
) -> Tensor:
    """Attention of any kind.  x: [T, H], tokens at positions first on.  Returns [T, H].

    cache: `layer_cache` of the same kind.
    """
    out = _values(x, weights, spec, cache, first, kernels).reshape(x.shape[0], -1)
    return plus_bias(
        kernels.linear(out, weights.attention_out), weights.optional("attention_out_bias")
    )


def _values(
    x: Tensor,
    weights: LayerWeights,
    spec: Attention,
    cache: LayerCache | StateCache,
    first: int,
    kernels: Kernels,
) -> Tensor:
    """What all heads put out, [T, ...]."""
    if isinstance(cache, StateCache):
        if isinstance(spec, GatedDeltaNet):
            return delta_values(x, weights, spec, cache, first, kernels)
        assert isinstance(spec, LightningAttention)
        return lightning_values(x, weights, spec, cache, first, kernels)
    if isinstance(spec, LatentAttention):
        return latent_values(x, weights, spec, cache, first, kernels)
    assert isinstance(spec, GroupedQueryAttention)
    return _grouped_values(x, weights, spec, cache, first, kernels)


def _grouped_values(
    x: Tensor,
    weights: LayerWeights,
    spec: GroupedQueryAttention,
    cache: LayerCache,
    first: int,
    kernels: Kernels,
) -> Tensor:
    """Grouped-query attention, [T, A, D].  Source: arXiv 2305.13245."""
    (q, k, v), gate = _projected(x, weights, spec, kernels)
    q, k = _placed(q, k, weights, spec, first, cache.capacity)
    keys, values = cache.append(k, v, first)  # [S, B, D] each
    mask = visible(x.shape[0], first, spec.window, spec.chunk)
    out = _weighed(q, keys, values, mask, spec, weights.optional("sinks"))
    return out if gate is None else out * torch.sigmoid(gate).view(out.shape)


def _projected(
    x: Tensor, weights: LayerWeights, spec: GroupedQueryAttention, kernels: Kernels
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor | None]:
    """Queries [T, A, D], keys and values [T, B, D], before any of their positions is known; and the
    gate of what comes of them, [T, A * D].
    """
    qkv, gate = kernels.linear(x, weights.qkv), None
    if spec.gated:
        qkv, gate = torch.split(qkv, [qkv.shape[1] - spec.q_size, spec.q_size], dim=1)
    qkv = plus_bias(qkv, weights.optional("qkv_bias"))
    parts = torch.split(qkv, [spec.q_size, spec.kv_size, spec.kv_size], dim=1)
    if spec.norm is not None and spec.norm.over == "all":
        parts = (*_normed(parts[0], parts[1], weights, spec.norm.epsilon), parts[2])
    if spec.clamp is not None:
        limit = spec.clamp
        parts = tuple(p.clamp(-limit, limit) for p in parts)
    q, k, v = (p.view(x.shape[0], -1, spec.head_size) for p in parts)
    return (q, k, v), gate


def _placed(
    q: Tensor,
    k: Tensor,
    weights: LayerWeights,
    spec: GroupedQueryAttention,
    first: int,
    capacity: int,
) -> tuple[Tensor, Tensor]:
    """Queries and keys normed and turned to their positions.  capacity: tokens there may be."""
    by_head = spec.norm if spec.norm is not None and spec.norm.over == "head" else None
    if by_head is not None and not by_head.after_rope:
        q, k = _normed(q, k, weights, by_head.epsilon)
    if spec.rope is not None:
        cos, sin = rope_angles(spec.rope, spec.head_size, first, q.shape[0], capacity)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    if by_head is not None and by_head.after_rope:
        q, k = _normed(q, k, weights, by_head.epsilon)
    if spec.temperature is not None:
        q = q * _temperatures(spec.temperature, first, q.shape[0])[:, None, None].to(q.dtype)
    return q, k


def _normed(q: Tensor, k: Tensor, weights: LayerWeights, epsilon: float) -> tuple[Tensor, Tensor]:
    return (
        rms_norm(q, weights.optional("q_norm"), epsilon),
        rms_norm(k, weights.optional("k_norm"), epsilon),
    )


def _temperatures(temperature: QueryTemperature, first: int, count: int) -> Tensor:
    """[T] float32."""
    positions = torch.arange(first, first + count).float()
    return 1 + temperature.scale * torch.log1p(((positions + 1) / temperature.step).floor())


def _weighed(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    spec: GroupedQueryAttention,
    sinks: Tensor | None,
) -> Tensor:
    """Values weighed by the softmax of scores, [T, A, D].

    q: [T, A, D], keys, values: [S, B, D].
    """
    if sinks is not None or spec.score_cap is not None:
        return _weighed_step_by_step(q, keys, values, mask, spec, sinks)
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        keys.transpose(0, 1)[None],
        values.transpose(0, 1)[None],
        attn_mask=mask,
        scale=spec.score_scale,
        enable_gqa=spec.n_kv_heads != spec.n_heads,
    )  # [1, A, T, D]
    return out[0].transpose(0, 1)


def _weighed_step_by_step(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    spec: GroupedQueryAttention,
    sinks: Tensor | None,
) -> Tensor:
    """The same with scores that are capped, or sinks, whose scores take part in the softmax and
    weigh nothing.  sinks: [A] float32.

    The heads of one key-value head at a time: scores of all at once would take many times more
    memory than anything else does.
    """
    out, groups = torch.empty_like(q), spec.n_heads // spec.n_kv_heads
    for b in range(spec.n_kv_heads):
        heads = slice(b * groups, (b + 1) * groups)
        own = None if sinks is None else sinks[heads]
        out[:, heads] = _weighed_of_one(q[:, heads], keys[:, b], values[:, b], mask, spec, own)
    return out


def _weighed_of_one(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    spec: GroupedQueryAttention,
    sinks: Tensor | None,
) -> Tensor:
    """Of the heads that share one key-value head, [T, g, D].  q: [T, g, D]; keys, values: [S, D];
    sinks: [g].
    """
    scale = spec.score_scale or spec.head_size**-0.5
    scores = torch.einsum("tgd,sd->gts", q, keys).float() * scale
    if spec.score_cap is not None:
        scores = spec.score_cap * torch.tanh(scores / spec.score_cap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        sink = sinks.view(-1, 1, 1).expand(*scores.shape[:2], 1)
        scores = torch.cat([scores, sink], -1)
    chances = torch.softmax(scores, -1)[..., : keys.shape[0]].to(q.dtype)
    return torch.einsum("gts,sd->tgd", chances, values)


def plus_bias(x: Tensor, bias: Tensor | None) -> Tensor:
    """x: [T, n], bias: [n] or None."""
    return x if bias is None else x + bias.to(x.dtype)
