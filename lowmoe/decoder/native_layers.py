"""A model's layers as native code on the CPU wants them told.

Knows:        which addresses and sizes say what a layer computes.
Ignorant of:  passes, caches, where experts live.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from lowmoe.decoder.native_norms import (
    address,
    attention_norm,
    experts_norm,
    kept,
    out_norm,
)
from lowmoe.decoder.rope import rope_frequencies, rope_length
from lowmoe.decoder.weights import DenseWeights, LayerWeights
from lowmoe.kernels import cpu
from lowmoe.spec import (
    GroupedQueryAttention,
    HeadNorm,
    LatentAttention,
    ModelSpec,
    Rope,
    Router,
    SigmoidRouter,
    SoftmaxRouter,
    SparseMixerRouter,
    grouped,
)
from quant.matrix import Matrix, TrellisMatrix


class NativeLayers:
    """Describes layers by the addresses of their weights, and owns the few tensors that are not
    among these: who keeps this and the weights alive may compute.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: DenseWeights,
        engine: cpu.Engine,
        *,
        n_context: int,
        preferences: list[Tensor] | None,
    ) -> None:
        """preferences: what each layer's router prefers its experts by, see Preference.factors."""
        self._spec, self._weights, self._engine = spec, weights, engine
        self._n_context, self._preferences = n_context, preferences
        self._frequencies: dict[object, Tensor] = {}
        self._no_choice = torch.zeros(1, spec.n_hidden)
        self._ones = torch.ones(max(_heads_sizes(spec), default=0))

    def linear(self, matrix: Matrix) -> cpu.Linear:
        """A matrix of trellis planes."""
        assert isinstance(matrix, TrellisMatrix)
        layout = matrix.layout
        planes = [plane.data_ptr() for plane in matrix.planes]
        return cpu.Linear(self._engine, layout.n_out, layout.n_in, planes, matrix.d.data_ptr())

    def attention(self, layer_id: int) -> cpu.AttentionLayer:
        """Of grouped queries, or of latents."""
        weights, spec = self._weights.layers[layer_id], self._spec.layers[layer_id].attention
        if isinstance(spec, LatentAttention):
            return self._latent(layer_id, spec)
        spec = grouped(spec)
        rope, head_norm, temperature = spec.rope, spec.norm, spec.temperature
        return cpu.AttentionLayer(
            norm=attention_norm(self._spec, weights, layer_id),
            qkv=self.linear(weights.qkv),
            out=self.linear(weights.attention_out),
            frequencies=0 if rope is None else self._frequencies_of(rope, spec.head_size),
            n_heads=spec.n_heads,
            n_kv_heads=spec.n_kv_heads,
            head_size=spec.head_size,
            window=spec.window or 0,
            chunk=spec.chunk or 0,
            rope_size=0 if rope is None else rope.size or spec.head_size,
            rope_length=1.0 if rope is None else rope_length(rope, self._n_context),
            score_scale=spec.score_scale or spec.head_size**-0.5,
            qkv_bias=address(weights.optional("qkv_bias")),
            out_bias=address(weights.optional("attention_out_bias")),
            head_norm=head_norm_kind(head_norm),
            q_norm=self._head_norm(weights, spec, "q_norm"),
            k_norm=self._head_norm(weights, spec, "k_norm"),
            head_norm_epsilon=1.0 if head_norm is None else head_norm.epsilon,
            clamp=math.inf if spec.clamp is None else spec.clamp,
            sinks=address(weights.optional("sinks")),
            temperature_step=0 if temperature is None else temperature.step,
            temperature_scale=0.0 if temperature is None else temperature.scale,
            score_cap=spec.score_cap or 0.0,
            out_norm=out_norm(self._spec, weights, "attention_out_norm"),
            gated=spec.gated,
            kept=kept(self._spec.layers[layer_id].attention_residual),
        )

    def experts(self, layer_id: int) -> cpu.ExpertsLayer:
        """But for the routed experts' bytes, which come with each pass."""
        weights = self._weights.layers[layer_id]
        has_shared = self._spec.layers[layer_id].feed_forward.shared is not None
        shared = self._shared(weights) if has_shared else None
        factors = None if self._preferences is None else self._preferences[layer_id]
        return experts_layer(self._spec, layer_id, weights, self._no_choice, shared, factors)

    def _head_norm(self, weights: LayerWeights, spec: GroupedQueryAttention, name: str) -> int:
        """Where its weights are; ones, where it is one without."""
        if spec.norm is None or spec.norm.weighted:
            return address(weights.optional(name))
        return self._ones.data_ptr()

    def _latent(self, layer_id: int, spec: LatentAttention) -> cpu.AttentionLayer:
        """A single key-value head of what is kept; see lowmoe/kernels/cpu/latent.h."""
        weights = self._weights.layers[layer_id]
        down = None if spec.q_rank is None else self.linear(weights.parts["q_down"])
        latent = cpu.LatentProjection(
            engine=self._engine,
            q_down=down,
            q_norm=address(weights.optional("q_latent_norm")),
            q_up=self.linear(weights.parts["q" if down is None else "q_up"]),
            kv_down=self.linear(weights.parts["kv_down"]),
            kv_norm=weights.vector("kv_latent_norm").data_ptr(),
            norm_epsilon=spec.norm_epsilon,
            kv_up=self.linear(weights.parts["kv_up"]),
            n_heads=spec.n_heads,
            plain_size=spec.plain_size,
            rope_size=spec.rope_size,
            value_size=spec.value_size,
        )
        return cpu.AttentionLayer(
            norm=attention_norm(self._spec, weights, layer_id),
            qkv=None,
            out=self.linear(weights.attention_out),
            frequencies=self._frequencies_of(spec.rope, spec.rope_size),
            n_heads=spec.n_heads,
            n_kv_heads=1,
            head_size=spec.kv_rank + spec.rope_size,
            window=0,
            rope_size=spec.rope_size,
            rope_length=rope_length(spec.rope, self._n_context),
            score_scale=spec.score_scale,
            qkv_bias=0,
            out_bias=0,
            head_norm=0,
            q_norm=0,
            k_norm=0,
            head_norm_epsilon=1.0,
            clamp=math.inf,
            sinks=0,
            out_norm=out_norm(self._spec, weights, "attention_out_norm"),
            kept=kept(self._spec.layers[layer_id].attention_residual),
            latent=latent,
        )

    def _frequencies_of(self, rope: Rope, head_size: int) -> int:
        """Their address, by which native code knows that layers turn alike."""
        key = (rope, head_size)
        if key not in self._frequencies:
            found = rope_frequencies(rope, head_size, self._n_context)
            self._frequencies[key] = found.contiguous()
        return self._frequencies[key].data_ptr()

    def _shared(self, weights: LayerWeights) -> cpu.SharedExpert:
        return cpu.SharedExpert(
            gate_up=self.linear(weights.parts["shared_gate_up"]),
            down=self.linear(weights.parts["shared_down"]),
            router=address(weights.optional("shared_router")),
        )


