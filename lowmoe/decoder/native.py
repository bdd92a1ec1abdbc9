"""A pass in native code on the CPU, for models whose matrices are all trellis planes.

Knows:        which addresses and sizes the operations of lowmoe/kernels/cpu want.
Ignorant of:  files, what instruction sets there are.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from lowmoe.decoder.abilities import lacking
from lowmoe.decoder.computation import Cache, layer_by_layer
from lowmoe.decoder.moe import Routing
from lowmoe.decoder.rope import rope_frequencies, rope_length
from lowmoe.decoder.weights import DenseWeights, LayerWeights
from lowmoe.experts.store import ExpertStore
from lowmoe.kernels import cpu
from lowmoe.spec import (
    GroupedQueryAttention,
    HeadNorm,
    ModelSpec,
    Rope,
    Router,
    SigmoidRouter,
    SoftmaxRouter,
    grouped,
)
from quant.matrix import Matrix, TrellisMatrix
from quant.trellis import TrellisCode

# What it computes beyond a plain decoder, see lowmoe/decoder/abilities.py.
ABLE = frozenset(
    {
        "a bias behind attention",
        "another activation",
        "another scale of scores",
        "attention sinks",
        "biases of experts",
        "biases of queries, keys and values",
        "biases of routers",
        "biases of the choice",
        "clamped queries, keys and values",
        "experts without a choice",
        "layers without experts",
        "norms after rope",
        "norms of all heads together",
        "norms of single heads",
        "rope of a part of a head",
        "rope that lengthens",
        "routers by sigmoid",
        "scaled embeddings",
        "scaled layers",
        "scaled logits",
        "shared experts",
    }
)
_Route: TypeAlias = Callable[[int, int, int, int, int], None]


@dataclass(slots=True, kw_only=True)
class NativeCache:
    """Keys and values in pages of native memory."""

    pages: cpu.KvPages
    capacity: int
    n_tokens: int = 0


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
    ) -> None:
        """kv: how keys and values are kept; max_tokens: of one pass; n_context: of a cache."""
        assert not lacking(spec, ABLE), lacking(spec, ABLE)
        before = cpu.allocated_bytes()
        self._spec, self.weights, self._kv = spec, weights, kv
        self.max_tokens = max_tokens
        self._engine = cpu.engine(isa, pool, code, max_tokens=max_tokens)
        self._frequencies: dict[object, Tensor] = {}
        self._no_choice = torch.zeros(1, spec.n_hidden)
        # Layers that add r times what they compute to x are layers that add all of it to x / r.
        # Norms divide r out again, but for their epsilon.
        self._norm_epsilon = norm_epsilon(spec)
        self._n_context = n_context
        self._attention = cpu.Attention(
            self._engine,
            [self._attention_layer(i) for i in range(len(spec.layers))],
            max_context=n_context,
        )
        self._experts = cpu.Experts(
            self._engine, [self._experts_layer(i) for i in range(len(spec.layers))]
        )
        self._ends = cpu.Ends(
            engine=self._engine,
            embedding=self._linear(weights.embedding),
            final_norm=weights.final_norm.data_ptr(),
            norm_epsilon=self._norm_epsilon,
            head=self._linear(weights.head),
        )
        self._layers: tuple[ExpertStore, cpu.Layers] | None = None
        self._scratch_bytes = cpu.allocated_bytes() - before

    @property
    def working_bytes(self) -> int:
        """Scratch, and the few tensors that go from call to call."""
        experts = self._spec.uniform_experts()
        per_token = 4 * (2 * self._spec.n_hidden + 3 * experts.router.n_active) + 8
        return self._scratch_bytes + per_token * self.max_tokens + 4 * self._spec.n_vocab

    def new_cache(self, capacity: int) -> NativeCache:
        attention = grouped(self._spec.layers[0].attention)
        pages = cpu.KvPages(
            n_layers=len(self._spec.layers),
            n_kv_heads=attention.n_kv_heads,
            head_size=attention.head_size,
            format=self._kv,
        )
        return NativeCache(pages=pages, capacity=capacity)

    def cache_bytes(self, n_tokens: int) -> int:
        attention = grouped(self._spec.layers[0].attention)
        pages = -(-n_tokens // cpu.PAGE_TOKENS) * cpu.PAGE_TOKENS
        per_head = cpu.kv_head_bytes(self._kv, attention.head_size)
        return 2 * per_head * attention.n_kv_heads * len(self._spec.layers) * pages

    def embed(self, ids: Tensor) -> Tensor:
        x = torch.empty(ids.shape[0], self._spec.n_hidden)
        for first, part in self._chunks(ids):
            self._ends.embed(part.data_ptr(), part.shape[0], x[first:].data_ptr())
        return scaled(x, self._spec.embedding_scale / self._spec.residual_scale)

    def run_layers(self, x: Tensor, cache: Cache, store: ExpertStore) -> Tensor:
        """In place; in one call once every expert is in RAM."""
        if not store.is_complete:
            return layer_by_layer(self, len(self._spec.layers), x, cache, store)
        pages = self._pages(cache, x.shape[0])
        layers = self._layers_over(store)
        store.count_used(layers.run(pages, cache.n_tokens, x.data_ptr(), x.shape[0]))
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

    def attend(self, x: Tensor, layer_id: int, cache: Cache) -> Tensor:
        """Adds to x in place."""
        n_tokens = x.shape[0]
        pages = self._pages(cache, n_tokens)
        self._attention.run(layer_id, pages, cache.n_tokens, x.data_ptr(), n_tokens)
        return x

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
                self._experts.run(layer_id, ids, n_tokens, given)
        self._experts.add(layer_id, routing.weights.data_ptr(), n_tokens, x.data_ptr())
        return x

    def logits(self, x: Tensor) -> Tensor:
        scores = torch.empty(x.shape[0], self._spec.n_vocab)
        for first, part in self._chunks(x.contiguous()):
            self._ends.logits(part.data_ptr(), part.shape[0], scores[first:].data_ptr())
        return scaled(scores, self._spec.logit_scale)

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
        weights, spec = (
            self.weights.layers[layer_id],
            grouped(self._spec.layers[layer_id].attention),
        )
        rope, head_norm = spec.rope, spec.norm
        assert rope is not None
        return cpu.AttentionLayer(
            norm=weights.attention_norm.data_ptr(),
            norm_epsilon=self._norm_epsilon,
            qkv=self._linear(weights.qkv),
            out=self._linear(weights.attention_out),
            frequencies=self._frequencies_of(rope, spec).data_ptr(),
            n_heads=spec.n_heads,
            n_kv_heads=spec.n_kv_heads,
            head_size=spec.head_size,
            window=spec.window or 0,
            rope_size=rope.size or spec.head_size,
            rope_length=rope_length(rope, self._n_context),
            score_scale=spec.score_scale or spec.head_size**-0.5,
            qkv_bias=_address(weights.optional("qkv_bias")),
            out_bias=_address(weights.optional("attention_out_bias")),
            head_norm=head_norm_kind(head_norm),
            q_norm=_address(weights.optional("q_norm")),
            k_norm=_address(weights.optional("k_norm")),
            head_norm_epsilon=1.0 if head_norm is None else head_norm.epsilon,
            clamp=math.inf if spec.clamp is None else spec.clamp,
            sinks=_address(weights.optional("sinks")),
        )

    def _frequencies_of(self, rope: Rope, spec: GroupedQueryAttention) -> Tensor:
        """Shared by layers that turn alike, which native code knows by the address."""
        key = (rope, spec.head_size)
        if key not in self._frequencies:
            found = rope_frequencies(rope, spec.head_size, self._n_context)
            self._frequencies[key] = found.contiguous()
        return self._frequencies[key]

    def _experts_layer(self, layer_id: int) -> cpu.ExpertsLayer:
        weights = self.weights.layers[layer_id]
        has_shared = self._spec.layers[layer_id].feed_forward.shared is not None
        shared = self._shared(weights) if has_shared else None
        return experts_layer(self._spec, layer_id, weights, self._no_choice, shared)

    def _shared(self, weights: LayerWeights) -> cpu.SharedExpert:
        return cpu.SharedExpert(
            gate_up=self._linear(weights.parts["shared_gate_up"]),
            down=self._linear(weights.parts["shared_down"]),
            router=_address(weights.optional("shared_router")),
        )


def experts_layer(
    spec: ModelSpec,
    layer_id: int,
    weights: LayerWeights,
    no_choice: Tensor,
    shared: cpu.SharedExpert | None = None,
) -> cpu.ExpertsLayer:
    """A layer's experts but for their bytes; who calls keeps weights and no_choice alive.

    no_choice: [1, H] zeros, for a layer whose only expert every token uses.
    """
    of = spec.layers[layer_id].feed_forward
    return cpu.ExpertsLayer(
        norm=weights.experts_norm.data_ptr(),
        norm_epsilon=norm_epsilon(spec),
        router=_router(weights, of.router, no_choice),
        d_in=weights.transforms.d_in.data_ptr(),
        d_inner=weights.transforms.d_inner.data_ptr(),
        n_hidden=spec.n_hidden,
        n_experts=of.n_experts,
        n_inner=of.n_inner,
        steepness=of.activation.steepness,
        shift=of.activation.shift,
        limit=math.inf if of.activation.limit is None else of.activation.limit,
        gate_up_bias=_address(weights.optional("gate_up_bias")),
        down_bias=_address(weights.optional("down_bias")),
        shared=shared,
    )


def _router(weights: LayerWeights, kind: Router, no_choice: Tensor) -> cpu.Router:
    # One expert that every token uses is chosen by any router; one of zeros serves.
    sigmoid = kind if isinstance(kind, SigmoidRouter) else None
    scores = weights.optional("router")
    return cpu.Router(
        weights=_address(no_choice if scores is None else scores),
        bias=_address(weights.optional("router_bias")),
        choice_bias=_address(weights.optional("choice_bias")),
        sigmoid=sigmoid is not None,
        renormalize=isinstance(kind, SoftmaxRouter | SigmoidRouter) and kind.renormalize,
        n_active=kind.n_active,
        n_groups=1 if sigmoid is None else sigmoid.n_groups,
        n_groups_active=1 if sigmoid is None else sigmoid.n_groups_active,
        scale=1.0 if sigmoid is None else sigmoid.scale,
    )


def norm_epsilon(spec: ModelSpec) -> float:
    """Of norms over x / r, where layers add r times what they compute; see NativeComputation."""
    return spec.norm_epsilon / spec.residual_scale**2


def scaled(x: Tensor, factor: float) -> Tensor:
    """In place."""
    return x if factor == 1 else x.mul_(factor)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def head_norm_kind(norm: HeadNorm | None) -> int:
    """As AttentionLayer counts them."""
    if norm is None:
        return 0
    if norm.over == "all":
        return 3
    return 2 if norm.after_rope else 1
