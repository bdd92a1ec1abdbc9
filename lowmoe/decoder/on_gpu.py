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
from lowmoe.decoder.computation import Cache, Together
from lowmoe.decoder.gpu_buffers import ABLE, Buffers
from lowmoe.decoder.gpu_parts import GpuParts, cache_bytes, copy_rows
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

    def keep(self, n_tokens: int) -> int:
        """Forget all but the first n_tokens."""
        self.n_tokens = n_tokens
        return n_tokens

    def copy_from(self, other: Cache, n_tokens: int) -> int:
        """Have what another has of its first n_tokens."""
        assert isinstance(other, GpuCache)
        copy_rows(other.keys + other.values, self.keys + self.values, n_tokens)
        self.n_tokens = n_tokens
        return n_tokens


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
        step = self._gpu.capture(lambda: self._run(b, self._attend_one(b, keys, values, 1)))
        return GpuCache(keys=keys, values=values, capacity=capacity, step=step)

    def cache_bytes(self, n_tokens: int) -> int:
        return cache_bytes(self._spec, n_tokens, self._kv)

    # --- a pass

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """In a buffer, until the next pass."""
        return self._parts.embed(ids)

    def run_layers(self, x: Tensor, cache: Cache | Together, store: ResidentExperts) -> Tensor:
        """x: what `embed` returned."""
        assert store is self._experts
        if isinstance(cache, Together):
            return self._run_together(x, cache, store)
        assert isinstance(cache, GpuCache)
        b = self._parts.embedded(x, cache.n_tokens, cache.capacity)
        if b.n_tokens == 1:
            cache.step()
            store.count_used(self._n_used)
        else:
            end = cache.n_tokens + b.n_tokens
            self._run(b, self._attend_one(b, cache.keys, cache.values, end))
            store.expect_used()
        return b.x.clone()

    def _run_together(self, x: Tensor, together: Together, store: ResidentExperts) -> Tensor:
        """Not captured: which conversations are together changes as they come and go."""
        caches = [cache for cache in together.caches if isinstance(cache, GpuCache)]
        assert len(caches) == x.shape[0]
        b = self._parts.embedded_each(x, [cache.n_tokens for cache in caches])
        self._run(
            b, lambda i: self._parts.attend_each(i, b, [(c.keys[i], c.values[i]) for c in caches])
        )
        store.expect_used()
        return b.x.clone()

    def logits(self, x: Tensor) -> Tensor:
        """On the host, which waits for them."""
        return self._parts.logits(x)

    def _attend_one(
        self, b: Buffers, keys: list[Tensor], values: list[Tensor], end: int
    ) -> Callable[[int], None]:
        """A layer's attention over one cache.  end: the position after the last."""
        return lambda i: self._parts.attend(i, b, keys[i], values[i], end)

    def _run(self, b: Buffers, attend: Callable[[int], None]) -> None:
        """All layers for b.x at b.positions.  attend: the attention of a layer."""
        experts = self._experts
        for layer_id, table in enumerate(experts.tables):
            attend(layer_id)
            self._parts.route(layer_id, b)
            if self._parts.has_experts(layer_id):
                if b.n_tokens > 1:
                    experts.used.add_(b.active[0])
                self._parts.mix(layer_id, b, table, experts.n_parts)
            self._parts.share(layer_id, b)
