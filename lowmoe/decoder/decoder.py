"""The transformer: tokens in, logits out.

Knows:        the order of a layer's parts, the cache, when to ask for the next layer's experts.
Ignorant of:  text, sampling, files, families, what the bits of weights mean.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowmoe.decoder.attention import attend
from lowmoe.decoder.kv_cache import KvCache
from lowmoe.decoder.moe import Routing, mix_experts
from lowmoe.decoder.norm import rms_norm
from lowmoe.decoder.weights import DenseWeights, LayerWeights
from lowmoe.experts.store import ExpertStore
from lowmoe.kernels import Kernels
from lowmoe.spec import LayerSpec, ModelSpec
from quant.expert import ExpertFormat


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """A model ready to compute; it owns nothing and keeps no state between calls.

    dtype: of activations and of the cache.
    """

    spec: ModelSpec
    weights: DenseWeights
    store: ExpertStore
    format: ExpertFormat
    kernels: Kernels
    dtype: torch.dtype

    def new_cache(self, capacity: int) -> KvCache:
        """An empty cache for at most `capacity` tokens."""
        return KvCache(self.spec, capacity, self.dtype)

    @torch.inference_mode()
    def forward(self, ids: Tensor, cache: KvCache) -> Tensor:
        """Run tokens through all layers.  ids: [T] int64.  Returns the last hidden state, [T, H].

        The tokens follow those in the cache, and are in it afterwards.
        """
        x = self.kernels.embed(ids, self.weights.embedding, self.dtype)
        for layer_id, layer in enumerate(self.weights.layers):
            x = self._layer(x, layer_id, self.spec.layers[layer_id], layer, cache)
        cache.n_tokens += ids.shape[0]
        return x

    @torch.inference_mode()
    def logits(self, x: Tensor) -> Tensor:
        """The scores of the next token.  x: [T, H] from forward.  Returns [T, V] float32."""
        x = rms_norm(x, self.weights.final_norm, self.spec.norm_epsilon)
        return self.kernels.linear(x, self.weights.head).float()

    def _layer(
        self, x: Tensor, layer_id: int, spec: LayerSpec, weights: LayerWeights, cache: KvCache
    ) -> Tensor:
        normed = rms_norm(x, weights.attention_norm, self.spec.norm_epsilon)
        x = x + attend(
            normed, weights, spec.attention, cache.layers[layer_id], cache.n_tokens, self.kernels
        )
        normed = rms_norm(x, weights.experts_norm, self.spec.norm_epsilon)
        routing = Routing.of(normed, weights.router, spec.feed_forward.router)
        self.store.want(layer_id, routing.wanted())  # what is sure is read before what is guessed
        self._read_ahead(x, layer_id + 1)
        return x + mix_experts(
            normed,
            routing,
            layer_id,
            store=self.store,
            format=self.format,
            transforms=weights.transforms,
            kernels=self.kernels,
        )

    def _read_ahead(self, x: Tensor, layer_id: int) -> None:
        """Start reading the experts that layer_id will likely want.  x: this layer's [T, H].

        A residual stream changes slowly, so the next layer's own norm and router, applied one layer
        early, name most of its experts (benchmarks/read_ahead.py).
        """
        if layer_id == len(self.weights.layers):
            return
        weights, spec = self.weights.layers[layer_id], self.spec.layers[layer_id]
        normed = rms_norm(x, weights.experts_norm, self.spec.norm_epsilon)
        guess = Routing.of(normed, weights.router, spec.feed_forward.router)
        self.store.prefetch(layer_id, guess.by_weight())
