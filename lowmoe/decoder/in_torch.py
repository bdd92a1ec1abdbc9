"""A pass in plain torch: slow, right, for weights in any format.

Knows:        which function computes each part, norms between them.
Ignorant of:  the order of layers, files, how weights are kept.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowmoe.decoder.attention import attend, plus_bias
from lowmoe.decoder.computation import Cache, Together, layer_by_layer
from lowmoe.decoder.kv_cache import KvCache, cache_bytes
from lowmoe.decoder.moe import Routing, mix_experts, shared_output
from lowmoe.decoder.norm import norm, normed_output, residual_sum
from lowmoe.decoder.preference import Preference
from lowmoe.decoder.weights import DenseWeights
from lowmoe.decoder.working import working_bytes
from lowmoe.experts.store import ExpertStore
from lowmoe.kernels import Kernels
from lowmoe.spec import ModelSpec
from quant.expert import ExpertFormat


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchComputation:
    """dtype: of activations and of the cache; max_tokens, n_context: the most there will be."""

    spec: ModelSpec
    weights: DenseWeights
    format: ExpertFormat
    kernels: Kernels
    dtype: torch.dtype
    max_tokens: int
    n_context: int
    preference: Preference | None = None

    @property
    def working_bytes(self) -> int:
        return working_bytes(self.spec, self.max_tokens, self.n_context, self.kernels)

    def new_cache(self, capacity: int) -> KvCache:
        return KvCache(self.spec, capacity, self.dtype)

    def cache_bytes(self, n_tokens: int) -> int:
        return cache_bytes(self.spec, n_tokens, self.dtype)

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        x = self.kernels.embed(ids, self.weights.embedding, self.dtype)
        x = _scaled(x, self.spec.embedding_scale)
        if not self.spec.learned_positions:
            return x
        assert self.weights.positions is not None
        return x + self.weights.positions[positions].to(x.dtype)

    def run_layers(self, x: Tensor, cache: Cache | Together, store: ExpertStore) -> Tensor:
        return layer_by_layer(self, len(self.spec.layers), x, cache, store)

    def attend(self, x: Tensor, layer_id: int, cache: Cache | Together) -> Tensor:
        if isinstance(cache, Together):
            rows = zip(x.split(1), cache.caches, strict=True)
            return torch.cat([self.attend(row, layer_id, of_row) for row, of_row in rows])
        assert isinstance(cache, KvCache)
        weights, layer = self.weights.layers[layer_id], self.spec.layers[layer_id]
        bias = weights.optional("attention_norm_bias")
        normed = norm(x, weights.attention_norm, bias, self.spec)
        kept = cache.layers[layer_id]
        out = attend(normed, weights, layer.attention, kept, cache.n_tokens, self.kernels)
        out = normed_output(out, "attention_out_norm", weights, self.spec)
        return residual_sum(x, normed, out, layer.attention_residual, self.spec.residual_scale)

    def route(self, x: Tensor, layer_id: int) -> Routing:
        weights, spec = self.weights.layers[layer_id], self.spec.layers[layer_id].feed_forward
        bias = weights.optional("experts_norm_bias")
        normed = norm(x, weights.experts_norm, bias, self.spec)
        factors = None if self.preference is None else self.preference.factors[layer_id]
        return Routing.of(normed, weights, spec.router, factors)

    def foresee(self, x: Tensor, layer_id: int) -> Routing:
        return self.route(x, layer_id)

    def mix(self, x: Tensor, routing: Routing, layer_id: int, store: ExpertStore) -> Tensor:
        assert routing.given is not None
        weights, layer = self.weights.layers[layer_id], self.spec.layers[layer_id]
        spec = layer.feed_forward
        mixed = mix_experts(
            routing,
            layer_id,
            spec,
            store=store,
            format=self.format,
            weights=weights,
            kernels=self.kernels,
        )
        shared = shared_output(routing.given, spec, weights, self.kernels)
        out = mixed if shared is None else mixed + shared
        out = normed_output(out, "experts_out_norm", weights, self.spec)
        how, scale = layer.feed_forward_residual, self.spec.residual_scale
        return residual_sum(x, routing.given, out, how, scale)

    def logits(self, x: Tensor) -> Tensor:
        x = norm(x, self.weights.final_norm, self.weights.final_norm_bias, self.spec)
        scores = plus_bias(self.kernels.linear(x, self.weights.head), self.weights.head_bias)
        return _scaled(scores.float(), self.spec.logit_scale)


def _scaled(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1 else x * factor