def _heads_sizes(spec: ModelSpec) -> Iterator[int]:
    """Channels of all query heads of each layer, as many as any norm of heads has weights."""
    for layer in spec.layers:
        if isinstance(layer.attention, GroupedQueryAttention):
            yield layer.attention.n_heads * layer.attention.head_size


def experts_layer(
    spec: ModelSpec,
    layer_id: int,
    weights: LayerWeights,
    no_choice: Tensor,
    shared: cpu.SharedExpert | None = None,
    preference: Tensor | None = None,
) -> cpu.ExpertsLayer:
    """A layer's experts but for their bytes; who calls keeps all tensors alive.

    no_choice: [1, H] zeros, for a layer whose only expert every token uses.
    """
    of = spec.layers[layer_id].feed_forward
    return cpu.ExpertsLayer(
        norm=experts_norm(spec, weights, layer_id),
        router=_router(weights, of.router, no_choice, preference),
        d_in=weights.transforms.d_in.data_ptr(),
        d_inner=weights.transforms.d_inner.data_ptr(),
        n_hidden=spec.n_hidden,
        n_experts=of.n_experts,
        n_inner=of.n_inner,
        steepness=of.activation.steepness,
        cubic=of.activation.cubic,
        shift=of.activation.shift,
        limit=math.inf if of.activation.limit is None else of.activation.limit,
        gate_up_bias=address(weights.optional("gate_up_bias")),
        down_bias=address(weights.optional("down_bias")),
        shared=shared,
        weigh_input=of.weigh_input,
        gated=of.gated,
        out_norm=out_norm(spec, weights, "experts_out_norm"),
        kept=kept(spec.layers[layer_id].feed_forward_residual),
    )


def _router(
    weights: LayerWeights, kind: Router, no_choice: Tensor, preference: Tensor | None
) -> cpu.Router:
    # One expert that every token uses is chosen by any router; one of zeros serves.
    chosen = kind if isinstance(kind, SoftmaxRouter | SigmoidRouter) else None
    scores = weights.optional("router")
    return cpu.Router(
        weights=address(no_choice if scores is None else scores),
        bias=address(weights.optional("router_bias")),
        choice_bias=address(weights.optional("choice_bias")),
        sigmoid=isinstance(kind, SigmoidRouter),
        renormalize=chosen is not None and chosen.renormalize,
        n_active=kind.n_active,
        n_groups=1 if chosen is None else chosen.n_groups,
        n_groups_active=1 if chosen is None else chosen.n_groups_active,
        scale=1.0 if chosen is None else chosen.scale,
        spread=(kind.spread or 0.0) if isinstance(kind, SoftmaxRouter) else 0.0,
        jitter=kind.jitter if isinstance(kind, SparseMixerRouter) else 0.0,
        preference=address(preference),
    )


def head_norm_kind(norm: HeadNorm | None) -> int:
    """As AttentionLayer counts them."""
    if norm is None:
        return 0
    if norm.over == "all":
        return 3
    return 2 if norm.after_rope else 1
