"""Attention of the kinds that keep states: what goes into them and what is made of what they say.

Knows:        maps, mixing of neighbouring tokens, gates and norms around a state.
Ignorant of:  layers before and after, weight formats, at which positions states are kept.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lowmoe.decoder.linear_attention import attend_state
from lowmoe.decoder.norm import rms_norm
from lowmoe.decoder.state_cache import StateCache, stretches
from lowmoe.decoder.weights import LayerWeights
from lowmoe.kernels import Kernels
from lowmoe.spec import GatedDeltaNet, LightningAttention

KEY_EPSILON = 1e-6  # under the root of queries' and keys' lengths; flash-linear-attention's l2norm


def delta_values(
    x: Tensor,
    weights: LayerWeights,
    spec: GatedDeltaNet,
    cache: StateCache,
    first: int,
    kernels: Kernels,
) -> Tensor:
    """A gated delta net, [T, A * D].  x: [T, H], tokens at positions first on.

    Source: arXiv 2412.06464; transformers' Qwen3NextGatedDeltaNet.
    """
    parts = kernels.linear(x, weights.parts["delta_in"]).float()
    mixed, gate = torch.split(parts, [spec.n_mixed, spec.q_size], dim=1)
    rates = x.float() @ weights.vector("delta_rates").T  # [T, 2 A]
    correction, decay = torch.split(rates, spec.n_heads, dim=1)
    correction = torch.sigmoid(correction)
    decay = F.softplus(decay + weights.vector("delta_decay_bias"))
    decay = -weights.vector("delta_log_decay").exp() * decay
    before, state = cache.at(first)
    window = torch.cat([before, mixed])  # [taps - 1 + T, channels]
    queries, keys, values = _mixed_heads(window, weights.vector("delta_taps"), spec)
    read: list[Tensor] = []
    for some in stretches(x.shape[0]):
        out, state = attend_state(
            queries[:, some],
            keys[:, some],
            values[:, some],
            decay.T[:, some],
            state,
            correction.T[:, some],
        )
        read.append(out)
        cache.put(first + some.stop, (window[some.stop :][: spec.n_taps - 1].clone(), state))
    out = torch.cat(read, dim=1).transpose(0, 1)  # [T, A, D]
    out = rms_norm(out, weights.vector("delta_norm"), spec.norm_epsilon)
    return (out.flatten(1) * F.silu(gate)).to(x.dtype)


def _mixed_heads(window: Tensor, taps: Tensor, spec: GatedDeltaNet) -> tuple[Tensor, ...]:
    """Queries and keys [A, T, K] of their lengths, values [A, T, D].  taps: [channels, taps]."""
    n_tokens = window.shape[0] - spec.n_taps + 1
    mixed = window[:n_tokens] * taps[:, 0]
    for tap in range(1, spec.n_taps):
        mixed += window[tap : tap + n_tokens] * taps[:, tap]
    parts = torch.split(F.silu(mixed), [spec.all_keys, spec.all_keys, spec.q_size], dim=1)
    queries, keys = (
        _of_length_one(p.view(n_tokens, spec.n_key_heads, spec.key_size)) for p in parts[:2]
    )
    shared = spec.n_heads // spec.n_key_heads
    queries = (queries * spec.key_size**-0.5).repeat_interleave(shared, dim=1)
    keys = keys.repeat_interleave(shared, dim=1)
    values = parts[2].view(n_tokens, spec.n_heads, spec.value_size)
    return queries.transpose(0, 1), keys.transpose(0, 1), values.transpose(0, 1)


def _of_length_one(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + KEY_EPSILON)


def lightning_values(
    x: Tensor,
    weights: LayerWeights,
    spec: LightningAttention,
    cache: StateCache,
    first: int,
    kernels: Kernels,
) -> Tensor:
    """Lightning attention, [T, A * D].  x: [T, H], tokens at positions first on.

    Source: arXiv 2401.04658; transformers' MiniMaxLightningAttention.
    """
    n_tokens = x.shape[0]
    parts = F.silu(kernels.linear(x, weights.qkv)).float().view(n_tokens, 3, spec.n_heads, -1)
    queries, keys, values = parts.permute(1, 2, 0, 3)  # [A, T, D] each
    decay = -torch.tensor(spec.slopes)[:, None].expand(spec.n_heads, n_tokens)
    (state,) = cache.at(first)
    read: list[Tensor] = []
    for some in stretches(n_tokens):
        out, state = attend_state(
            queries[:, some], keys[:, some], values[:, some], decay[:, some], state
        )
        read.append(out)
        cache.put(first + some.stop, (state,))
    out = torch.cat(read, dim=1).transpose(0, 1).flatten(1).to(x.dtype)  # [T, A * D]
    out = rms_norm(out, weights.vector("lightning_norm"), spec.norm_epsilon)
    return out * torch.sigmoid(kernels.linear(x, weights.parts["attention_gate"]))
