"""A pass on a GPU that holds the whole model: nothing on the way waits for the host.

Operations write into buffers made once. So a step of one token over a cache is the same work on the
same memory, whatever the token and its position: it is captured once and replayed.

Knows:        which operations make up a layer, in which buffers; what is captured.
Ignorant of:  how operations are computed, how experts came to the GPU, CUDA.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cuda_ext.ops import MOST_DECODED
from lowmoe.decoder.abilities import lacking
from lowmoe.decoder.computation import Cache
from lowmoe.decoder.gpu_buffers import ABLE, Buffers
from lowmoe.decoder.prompt_attention import attend_prompt, cached_numbers, row_numbers
from lowmoe.decoder.rope import rope_frequencies
from lowmoe.decoder.weights import DenseWeights, LayerWeights
from lowmoe.experts.resident import ResidentExperts
from lowmoe.kernels import cpu
from lowmoe.kernels.gpu import Gpu
from lowmoe.spec import LayerSpec, ModelSpec, SoftmaxRouter, grouped
from quant.matrix import Matrix, TrellisMatrix
from quant.trellis import TrellisCode

KV_DTYPES: dict[cpu.KvFormat, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "int8": torch.int8,
}


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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    """What a layer's operations take beside buffers.  parts: [E, 3] int64, see cuda_ext/ops.py."""

    spec: LayerSpec
    weights: LayerWeights
    qkv: TrellisMatrix
    out: TrellisMatrix
    frequencies: Tensor
    parts: Tensor


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
        self._spec, self._experts, self._gpu, self._ops = spec, experts, gpu, gpu.operations
        self._kv = kv
        self._buffers = Buffers.make(spec, gpu, max_tokens)
        self._buffers_of_one = self._buffers.of(1)
        # A narrower window ignores the upper bits of a wider one.
        table = torch.tensor(code.table * (2**cpu.WINDOW_BITS // len(code.table)), dtype=torch.int8)
        self._code = (table.to(gpu.place), code.scale_unit)
        self._embedding, self._head = _planes(weights.embedding), _planes(weights.head)
        self._final_norm = weights.final_norm
        self._layers = [
            _Layer(
                spec=layer,
                weights=of,
                qkv=_planes(of.qkv),
                out=_planes(of.attention_out),
                frequencies=_frequencies(layer).to(gpu.place),
                parts=parts,
            )
            for layer, of, parts in zip(spec.layers, weights.layers, experts.tables, strict=True)
        ]
        self._n_used = sum(layer.feed_forward.router.n_active for layer in spec.layers)

    # --- the cache

    def new_cache(self, capacity: int) -> GpuCache:
        """All of it at once, since a captured step knows where it lies."""
        shapes = _cache_shapes(self._spec, capacity, KV_DTYPES[self._kv])
        keys, values = (
            [torch.zeros(s, dtype=KV_DTYPES[self._kv], device=self._gpu.place) for s in shapes]
            for _ in range(2)
        )
        # Capturing runs it: a token of zeros at position 0, which the first one will write over.
        b = self._buffers_of_one
        b.x.zero_()
        b.positions.zero_()
        step = self._gpu.capture(lambda: self._run(b, keys, values, 1))
        return GpuCache(keys=keys, values=values, capacity=capacity, step=step)

    def cache_bytes(self, n_tokens: int) -> int:
        return cache_bytes(self._spec, n_tokens, self._kv)

    # --- a pass

    def embed(self, ids: Tensor) -> Tensor:
        """In a buffer, until the next pass."""
        b = self._of(ids.shape[0])
        b.ids.copy_(ids)  # waits: what it is copied from may be gone at return
        planes = list(self._embedding.planes)
        self._ops.embed(b.ids, planes, *self._code, self._embedding.d, b.x)
        return b.x

    def run_layers(self, x: Tensor, cache: Cache, store: ResidentExperts) -> Tensor:
        """x: what `embed` returned."""
        assert isinstance(cache, GpuCache)
        assert store is self._experts
        b = self._of(x.shape[0])
        assert x.data_ptr() == b.x.data_ptr(), "not what embed returned"
        first, end = cache.n_tokens, cache.n_tokens + x.shape[0]
        assert end <= cache.capacity, (end, cache.capacity)
        torch.arange(first, end, out=b.positions)
        if b.n_tokens == 1:
            cache.step()
            store.count_used(self._n_used)
        else:
            self._run(b, cache.keys, cache.values, end)
            store.expect_used()
        return b.x.clone()

    def logits(self, x: Tensor) -> Tensor:
        """On the host, which waits for them."""
        scores = torch.empty(x.shape[0], self._spec.n_vocab)
        epsilon, room = self._spec.norm_epsilon, self._buffers.scores
        for first in range(0, x.shape[0], room.shape[0]):
            part = x[first : first + room.shape[0]]
            b = self._of(part.shape[0])
            rounded = (b.normed_codes, b.normed_scales)
            self._ops.norm_round(part, self._final_norm, epsilon, self._head.d, b.normed, *rounded)
            self._linear(rounded, self._head, b.scores, add=False)
            scores[first : first + part.shape[0]].copy_(b.scores)
        return scores

    def _run(self, b: Buffers, keys: list[Tensor], values: list[Tensor], end: int) -> None:
        """All layers for b.x at b.positions.  end: the position after the last."""
        for layer, k, v in zip(self._layers, keys, values, strict=True):
            self._attend(layer, b, k, v, end)
            self._route(layer, b)
            if b.n_tokens > 1:
                self._experts.used.add_(b.active[0])
            self._mix(layer, b)

    def _of(self, n_tokens: int) -> Buffers:
        return self._buffers_of_one if n_tokens == 1 else self._buffers.of(n_tokens)

    # --- the parts of a layer

    def _attend(self, layer: _Layer, b: Buffers, keys: Tensor, values: Tensor, end: int) -> None:
        """b.x += attention(norm(b.x))."""
        spec, weights, ops = grouped(layer.spec.attention), layer.weights, self._ops
        rounded, epsilon = (b.normed_codes, b.normed_scales), self._spec.norm_epsilon
        ops.norm_round(b.x, weights.attention_norm, epsilon, layer.qkv.d, b.normed, *rounded)
        self._linear(rounded, layer.qkv, b.qkv, add=False)
        where = (b.positions, b.sequences, spec.n_heads)
        ops.rope_store(b.qkv, layer.frequencies, *where, keys, values)
        if b.n_tokens <= MOST_DECODED:
            window = spec.window or 0
            ops.attend(b.qkv, keys, values, *where, window, b.attended, b.workspace)
        else:
            b.attended.copy_(_attend_prompt(layer.spec, b.qkv, keys[0], values[0], end))
        rounded = (b.attended_codes, b.attended_scales)
        ops.round_tokens(b.attended, layer.out.d, *rounded)
        self._linear(rounded, layer.out, b.x, add=True)

    def _route(self, layer: _Layer, b: Buffers) -> None:
        """Where each token goes, and rounded tokens of norm(b.x) for the experts."""
        weights, epsilon = layer.weights, self._spec.norm_epsilon
        router = layer.spec.feed_forward.router
        assert isinstance(router, SoftmaxRouter)
        self._ops.norm_route(
            b.x, weights.experts_norm, epsilon, weights.transforms.d_in, weights.router,
            router.renormalize,
            b.normed, b.normed_codes, b.normed_scales,
            b.weights, b.experts, b.first, b.order, b.active, b.workspace,
        )  # fmt: skip

    def _mix(self, layer: _Layer, b: Buffers) -> None:
        """b.x += the weighted sum of each token's experts, after `_route`."""
        spec, ops = layer.spec.feed_forward, self._ops
        experts = (layer.parts, self._experts.n_parts, *self._code, b.first, b.order, b.active)
        inner = (b.inner_codes, b.inner_scales)
        sizes = (self._spec.n_hidden, spec.router.n_active)
        d_inner = layer.weights.transforms.d_inner
        ops.experts_inner(
            b.normed_codes, b.normed_scales, *experts, d_inner, *sizes, *inner, b.workspace
        )
        ops.experts_down(*inner, *experts, b.weights, spec.n_inner, b.x, b.workspace)

    def _linear(
        self, rounded: tuple[Tensor, Tensor], matrix: TrellisMatrix, y: Tensor, *, add: bool
    ) -> None:
        planes, layout = list(matrix.planes), matrix.layout
        self._ops.linear(
            *rounded, planes, *self._code, layout.n_out, layout.n_in, add, y,
            self._buffers.workspace,
        )  # fmt: skip


def cache_bytes(spec: ModelSpec, n_tokens: int, kv: cpu.KvFormat) -> int:
    """Bytes that keys and values of n_tokens take."""
    dtype = KV_DTYPES[kv]
    shapes = _cache_shapes(spec, n_tokens, dtype)
    return sum(2 * dtype.itemsize * math.prod(shape) for shape in shapes)


def _cache_shapes(
    spec: ModelSpec, capacity: int, dtype: torch.dtype
) -> list[tuple[int, int, int, int]]:
    of = [grouped(layer.attention) for layer in spec.layers]
    return [(1, a.n_kv_heads, capacity, row_numbers(a.head_size, dtype)) for a in of]


def _attend_prompt(spec: LayerSpec, qkv: Tensor, keys: Tensor, values: Tensor, end: int) -> Tensor:
    """qkv: [T, ...]; keys, values: [B, capacity, row].  Returns [T, q size]."""
    attention, n_tokens = grouped(spec.attention), qkv.shape[0]
    window = attention.window
    first = 0 if window is None else max(0, end - n_tokens + 1 - window)
    k, v = (cached_numbers(c[:, first:end], attention.head_size) for c in (keys, values))
    queries = qkv[:, : attention.q_size].view(n_tokens, attention.n_heads, attention.head_size)
    return attend_prompt(queries.to(k.dtype), k, v, window).reshape(n_tokens, -1)


def _frequencies(layer: LayerSpec) -> Tensor:
    attention = grouped(layer.attention)
    assert attention.rope is not None
    return rope_frequencies(attention.rope, attention.head_size)


def _planes(matrix: Matrix) -> TrellisMatrix:
    assert isinstance(matrix, TrellisMatrix)
    return matrix
