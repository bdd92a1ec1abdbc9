"""A pass in native code on the CPU, for models whose matrices are all trellis planes.

Knows:        which addresses and sizes the operations of lowmoe/kernels/cpu want.
Ignorant of:  files, what instruction sets there are.
"""

import math
from collections.abc import Callable, Iterator
from typing import TypeAlias

import torch
from torch import Tensor

from lowmoe.decoder.abilities import lacking
from lowmoe.decoder.computation import Cache, Together, layer_by_layer
from lowmoe.decoder.moe import Routing
from lowmoe.decoder.native_norms import (
    address,
    attention_norm,
    experts_norm,
    kept,
    native_norm,
    norm_epsilons,
    out_norm,
)
from lowmoe.decoder.native_states import NativeStates, numbered
from lowmoe.decoder.preference import Preference
from lowmoe.decoder.rope import rope_frequencies, rope_length
from lowmoe.decoder.state_cache import StatefulCache, states_bytes
from lowmoe.decoder.weights import DenseWeights, LayerWeights
from lowmoe.experts.store import ExpertStore
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
from quant.trellis import TrellisCode

# What it computes beyond a plain decoder, see lowmoe/decoder/abilities.py.
ABLE = frozenset(
    {
        "a bias behind attention",
        "a bias of the head",
        "activations with a cubic term",
        "another activation",
        "another scale of scores",
        "attention sinks",
        "biases of experts",
        "biases of norms",
        "biases of queries, keys and values",
        "biases of routers",
        "biases of the choice",
        "capped scores",
        "chunks",
        "clamped queries, keys and values",
        "experts without a choice",
        "experts without a gate",
        "gated delta nets",
        "gates behind attention",
        "latent attention",
        "layer norms",
        "layers that add to their norms",
        "layers without experts",
        "layers without rope",
        "learned positions",
        "lightning attention",
        "norms after rope",
        "norms behind layers",
        "norms of all heads together",
        "norms of single heads",
        "norms without weights",
        "rope by length",
        "rope of a part of a head",
        "rope that lengthens",
        "routers by sigmoid",
        "routers of a given spread",
        "scaled embeddings",
        "scaled layers",
        "scaled logits",
        "shared experts",
        "softmax routers with groups or a scale",
        "sparse mixers",
        "temperatures of queries",
        "weights on what experts are given",
    }
)
_Route: TypeAlias = Callable[[int, int, int, int, int], None]


class NativeCache(StatefulCache):
    """Keys and values in pages of native memory, and states."""

    def __init__(self, spec: ModelSpec, pages: cpu.KvPages, capacity: int) -> None:
        super().__init__(spec, capacity)
        self.pages = pages


