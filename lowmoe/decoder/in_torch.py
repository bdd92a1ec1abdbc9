"""A pass in plain torch: slow, right, for weights in any format.

Knows:        which function computes each part, norms between them.
Ignorant of:  the order of layers, files, how weights are kept.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowmoe.decoder.attention import attend
from lowmoe.decoder.computation import Cache, layer_by_layer
from lowmoe.decoder.kv_cache import KvCache, cache_bytes
from lowmoe.decoder.moe import Routing, mix_experts
from lowmoe.decoder.norm import rms_norm
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

    @property
    def working_bytes(self) -> int:
        return working_bytes(self.spec, self.max_tokens, self.n_context, self.kernels)

    def new_cache(self, capacity: int) -> KvCache:
        return KvCache(self.spec, capacity, self.dtype)

    def cache_bytes(self, n_tokens: int) -> int:
        return cache_bytes(self.spec, n_tokens, self.dtype)

    def embed(self, ids: Tensor) -> Tensor:
        return self.kernels.embed(ids, self.weights.embedding, self.dtype)

    def run_layers(self, x: Tensor, cache: Cache, store: ExpertStore) -> Tensor:
        return layer_by_layer(self, len(self.spec.layers), x, cache, store)

    def attend(self, x: Tensor, layer_id: int, cache: Cache) -> Tensor:
        assert isinstance(cache, KvCache)
        weights, spec = self.weights.layers[layer_id], self.spec.layers[layer_id].attention
        normed = rms_norm(x, weights.attention_norm, self.spec.norm_epsilon)
        out = attend(normed, weights, spec, cache.layers[layer_id], cache.n_tokens, self.kernels)
        return x + out

    def route(self, x: Tensor, layer_id: int) -> Routing:
        weights, spec = self.weights.layers[layer_id], self.spec.layers[layer_id].feed_forward
        normed = rms_norm(x, weights.experts_norm, self.spec.norm_epsilon)
        return Routing.of(normed, weights.router, spec.router)

    def foresee(self, x: Tensor, layer_id: int) -> Routing:
        return self.route(x, layer_id)

    def mix(self, x: Tensor, routing: Routing, layer_id: int, store: ExpertStore) -> Tensor:
        assert routing.given is not None
        return x + mix_experts(
            routing.given,
            routing,
            layer_id,
            store=store,
            format=self.format,
            transforms=self.weights.layers[layer_id].transforms,
            kernels=self.kernels,
        )

    def logits(self, x: Tensor) -> Tensor:
        x = rms_norm(x, self.weights.final_norm, self.spec.norm_epsilon)
        return self.kernels.linear(x, self.weights.head).float()
