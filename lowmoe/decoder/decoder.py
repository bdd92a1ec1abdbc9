"""The transformer: tokens in, logits out.

Knows:        a pass from end to end, what is in the cache.
Ignorant of:  how it is computed, text, sampling, files, families, what the bits mean.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from lowmoe.decoder.computation import Cache, Computation
from lowmoe.experts.lender import Lender
from lowmoe.spec import ModelSpec

L = TypeVar("L", bound=Lender)
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder(Generic[L]):
    """A model ready to compute; it owns nothing."""

    spec: ModelSpec
    store: L
    computation: Computation[L]

    def new_cache(self, capacity: int) -> Cache:
        """An empty cache for at most `capacity` tokens."""
        return self._with_room(lambda: self.computation.new_cache(capacity))

    @torch.inference_mode()
    def forward(self, ids: Tensor, cache: Cache) -> Tensor:
        """Run tokens through all layers.  ids: [T] int64.  Returns the last hidden state, [T, H].

        The tokens follow those in the cache, and are in it afterwards.
        """
        return self._with_room(lambda: self._forward(ids, cache))

    def _forward(self, ids: Tensor, cache: Cache) -> Tensor:
        x = self.computation.embed(ids)
        x = self.computation.run_layers(x, cache, self.store)
        if not self.store.is_complete:
            self.store.read_rest(self.spec.n_experts_by_layer)
        cache.n_tokens += ids.shape[0]
        return x

    @torch.inference_mode()
    def logits(self, x: Tensor) -> Tensor:
        """The scores of the next token.  x: [T, H] from forward.  Returns [T, V] float32."""
        return self._with_room(lambda: self.computation.logits(x))

    def _with_room(self, work: Callable[[], T]) -> T:
        """Do work; where a GPU's memory does not do, with fewer experts there, from its beginning:
        nothing has changed that work does not write again.
        """
        while True:
            try:
                return work()
            except torch.OutOfMemoryError:
                if not self.store.give_back():
                    raise