class NativeComputation:
    """Operations bound to a model's dense weights, which it keeps alive."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: DenseWeights,
        code: TrellisCode,
        pool: cpu.Pool,
        *,
        isa: str,
        kv: cpu.KvFormat,
        max_tokens: int,
        n_context: int,
        n_sequences: int = 1,
        preference: Preference | None = None,
    ) -> None:
        """kv: how keys and values are kept; max_tokens: of one pass; n_context: of a cache;
        n_sequences: conversations that a pass may have one token each of.
        """
        assert not lacking(spec, ABLE), lacking(spec, ABLE)
        before = cpu.allocated_bytes()
        self._spec, self.weights, self._kv = spec, weights, kv
        self.max_tokens, self.preference = max_tokens, preference
        self._engine = cpu.engine(isa, pool, code, max_tokens=max_tokens)
        self._frequencies: dict[object, Tensor] = {}
        self._no_choice = torch.zeros(1, spec.n_hidden)
        self._ones = torch.ones(max(_heads_sizes(spec), default=0))
        self._n_context = n_context
        self._whole = numbered(spec, GroupedQueryAttention | LatentAttention)
        self._attention = cpu.Attention(
            self._engine,
            [self._attention_layer(i) for i in self._whole],
            max_context=n_context,
            max_sequences=n_sequences,
        )
        self._states = NativeStates(spec, weights, self._engine, self._linear)
        self._experts = cpu.Experts(
            self._engine, [self._experts_layer(i) for i in range(len(spec.layers))]
        )
        self._ends = cpu.Ends(
            engine=self._engine,
            embedding=self._linear(weights.embedding),
            final_norm=native_norm(
                spec, weights.final_norm, weights.final_norm_bias, norm_epsilons(spec).final
            ),
            head=self._linear(weights.head),
        )
        self._layers: tuple[ExpertStore, cpu.Layers] | None = None
        self._scratch_bytes = cpu.allocated_bytes() - before

    @property
    def working_bytes(self) -> int:
        """Scratch, and the few tensors that go from call to call."""
        experts = self._spec.uniform_experts()
        per_token = 4 * (2 * self._spec.n_hidden + 3 * experts.router.n_active) + 8
        own = self._scratch_bytes + self._states.n_bytes
        return own + per_token * self.max_tokens + 4 * self._spec.n_vocab

    def new_cache(self, capacity: int) -> NativeCache:
        n_heads, size, keys_only = self._cached
        pages = cpu.KvPages(
            n_layers=len(self._whole),
            n_kv_heads=n_heads,
            head_size=size,
            format=self._kv,
            keys_only=keys_only,
        )
        return NativeCache(self._spec, pages, capacity)

    @property
    def _cached(self) -> tuple[int, int, bool]:
        """Heads, their size, and whether keys are all that is kept: of a latent both parts as one
        head, whose first channels serve as its value.
        """
        attention = self._spec.layers[next(iter(self._whole))].attention
        if isinstance(attention, LatentAttention):
            return 1, attention.kv_rank + attention.rope_size, True
        attention = grouped(attention)
        return attention.n_kv_heads, attention.head_size, False

    def cache_bytes(self, n_tokens: int) -> int:
        n_heads, size, keys_only = self._cached
        pages = -(-n_tokens // cpu.PAGE_TOKENS) * cpu.PAGE_TOKENS
        per_token = cpu.kv_head_bytes(self._kv, size) * n_heads * (1 if keys_only else 2)
        return per_token * len(self._whole) * pages + states_bytes(self._spec)

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        x = torch.empty(ids.shape[0], self._spec.n_hidden)
        for row, part in self._chunks(ids):
            self._ends.embed(part.data_ptr(), part.shape[0], x[row:].data_ptr())
        # Layers that add r times what they compute to x are layers that add all of it to x / r.
        # Norms divide r out again, but for their epsilon.
        x = scaled(x, self._spec.embedding_scale / self._spec.residual_scale)
        if self._spec.learned_positions:
            assert self.weights.positions is not None
            learned = self.weights.positions[positions]
            x.add_(learned, alpha=1 / self._spec.residual_scale)
        return x

    def run_layers(self, x: Tensor, cache: Cache | Together, store: ExpertStore) -> Tensor:
        """In place; in one call once every expert is in RAM."""
        if not store.is_complete or self._states:
            return layer_by_layer(self, len(self._spec.layers), x, cache, store)
        if self.preference is not None:
            self.preference.forget()
        layers = self._layers_over(store)
        if isinstance(cache, Together):
            n_used = layers.step(self._places(cache), x.data_ptr())
        else:
            pages = self._pages(cache, x.shape[0])
            n_used = layers.run(pages, cache.n_tokens, x.data_ptr(), x.shape[0])
        store.count_used(n_used)
        return x

    def _layers_over(self, store: ExpertStore) -> cpu.Layers:
        """All layers with the experts of a complete store."""
        if self._layers is None or self._layers[0] is not store:
            addresses = [
                [[part.data_ptr() for part in parts] for parts in layer]
                for layer in store.lend_all(len(self._spec.layers))
            ]
            self._layers = store, cpu.Layers(self._attention, self._experts, addresses)
        return self._layers[1]

    def attend(self, x: Tensor, layer_id: int, cache: Cache | Together) -> Tensor:
        """Adds to x in place."""
        if isinstance(cache, Together):
            self._attend_together(x, layer_id, cache)
            return x
        assert isinstance(cache, NativeCache)
        n_tokens = x.shape[0]
        if layer_id in self._states:
            self._states.run(x, layer_id, cache)
            return x
        pages = self._pages(cache, n_tokens)
        number = self._whole[layer_id]
        self._attention.run(number, pages, cache.n_tokens, x.data_ptr(), n_tokens)
        return x

    def _attend_together(self, x: Tensor, layer_id: int, together: Together) -> None:
        """Of one token each.  Adds to x in place."""
        if layer_id not in self._states:
            self._attention.step(self._whole[layer_id], self._places(together), x.data_ptr())
            return
        for row, cache in zip(x.split(1), together.caches, strict=True):
            assert isinstance(cache, NativeCache)
            self._states.run(row, layer_id, cache)

    def route(self, x: Tensor, layer_id: int) -> Routing:
        return self._routed(self._experts.route, x, layer_id)

    def foresee(self, x: Tensor, layer_id: int) -> Routing:
        return self._routed(self._experts.foresee, x, layer_id)

    def mix(self, x: Tensor, routing: Routing, layer_id: int, store: ExpertStore) -> Tensor:
        """Adds to x in place."""
        ids, n_tokens = routing.expert_ids.data_ptr(), x.shape[0]
        for group in store.portions():
            with store.borrow(layer_id, group) as experts:
                given = [(e, [p.data_ptr() for p in parts]) for e, parts in experts.items()]
                self._experts.run(layer_id, ids, n_tokens, given, routing.weights.data_ptr())
        self._experts.add(layer_id, routing.weights.data_ptr(), n_tokens, x.data_ptr())
        return x

    def logits(self, x: Tensor) -> Tensor:
        scores = torch.empty(x.shape[0], self._spec.n_vocab)
        for first, part in self._chunks(x.contiguous()):
            self._ends.logits(part.data_ptr(), part.shape[0], scores[first:].data_ptr())
        if self.weights.head_bias is not None:
            scores += self.weights.head_bias
        return scaled(scores, self._spec.logit_scale)

    def _places(self, together: Together) -> list[tuple[cpu.KvPages, int]]:
        """Where a token after those in each cache is."""
        return [(self._pages(cache, 1), cache.n_tokens) for cache in together.caches]

    @staticmethod
    def _pages(cache: Cache, n_tokens: int) -> cpu.KvPages:
        """The pages of a cache, with room for n_tokens more."""
        assert isinstance(cache, NativeCache)
        end = cache.n_tokens + n_tokens
        assert end <= cache.capacity, (end, cache.capacity)
        if end > cache.pages.n_reserved:
            cache.pages.reserve(end)
        return cache.pages

    def _chunks(self, rows: Tensor) -> list[tuple[int, Tensor]]:
        step = self.max_tokens
        return [(first, rows[first : first + step]) for first in range(0, rows.shape[0], step)]

    def _routed(self, route: _Route, x: Tensor, layer_id: int) -> Routing:
        n_active = self._spec.layers[layer_id].feed_forward.router.n_active
        weights = torch.empty(x.shape[0], n_active)
        ids = torch.empty(x.shape[0], n_active, dtype=torch.int64)
        route(layer_id, x.data_ptr(), x.shape[0], weights.data_ptr(), ids.data_ptr())
        return Routing(weights, ids)

    def _linear(self, matrix: Matrix) -> cpu.Linear:
        assert isinstance(matrix, TrellisMatrix)
        layout = matrix.layout
        planes = [plane.data_ptr() for plane in matrix.planes]
        return cpu.Linear(self._engine, layout.n_out, layout.n_in, planes, matrix.d.data_ptr())

    def _attention_layer(self, layer_id: int) -> cpu.AttentionLayer:
        weights, spec = self.weights.layers[layer_id], self._spec.layers[layer_id].attention
        if isinstance(spec, LatentAttention):
            return self._latent_layer(layer_id, spec)
        spec = grouped(spec)
        rope, head_norm, temperature = spec.rope, spec.norm, spec.temperature
        return cpu.AttentionLayer(
            norm=attention_norm(self._spec, weights, layer_id),
            qkv=self._linear(weights.qkv),
            out=self._linear(weights.attention_out),
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

    def _head_norm(self, weights: LayerWeights, spec: GroupedQueryAttention, name: str) -> int:
        """Where its weights are; ones, where it is one without."""
        if spec.norm is None or spec.norm.weighted:
            return address(weights.optional(name))
        return self._ones.data_ptr()

    def _latent_layer(self, layer_id: int, spec: LatentAttention) -> cpu.AttentionLayer:
        """A single key-value head of what is kept; see lowmoe/kernels/cpu/latent.h."""
        weights = self.weights.layers[layer_id]
        down = None if spec.q_rank is None else self._linear(weights.parts["q_down"])
        latent = cpu.LatentProjection(
            engine=self._engine,
            q_down=down,
            q_norm=address(weights.optional("q_latent_norm")),
            q_up=self._linear(weights.parts["q" if down is None else "q_up"]),
            kv_down=self._linear(weights.parts["kv_down"]),
            kv_norm=weights.vector("kv_latent_norm").data_ptr(),
            norm_epsilon=spec.norm_epsilon,
            kv_up=self._linear(weights.parts["kv_up"]),
            n_heads=spec.n_heads,
            plain_size=spec.plain_size,
            rope_size=spec.rope_size,
            value_size=spec.value_size,
        )
        return cpu.AttentionLayer(
            norm=attention_norm(self._spec, weights, layer_id),
            qkv=None,
            out=self._linear(weights.attention_out),
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

    def _experts_layer(self, layer_id: int) -> cpu.ExpertsLayer:
        weights = self.weights.layers[layer_id]
        has_shared = self._spec.layers[layer_id].feed_forward.shared is not None
        shared = self._shared(weights) if has_shared else None
        factors = None if self.preference is None else self.preference.factors[layer_id]
        return experts_layer(self._spec, layer_id, weights, self._no_choice, shared, factors)

    def _shared(self, weights: LayerWeights) -> cpu.SharedExpert:
        return cpu.SharedExpert(
            gate_up=self._linear(weights.parts["shared_gate_up"]),
            down=self._linear(weights.parts["shared_down"]),
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


def scaled(x: Tensor, factor: float) -> Tensor:
    """In place."""
    return x if factor == 1 else x.mul_(factor)


def head_norm_kind(norm: HeadNorm | None) -> int:
    """As AttentionLayer counts them."""
    if norm is None:
        return 0
    if norm.over == "all":
        return 3
    return 2 if norm.after_rope else 1
