"""The transformer: tokens in, logits out.

Knows:        the order of a layer's parts, the cache, when to ask for the next layer's experts.
Ignorant of:  how parts are computed, text, sampling, files, families, what the bits mean.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowmoe.decoder.computation import Cache, Computation
from lowmoe.experts.store import ExpertStore
from lowmoe.spec import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """A model ready to compute; it owns nothing."""

    spec: ModelSpec
    store: ExpertStore
    computation: Computation

    def new_cache(self, capacity: int) -> Cache:
        """An empty cache for at most `capacity` tokens."""
        return self.computation.new_cache(capacity)

    @torch.inference_mode()
    def forward(self, ids: Tensor, cache: Cache) -> Tensor:
        """Run tokens through all layers.  ids: [T] int64.  Returns the last hidden state, [T, H].

        The tokens follow those in the cache, and are in it afterwards.
        """
        x = self.computation.embed(ids)
        for layer_id in range(len(self.spec.layers)):
            x = self.computation.attend(x, layer_id, cache)
            routing = self.computation.route(x, layer_id)
            # What is sure is read before what is guessed.
            self.store.want(layer_id, routing.wanted())
            self._read_ahead(x, layer_id + 1)
            x = self.computation.mix(x, routing, layer_id, self.store)
        cache.n_tokens += ids.shape[0]
        return x

    @torch.inference_mode()
    def logits(self, x: Tensor) -> Tensor:
        """The scores of the next token.  x: [T, H] from forward.  Returns [T, V] float32."""
        return self.computation.logits(x)

    def _read_ahead(self, x: Tensor, layer_id: int) -> None:
        """Start reading the experts that layer_id will likely want.  x: this layer's [T, H].

        A residual stream changes slowly, so the next layer's own norm and router, applied one layer
        early, name most of its experts (benchmarks/read_ahead.py).
        """
        if layer_id == len(self.spec.layers) or self.store.has_all:
            return
        self.store.prefetch(layer_id, self.computation.foresee(x, layer_id).by_weight())
