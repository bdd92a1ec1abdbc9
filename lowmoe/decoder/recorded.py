"""A computation that remembers where tokens were routed.

Knows:        the order of layers and tokens.
Ignorant of:  what is made of it.
"""

import torch
from torch import Tensor

from lowmoe.decoder.computation import Cache, layer_by_layer
from lowmoe.decoder.moe import Routing
from lowmoe.decoder.traced import Layered
from lowmoe.experts.store import ExpertStore
from lowmoe.spec import ModelSpec


class RecordedRouting:
    """Another computation, layer by layer whatever it would have done otherwise."""

    def __init__(self, computation: Layered, spec: ModelSpec) -> None:
        self._computation = computation
        self._layers = [i for i, n in enumerate(spec.n_experts_by_layer) if n]
        self._n_layers = len(spec.layers)
        self._passes: list[Tensor] = []
        self._now: list[Tensor] = []
        self.max_tokens, self.preference = computation.max_tokens, computation.preference

    @property
    def working_bytes(self) -> int:
        return self._computation.working_bytes

    def experts(self) -> Tensor:
        """Those of all tokens so far, [T, L, K] int64, of layers that have experts."""
        return torch.cat(self._passes)

    def new_cache(self, capacity: int) -> Cache:
        return self._computation.new_cache(capacity)

    def cache_bytes(self, n_tokens: int) -> int:
        return self._computation.cache_bytes(n_tokens)

    def embed(self, ids: Tensor) -> Tensor:
        return self._computation.embed(ids)

    def run_layers(self, x: Tensor, cache: Cache, store: ExpertStore) -> Tensor:
        self._now = []
        x = layer_by_layer(self, self._n_layers, x, cache, store)
        self._passes.append(torch.stack(self._now, 1))  # a pass that was interrupted leaves none
        return x

    def logits(self, x: Tensor) -> Tensor:
        return self._computation.logits(x)

    # --- the parts

    def attend(self, x: Tensor, layer_id: int, cache: Cache) -> Tensor:
        return self._computation.attend(x, layer_id, cache)

    def route(self, x: Tensor, layer_id: int) -> Routing:
        routing = self._computation.route(x, layer_id)
        if layer_id in self._layers:
            self._now.append(routing.expert_ids.clone())
        return routing

    def foresee(self, x: Tensor, layer_id: int) -> Routing:
        return self._computation.foresee(x, layer_id)

    def mix(self, x: Tensor, routing: Routing, layer_id: int, store: ExpertStore) -> Tensor:
        return self._computation.mix(x, routing, layer_id, store)
