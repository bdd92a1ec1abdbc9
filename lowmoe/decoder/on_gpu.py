"""A pass on a GPU that holds the whole model: nothing on the way waits for the host.

Operations write into buffers made once. So a step of one token over a cache is the same work on the
same memory, whatever the token and its position: it is captured once and replayed.

Knows:        the order of a pass, what is captured.
Ignorant of:  which operations make up its parts, how experts came to the GPU, CUDA.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from lowmoe.decoder.abilities import lacking
from lowmoe.decoder.computation import Cache
from lowmoe.decoder.gpu_buffers import ABLE, Buffers
from lowmoe.decoder.gpu_parts import GpuParts, cache_bytes
from lowmoe.decoder.weights import DenseWeights
from lowmoe.experts.resident import ResidentExperts
from lowmoe.kernels import cpu
from lowmoe.kernels.gpu import Gpu
from lowmoe.spec import ModelSpec
from quant.trellis import TrellisCode


@dataclass(slots=True, kw_only=True)
class GpuCache:
    """Keys and values of one conversation, of each layer [1, B, capacity, row].

    step: one token's way through all layers, over this very memory.
    """

    keys: list[Tensor]
    values: list[Tensor]
    capacity: int
    step: Callable[[], None]
    n_tokens: int = 0


class GpuComputation:
    """Operations bound to a model's weights, which are in the GPU's memory."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: DenseWeights,
        code: TrellisCode,
        experts: ResidentExperts,
        gpu: Gpu,
        *,
        kv: cpu.KvFormat,
        max_tokens: int,
        n_context: int,
    ) -> None:
        """max_tokens: of one pass; n_context: of a cache."""
        assert not lacking(spec, ABLE), lacking(spec, ABLE)
        self.max_tokens = max_tokens
        self.working_bytes = Buffers.working_bytes(spec, gpu, max_tokens, n_context)
        self._spec, self._kv, self._experts, self._gpu = spec, kv, experts, gpu
        self._parts = GpuParts(
            spec, weights, code, gpu, kv=kv, max_tokens=max_tokens, n_context=n_context
        )
        self._n_used = sum(layer.feed_forward.router.n_active for layer in spec.layers)

    # --- the cache

    def new_cache(self, capacity: int) -> GpuCache:
        """All of it at once, since a captured step knows where it lies."""
        keys, values = self._parts.new_cache(capacity)
        b = self._parts.begin_with_zeros()  # capturing runs it
        step = self._gpu.capture(lambda: self._run(b, keys, values, 1))
        return GpuCache(keys=keys, values=values, capacity=capacity, step=step)

    def cache_bytes(self, n_tokens: int) -> int:
        return cache_bytes(self._spec, n_tokens, self._kv)

    # --- a pass

    def embed(self, ids: Tensor) -> Tensor:
        """In a buffer, until the next pass."""
        return self._parts.embed(ids)

    def run_layers(self, x: Tensor, cache: Cache, store: ResidentExperts) -> Tensor:
        """x: what `embed` returned."""
        assert isinstance(cache, GpuCache)
        assert store is self._experts
        b = self._parts.embedded(x, cache.n_tokens, cache.capacity)
        if b.n_tokens == 1:
            cache.step()
            store.count_used(self._n_used)
        else:
            self._run(b, cache.keys, cache.values, cache.n_tokens + b.n_tokens)
            store.expect_used()
        return b.x.clone()

    def logits(self, x: Tensor) -> Tensor:
        """On the host, which waits for them."""
        return self._parts.logits(x)

    def _run(self, b: Buffers, keys: list[Tensor], values: list[Tensor], end: int) -> None:
        """All layers for b.x at b.positions.  end: the position after the last."""
        experts = self._experts
        for layer_id, table in enumerate(experts.tables):
            self._parts.attend(layer_id, b, keys[layer_id], values[layer_id], end)
            self._parts.route(layer_id, b)
            if self._parts.has_experts(layer_id):
                if b.n_tokens > 1:
                    experts.used.add_(b.active[0])
                self._parts.mix(layer_id, b, table, experts.n_parts)
            self._parts.share(layer_id, b)
