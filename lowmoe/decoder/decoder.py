"""The transformer: tokens in, logits out.

Knows:        a pass from end to end, what is in the cache.
Ignorant of:  how it is computed, text, sampling, files, families, what the bits mean.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from lowmoe.decoder.computation import Cache, Computation, Together
from lowmoe.experts.lender import Lender
from lowmoe.kernels.shortage import shortages
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
        positions = torch.arange(ids.shape[0]) + cache.n_tokens
        x = self._with_room(lambda: self._run(ids, cache, positions))
        cache.n_tokens += ids.shape[0]
        return x

    @torch.inference_mode()
    def step(self, ids: Tensor, caches: Sequence[Cache]) -> Tensor:
        """Run one token of each of several conversations through all layers, every expert that any
        of them goes to once.  ids: [B] int64, at most max_tokens.  Returns [B, H].

        Native code gives each the bits it would have alone, for up to 8; others differ by the
        rounding of float32 sums.
        """
        assert len(caches) == ids.shape[0] > 0
        if len(caches) == 1:
            return self.forward(ids, caches[0])
        positions = torch.tensor([cache.n_tokens for cache in caches])
        together = Together(tuple(caches))
        x = self._with_room(lambda: self._run(ids, together, positions))
        for cache in caches:
            cache.n_tokens += 1
        return x

    def _run(self, ids: Tensor, cache: Cache | Together, positions: Tensor) -> Tensor:
        x = self.computation.embed(ids, positions)
        x = self.computation.run_layers(x, cache, self.store)
        if not self.store.is_complete:
            self.store.read_rest(self.spec.n_experts_by_layer)
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
                with shortages():
                    return work()
            except torch.OutOfMemoryError:
                if not self.store.give_back():
                    raise
