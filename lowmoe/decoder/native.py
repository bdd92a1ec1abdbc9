"""A pass in native code on the CPU, for models whose matrices are all trellis planes.

Knows:        which addresses and sizes the operations of lowmoe/kernels/cpu want.
Ignorant of:  the order of layers, files, what instruction sets there are.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from lowmoe.decoder.computation import Cache, layer_by_layer
from lowmoe.decoder.moe import Routing
from lowmoe.decoder.rope import rope_frequencies
from lowmoe.decoder.weights import DenseWeights, LayerWeights
from lowmoe.experts.store import ExpertStore
from lowmoe.kernels import cpu
from lowmoe.spec import GroupedQueryAttention, ModelSpec
from quant.matrix import Matrix, TrellisMatrix
from quant.trellis import TrellisCode

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
        before = cpu.allocated_bytes()
        self._spec, self.weights, self._kv = spec, weights, kv
        self.max_tokens = max_tokens
        self._engine = cpu.engine(isa, pool, code, max_tokens=max_tokens)
        self._frequencies: dict[object, Tensor] = {}
        self._attention = cpu.Attention(
            self._engine,
            [self._attention_layer(i) for i in range(len(spec.layers))],
            max_context=n_context,
        )
        self._experts = cpu.Experts(self._engine, experts_layers(spec, weights.layers))
        self._ends = cpu.Ends(
            engine=self._engine,
            embedding=self._linear(weights.embedding),
            final_norm=weights.final_norm.data_ptr(),
            norm_epsilon=spec.norm_epsilon,
            head=self._linear(weights.head),
        )
        self._layers: tuple[ExpertStore, cpu.Layers] | None = None
        self._scratch_bytes = cpu.allocated_bytes() - before

    @property
    def working_bytes(self) -> int:
        """Scratch, and the few tensors that go from call to call."""
        experts = self._spec.layers[0].feed_forward
        per_token = 4 * (2 * self._spec.n_hidden + 3 * experts.router.n_active) + 8
        return self._scratch_bytes + per_token * self.max_tokens + 4 * self._spec.n_vocab

    def new_cache(self, capacity: int) -> NativeCache:
        attention = self._spec.layers[0].attention
        pages = cpu.KvPages(
            n_layers=len(self._spec.layers),
            n_kv_heads=attention.n_kv_heads,
            head_size=attention.head_size,
            format=self._kv,
        )
        return NativeCache(pages=pages, capacity=capacity)

    def cache_bytes(self, n_tokens: int) -> int:
        attention = self._spec.layers[0].attention
        pages = -(-n_tokens // cpu.PAGE_TOKENS) * cpu.PAGE_TOKENS
        per_head = cpu.kv_head_bytes(self._kv, attention.head_size)
        return 2 * per_head * attention.n_kv_heads * len(self._spec.layers) * pages

    def embed(self, ids: Tensor) -> Tensor:
        x = torch.empty(ids.shape[0], self._spec.n_hidden)
        for first, part in self._chunks(ids):
            self._ends.embed(part.data_ptr(), part.shape[0], x[first:].data_ptr())
        return x

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
                for layer in store.lend_all()
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
        return scores

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
        return cpu.AttentionLayer(
            norm=weights.attention_norm.data_ptr(),
            norm_epsilon=self._spec.norm_epsilon,
            qkv=self._linear(weights.qkv),
            out=self._linear(weights.attention_out),
            frequencies=self._frequencies_of(spec).data_ptr(),
            n_heads=spec.n_heads,
            n_kv_heads=spec.n_kv_heads,
            head_size=spec.head_size,
            window=spec.window or 0,
        )

    def _frequencies_of(self, spec: GroupedQueryAttention) -> Tensor:
        """Shared by layers that turn alike, which native code knows by the address."""
        key = (spec.rope, spec.head_size)
        if key not in self._frequencies:
            self._frequencies[key] = rope_frequencies(spec.rope, spec.head_size)
        return self._frequencies[key]


def experts_layers(spec: ModelSpec, weights: Sequence[LayerWeights]) -> list[cpu.ExpertsLayer]:
    """Norms and routers as native code wants them; who calls keeps the weights alive."""
    return [
        cpu.ExpertsLayer(
            norm=of.experts_norm.data_ptr(),
            norm_epsilon=spec.norm_epsilon,
            router=of.router.data_ptr(),
            d_in=of.transforms.d_in.data_ptr(),
            d_inner=of.transforms.d_inner.data_ptr(),
            n_hidden=spec.n_hidden,
            n_experts=layer.feed_forward.n_experts,
            n_inner=layer.feed_forward.n_inner,
            n_active=layer.feed_forward.router.n_active,
            renormalize=layer.feed_forward.router.renormalize,
        )
        for layer, of in zip(spec.layers, weights, strict=True)
    ]
