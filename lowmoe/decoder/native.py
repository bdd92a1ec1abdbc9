"""A pass in native code on the CPU, for models whose matrices are all trellis planes.

Knows:        which addresses and sizes the operations of lowmoe/kernels/cpu want.
Ignorant of:  files, what instruction sets there are.
"""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from lowmoe.decoder.abilities import lacking
from lowmoe.decoder.computation import Cache, Together, layer_by_layer
from lowmoe.decoder.moe import Routing
from lowmoe.decoder.native_layers import NativeLayers
from lowmoe.decoder.native_norms import (
    native_norm,
    norm_epsilons,
)
from lowmoe.decoder.native_states import NativeStates, numbered
from lowmoe.decoder.preference import Preference
from lowmoe.decoder.state_cache import StatefulCache, states_bytes
from lowmoe.decoder.weights import DenseWeights
from lowmoe.experts.store import ExpertStore
from lowmoe.kernels import cpu
from lowmoe.spec import (
    GroupedQueryAttention,
    LatentAttention,
    ModelSpec,
    grouped,
)
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
        self._made = made = NativeLayers(
            spec,
            weights,
            self._engine,
            n_context=n_context,
            preferences=None if preference is None else preference.factors,
        )
        self._whole = numbered(spec, GroupedQueryAttention | LatentAttention)
        self._attention = cpu.Attention(
            self._engine,
            [made.attention(i) for i in self._whole],
            max_context=n_context,
            max_sequences=n_sequences,
        )
        self._states = NativeStates(spec, weights, self._engine, made.linear)
        self._experts = cpu.Experts(
            self._engine, [made.experts(i) for i in range(len(spec.layers))]
        )
        self._ends = cpu.Ends(
            engine=self._engine,
            embedding=made.linear(weights.embedding),
            final_norm=native_norm(
                spec, weights.final_norm, weights.final_norm_bias, norm_epsilons(spec).final
            ),
            head=made.linear(weights.head),
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


def scaled(x: Tensor, factor: float) -> Tensor:
    """In place."""
    return x if factor == 1 else x.mul_(factor)
