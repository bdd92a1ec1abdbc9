"""The parts of a pass on a GPU, over buffers made once.

Knows:        which operations make up attention, routing, a mix of experts, the ends of a pass.
Ignorant of:  their order, where experts are, how operations are computed, CUDA.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cuda_ext.ops import MOST_DECODED
from lowmoe.decoder.gpu_buffers import Buffers
from lowmoe.decoder.gpu_layers import GpuLayer, planes_of
from lowmoe.decoder.native import scaled
from lowmoe.decoder.native_norms import norm_epsilons
from lowmoe.decoder.prompt_attention import attend_prompt, cached_numbers, row_numbers
from lowmoe.decoder.weights import DenseWeights
from lowmoe.kernels import cpu
from lowmoe.kernels.gpu import Gpu
from lowmoe.spec import ModelSpec, SoftmaxRouter, grouped
from quant.layout import round_up
from quant.matrix import TrellisMatrix
from quant.trellis import TrellisCode

KV_DTYPES: dict[cpu.KvFormat, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "int8": torch.int8,
}
CACHE_ALIGNMENT = 512  # bytes, as torch would begin each tensor on a GPU


class GpuParts:
    """Operations bound to a model's dense weights, which are in the GPU's memory."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: DenseWeights,
        code: TrellisCode,
        gpu: Gpu,
        *,
        kv: cpu.KvFormat,
        max_tokens: int,
        n_context: int,
    ) -> None:
        """max_tokens: of one pass; n_context: of a cache."""
        self._spec, self._gpu, self._ops, self._kv = spec, gpu, gpu.operations, kv
        # Over x / residual_scale, as native code computes.
        self._norm_epsilon = norm_epsilons(spec).final
        self._buffers = Buffers.make(spec, gpu, max_tokens)
        self._buffers_of_one = self._buffers.of(1)
        # A narrower window ignores the upper bits of a wider one.
        table = torch.tensor(code.table * (2**cpu.WINDOW_BITS // len(code.table)), dtype=torch.int8)
        self._code = (table.to(gpu.place), code.scale_unit)
        self._embedding, self._head = planes_of(weights.embedding), planes_of(weights.head)
        self._final_norm = weights.final_norm
        self._layers = [
            GpuLayer.bound(layer, of, n_context, gpu.place)
            for layer, of in zip(spec.layers, weights.layers, strict=True)
        ]

    def buffers(self, n_tokens: int) -> Buffers:
        """For a pass of so many: the same memory for all."""
        return self._buffers_of_one if n_tokens == 1 else self._buffers.of(n_tokens)

    def new_cache(self, capacity: int) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values of each layer, [1, B, capacity, row], all in one piece of memory: of each
        of 8 MiB, torch would take 10.
        """
        dtype = KV_DTYPES[self._kv]
        shapes = 2 * _cache_shapes(self._spec, capacity, dtype)
        sizes = [dtype.itemsize * math.prod(shape) for shape in shapes]
        room = [round_up(n_bytes, CACHE_ALIGNMENT) for n_bytes in sizes]
        memory = torch.zeros(sum(room), dtype=torch.uint8, device=self._gpu.place)
        cut = [
            piece[:n_bytes].view(dtype).view(shape)
            for piece, n_bytes, shape in zip(memory.split(room), sizes, shapes, strict=True)
        ]
        n_layers = len(self._spec.layers)
        return cut[:n_layers], cut[n_layers:]

    # --- the ends of a pass

    def embed(self, ids: Tensor) -> Tensor:
        """ids: [T] int64.  Returns x of the buffers for T tokens."""
        b = self.buffers(ids.shape[0])
        b.ids.copy_(ids)  # waits: what it is copied from may be gone at return
        planes = list(self._embedding.planes)
        self._ops.embed(b.ids, planes, *self._code, self._embedding.d, b.x)
        return scaled(b.x, self._spec.embedding_scale / self._spec.residual_scale)

    def embedded(self, x: Tensor, n_cached: int, capacity: int) -> Buffers:
        """The buffers that x, which `embed` returned, is in; it comes after n_cached tokens."""
        b = self.buffers(x.shape[0])
        assert x.data_ptr() == b.x.data_ptr(), "not what embed returned"
        end = n_cached + x.shape[0]
        assert end <= capacity, (end, capacity)
        torch.arange(n_cached, end, out=b.positions)
        return b

    def embedded_each(self, x: Tensor, positions: list[int]) -> Buffers:
        """The same for tokens of several conversations, at these positions."""
        b = self.buffers(x.shape[0])
        assert x.data_ptr() == b.x.data_ptr(), "not what embed returned"
        b.positions.copy_(torch.tensor(positions, dtype=torch.int32))
        return b

    def begin_with_zeros(self) -> Buffers:
        """A token of zeros at position 0, to capture work with: the first one writes over it."""
        b = self._buffers_of_one
        b.x.zero_()
        b.positions.zero_()
        return b

    def logits(self, x: Tensor) -> Tensor:
        """On the host, which waits for them."""
        scores = torch.empty(x.shape[0], self._spec.n_vocab)
        epsilon, room = self._norm_epsilon, self._buffers.scores
        for first in range(0, x.shape[0], room.shape[0]):
            part = x[first : first + room.shape[0]]
            b = self.buffers(part.shape[0])
            rounded = (b.normed_codes, b.normed_scales)
            self._ops.norm_round(part, self._final_norm, epsilon, self._head.d, b.normed, *rounded)
            self._linear(rounded, self._head, b.scores)
            scores[first : first + part.shape[0]].copy_(b.scores)
        return scaled(scores, self._spec.logit_scale)

    # --- the parts of a layer

    def attend(self, layer_id: int, b: Buffers, keys: Tensor, values: Tensor, end: int) -> None:
        """b.x += attention(norm(b.x)), over a cache that then has `end` positions."""
        layer = self._layers[layer_id]
        self._ask(layer, b)
        where = (b.positions, b.sequences)
        self._place(layer, b.qkv, where, (keys, values))
        if b.n_tokens <= MOST_DECODED:
            self._attend_few(layer, b.qkv, where, (keys, values), b.attended)
        else:
            b.attended.copy_(_attend_prompt(layer, b.qkv, keys[0], values[0], end))
        self._add_attended(layer, b)

    def attend_each(
        self, layer_id: int, b: Buffers, caches: Sequence[tuple[Tensor, Tensor]]
    ) -> None:
        """The same for a token of each of several conversations.  caches: their keys and values."""
        layer = self._layers[layer_id]
        self._ask(layer, b)
        for t, cache in enumerate(caches):
            one = slice(t, t + 1)
            qkv, where = b.qkv[one], (b.positions[one], b.sequences[one])
            self._place(layer, qkv, where, cache)
            self._attend_few(layer, qkv, where, cache, b.attended[one])
        self._add_attended(layer, b)

    def _ask(self, layer: GpuLayer, b: Buffers) -> None:
        """b.qkv = queries, keys and values of norm(b.x)."""
        rounded, weights = (b.normed_codes, b.normed_scales), layer.weights
        norm = (weights.attention_norm, self._norm_epsilon)
        self._ops.norm_round(b.x, *norm, layer.qkv.d, b.normed, *rounded)
        self._linear(rounded, layer.qkv, b.qkv, weights.optional("qkv_bias"))

    def _place(
        self,
        layer: GpuLayer,
        qkv: Tensor,
        where: tuple[Tensor, Tensor],
        cache: tuple[Tensor, Tensor],
    ) -> None:
        """Queries and keys at their positions; keys and values go to the cache."""
        turning, n_heads = (layer.frequencies, layer.rope_length), layer.attention.n_heads
        self._ops.rope_store(qkv, *turning, *where, n_heads, *layer.heads, *cache)

    def _attend_few(
        self,
        layer: GpuLayer,
        qkv: Tensor,
        where: tuple[Tensor, Tensor],
        cache: tuple[Tensor, Tensor],
        out: Tensor,
    ) -> None:
        """out = attention of up to MOST_DECODED tokens that were placed."""
        spec, sinks = layer.attention, layer.weights.optional("sinks")
        how = (spec.window or 0, layer.score_scale, sinks)
        workspace = self._buffers.workspace
        self._ops.attend(qkv, *cache, *where, spec.n_heads, *how, out, workspace)

    def _add_attended(self, layer: GpuLayer, b: Buffers) -> None:
        """b.x += attention's output."""
        rounded = (b.attended_codes, b.attended_scales)
        self._ops.round_tokens(b.attended, layer.out.d, *rounded)
        bias = layer.weights.optional("attention_out_bias")
        self._linear(rounded, layer.out, b.x, bias, add=True)

    def route(self, layer_id: int, b: Buffers) -> None:
        """Where each token goes, and rounded tokens of norm(b.x) for the experts."""
        layer = self._layers[layer_id]
        weights, norm = layer.weights, (layer.weights.experts_norm, self._norm_epsilon)
        of_shared = (b.shared_in_codes, b.shared_in_scales)
        if not layer.has_experts:
            assert layer.shared is not None
            self._ops.norm_round(b.x, *norm, layer.shared.gate_up.d, b.normed, *of_shared)
            return
        shared = (None,) * 3 if layer.shared is None else (layer.shared.gate_up.d, *of_shared)
        self._ops.norm_route(
            b.x, *norm, weights.transforms.d_in, *layer.router,
            b.normed, b.normed_codes, b.normed_scales,
            b.weights, b.experts, b.first, b.order, b.active, *shared, b.workspace,
        )  # fmt: skip

    def prefer(self, layer_id: int, b: Buffers, table: Tensor, boost: float) -> None:
        """Choose anew after `route`: experts that the table has count as if their scores were
        higher by boost.  table: as for mix.
        """
        router = self._layers[layer_id].spec.feed_forward.router
        assert isinstance(router, SoftmaxRouter)
        self._ops.prefer(
            table, boost, router.renormalize,
            b.weights, b.experts, b.first, b.order, b.active, b.workspace,
        )  # fmt: skip

    def has_experts(self, layer_id: int) -> bool:
        """Whether a layer has any but a shared one."""
        return self._layers[layer_id].has_experts

    def share(self, layer_id: int, b: Buffers) -> None:
        """b.x += the shared expert's output, if there is one, after `route`."""
        layer = self._layers[layer_id]
        shared = layer.shared
        if shared is None:
            return
        gate_up, *inner = b.shared(shared.down.layout.n_in)
        self._linear((b.shared_in_codes, b.shared_in_scales), shared.gate_up, gate_up)
        given = (gate_up, *layer.activation, b.normed, shared.router)
        self._ops.gate_round(*given, shared.down.d, *inner)
        self._linear((inner[0], inner[1]), shared.down, b.x, add=True)

    def mix(self, layer_id: int, b: Buffers, table: Tensor, n_parts: int) -> None:
        """b.x += the weighted sum of each token's experts that the table has, after `route`.

        table: [E, 3] int64, the addresses of the n_parts of each, 0 for none.
        """
        layer = self._layers[layer_id]
        spec, ops = layer.spec.feed_forward, self._ops
        experts = (table, n_parts, *self._code, b.first, b.order, b.active)
        inner = (b.inner_codes, b.inner_scales)
        sizes = (self._spec.n_hidden, spec.router.n_active)
        d_inner = layer.weights.transforms.d_inner
        biases = [layer.weights.optional(name) for name in ("gate_up_bias", "down_bias")]
        ops.experts_inner(
            b.normed_codes, b.normed_scales, *experts, d_inner, biases[0],
            *layer.activation, *sizes, *inner, b.workspace,
        )  # fmt: skip
        ops.experts_down(*inner, *experts, biases[1], b.weights, spec.n_inner, b.x, b.workspace)

    def _linear(
        self,
        rounded: tuple[Tensor, Tensor],
        matrix: TrellisMatrix,
        y: Tensor,
        bias: Tensor | None = None,
        *,
        add: bool = False,
    ) -> None:
        planes, layout = list(matrix.planes), matrix.layout
        self._ops.linear(
            *rounded, planes, *self._code, layout.n_out, layout.n_in, bias, add, y,
            self._buffers.workspace,
        )  # fmt: skip


def cache_bytes(spec: ModelSpec, n_tokens: int, kv: cpu.KvFormat) -> int:
    """Bytes that keys and values of n_tokens take."""
    dtype = KV_DTYPES[kv]
    shapes = _cache_shapes(spec, n_tokens, dtype)
    sizes = (dtype.itemsize * math.prod(shape) for shape in shapes)
    return sum(2 * round_up(n_bytes, CACHE_ALIGNMENT) for n_bytes in sizes)


@torch.inference_mode()
def copy_rows(rows: Sequence[Tensor], to: Sequence[Tensor], n_tokens: int) -> None:
    """Of each layer the first n_tokens of keys or values, [1, B, capacity, row]."""
    for source, target in zip(rows, to, strict=True):
        target[:, :, :n_tokens].copy_(source[:, :, :n_tokens])


def _cache_shapes(
    spec: ModelSpec, capacity: int, dtype: torch.dtype
) -> list[tuple[int, int, int, int]]:
    of = [grouped(layer.attention) for layer in spec.layers]
    return [(1, a.n_kv_heads, capacity, row_numbers(a.head_size, dtype)) for a in of]


def _attend_prompt(layer: GpuLayer, qkv: Tensor, keys: Tensor, values: Tensor, end: int) -> Tensor:
    """qkv: [T, ...]; keys, values: [B, capacity, row].  Returns [T, q size]."""
    attention, n_tokens = layer.attention, qkv.shape[0]
    window = attention.window
    first = 0 if window is None else max(0, end - n_tokens + 1 - window)
    k, v = (cached_numbers(c[:, first:end], attention.head_size) for c in (keys, values))
    queries = qkv[:, : attention.q_size].view(n_tokens, attention.n_heads, attention.head_size)
    out = attend_prompt(
        queries.to(k.dtype),
        k,
        v,
        window=window,
        scale=layer.score_scale,
        sinks=layer.weights.optional("sinks"),
    )
    return out.reshape(n_tokens, -1)
