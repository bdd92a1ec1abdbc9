"""What a layer's operations on a GPU take beside buffers, the cache and experts.

Knows:        how a layer's kinds become arguments of cuda_ext/ops.py.
Ignorant of:  which operations there are, their order, buffers, CUDA.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lowmoe.decoder.native_layers import head_norm_kind
from lowmoe.decoder.rope import rope_frequencies, rope_length
from lowmoe.decoder.weights import LayerWeights
from lowmoe.spec import (
    ExpertsFeedForward,
    GroupedQueryAttention,
    LayerSpec,
    Router,
    SigmoidRouter,
    SoftmaxRouter,
    grouped,
)
from quant.matrix import Matrix, TrellisMatrix


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedMatrices:
    """An expert of all tokens.  router: [1, H], of its own weight; None for a weight of 1."""

    gate_up: TrellisMatrix
    down: TrellisMatrix
    router: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuLayer:
    """heads: what rope_store takes of norms and bounds; router: of every router; activation: of
    experts, shared ones too.
    """

    spec: LayerSpec
    weights: LayerWeights
    qkv: TrellisMatrix
    out: TrellisMatrix
    frequencies: Tensor
    rope_length: float
    score_scale: float
    heads: tuple[int, Tensor | None, Tensor | None, float, float]
    shared: SharedMatrices | None
    router: tuple[Tensor, Tensor | None, Tensor | None, bool, bool, int, int, float]
    activation: tuple[float, float, float]

    @staticmethod
    def bound(
        spec: LayerSpec, weights: LayerWeights, n_context: int, place: torch.device
    ) -> "GpuLayer":
        """weights: at `place`; n_context: of a cache."""
        attention, feed_forward = grouped(spec.attention), spec.feed_forward
        rope, activation = attention.rope, feed_forward.activation
        assert rope is not None
        limit = math.inf if activation.limit is None else activation.limit
        return GpuLayer(
            spec=spec,
            weights=weights,
            qkv=planes_of(weights.qkv),
            out=planes_of(weights.attention_out),
            frequencies=rope_frequencies(rope, attention.head_size, n_context).to(place),
            rope_length=rope_length(rope, n_context),
            score_scale=attention.score_scale or attention.head_size**-0.5,
            heads=_heads(weights, attention),
            shared=_shared(weights, feed_forward),
            router=_router(weights, feed_forward.router, place),
            activation=(activation.steepness, activation.shift, limit),
        )

    @property
    def attention(self) -> GroupedQueryAttention:
        """Its kind."""
        return grouped(self.spec.attention)

    @property
    def has_experts(self) -> bool:
        """Any but a shared one."""
        return self.spec.feed_forward.n_experts > 0


def planes_of(matrix: Matrix) -> TrellisMatrix:
    """A matrix of a folder of planes."""
    assert isinstance(matrix, TrellisMatrix)
    return matrix


def _heads(
    weights: LayerWeights, attention: GroupedQueryAttention
) -> tuple[int, Tensor | None, Tensor | None, float, float]:
    norm = attention.norm
    return (
        head_norm_kind(norm),
        weights.optional("q_norm"),
        weights.optional("k_norm"),
        1.0 if norm is None else norm.epsilon,
        math.inf if attention.clamp is None else attention.clamp,
    )


def _shared(weights: LayerWeights, spec: ExpertsFeedForward) -> SharedMatrices | None:
    if spec.shared is None:
        return None
    return SharedMatrices(
        gate_up=planes_of(weights.parts["shared_gate_up"]),
        down=planes_of(weights.parts["shared_down"]),
        router=weights.optional("shared_router"),
    )


def _router(
    weights: LayerWeights, kind: Router, place: torch.device
) -> tuple[Tensor, Tensor | None, Tensor | None, bool, bool, int, int, float]:
    sigmoid = kind if isinstance(kind, SigmoidRouter) else None
    scores = weights.optional("router")
    # One expert that every token uses is chosen by any router; one of zeros serves.
    no_choice = torch.zeros(1, weights.experts_norm.shape[0], device=place)
    return (
        no_choice if scores is None else scores,
        weights.optional("router_bias"),
        weights.optional("choice_bias"),
        sigmoid is not None,
        isinstance(kind, SoftmaxRouter | SigmoidRouter) and kind.renormalize,
        1 if sigmoid is None else sigmoid.n_groups,
        1 if sigmoid is None else sigmoid.n_groups_active,
        1.0 if sigmoid is None else sigmoid.scale,
    )
