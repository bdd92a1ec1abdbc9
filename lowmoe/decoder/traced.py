"""Computations that say when each pass, layer and part of a layer began and ended.

Knows:        what of a pass takes time.
Ignorant of:  how it is shown.
"""

from typing import Generic, Protocol, TypeVar

from torch import Tensor

from lowmoe.decoder.computation import Cache, Computation, LayerParts, Together, layer_by_layer
from lowmoe.decoder.cpu_share import CpuShare
from lowmoe.decoder.moe import Routing
from lowmoe.decoder.weights import DenseWeights
from lowmoe.experts.lender import Lender
from lowmoe.experts.store import ExpertStore
from lowmoe.kernels import cpu
from lowmoe.spec import ModelSpec
from lowmoe.timeline import CPU_EXPERTS, LAYERS, PASSES, Mark, Timeline
from quant.trellis import TrellisCode

L = TypeVar("L", bound=Lender)


class Layered(Computation[ExpertStore], LayerParts, Protocol):
    """A computation that can go layer by layer."""


class TracedPasses(Generic[L]):
    """Another computation, whose passes are spans."""

    def __init__(self, computation: Computation[L], timeline: Timeline) -> None:
        self._computation, self._timeline = computation, timeline
        self.max_tokens = computation.max_tokens

    @property
    def working_bytes(self) -> int:
        return self._computation.working_bytes

    def new_cache(self, capacity: int) -> Cache:
        return self._computation.new_cache(capacity)

    def cache_bytes(self, n_tokens: int) -> int:
        return self._computation.cache_bytes(n_tokens)

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        with self._timeline.span(PASSES, "embed"):
            return self._computation.embed(ids, positions)

    def run_layers(self, x: Tensor, cache: Cache | Together, store: L) -> Tensor:
        n_tokens, caches = x.shape[0], cache.caches if isinstance(cache, Together) else (cache,)
        cached = [of.n_tokens for of in caches]
        name = f"{n_tokens} token{'s' * (n_tokens > 1)} after {', '.join(map(str, cached))}"
        with self._timeline.span(PASSES, name, tokens=n_tokens, cached=sum(cached)):
            return self._through(x, cache, store)

    def _through(self, x: Tensor, cache: Cache | Together, store: L) -> Tensor:
        return self._computation.run_layers(x, cache, store)

    def logits(self, x: Tensor) -> Tensor:
        with self._timeline.span(PASSES, "logits"):
            return self._computation.logits(x)


class TracedLayers(TracedPasses[ExpertStore]):
    """One that goes layer by layer, whatever it would have done otherwise."""

    def __init__(self, computation: Layered, n_layers: int, timeline: Timeline) -> None:
        super().__init__(computation, timeline)
        self._parts, self._n_layers = computation, n_layers
        self.preference = computation.preference
        self._layer_began: Mark = timeline.now()

    def _through(self, x: Tensor, cache: Cache | Together, store: ExpertStore) -> Tensor:
        return layer_by_layer(self, self._n_layers, x, cache, store)

    def attend(self, x: Tensor, layer_id: int, cache: Cache | Together) -> Tensor:
        self._layer_began = self._timeline.now()
        with self._timeline.span(LAYERS, "attend"):
            return self._parts.attend(x, layer_id, cache)

    def route(self, x: Tensor, layer_id: int) -> Routing:
        with self._timeline.span(LAYERS, "route"):
            return self._parts.route(x, layer_id)

    def foresee(self, x: Tensor, layer_id: int) -> Routing:
        with self._timeline.span(LAYERS, "foresee"):
            return self._parts.foresee(x, layer_id)

    def mix(self, x: Tensor, routing: Routing, layer_id: int, store: ExpertStore) -> Tensor:
        timeline = self._timeline
        with timeline.span(LAYERS, "mix"):
            x = self._parts.mix(x, routing, layer_id, store)
        timeline.add(LAYERS, f"layer {layer_id}", self._layer_began, timeline.now(), layer=layer_id)
        return x


class TracedCpuShare(CpuShare):
    """Experts that the CPU computes beside a GPU."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: DenseWeights,
        code: TrellisCode,
        pool: cpu.Pool,
        timeline: Timeline,
        *,
        isa: str,
        max_tokens: int,
    ) -> None:
        super().__init__(spec, weights, code, pool, isa=isa, max_tokens=max_tokens)
        self._timeline = timeline

    def run(self, layer_id: int, experts: dict[int, tuple[Tensor, ...]]) -> None:
        ids = sorted(experts)
        name = f"layer {layer_id}: {', '.join(map(str, ids))}"
        with self._timeline.span(CPU_EXPERTS, name, layer=layer_id, experts=ids):
            super().run(layer_id, experts)
