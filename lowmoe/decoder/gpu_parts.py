"""The parts of a pass on a GPU, over buffers made once.

Knows:        which operations make up attention, routing, a mix of experts, the ends of a pass.
Ignorant of:  their order, where experts are, how operations are computed, CUDA.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cuda_ext.ops import MOST_DECODED
from lowmoe.decoder.gpu_buffers import Buffers
from lowmoe.decoder.native import head_norm_kind, norm_epsilon, scaled
from lowmoe.decoder.prompt_attention import attend_prompt, cached_numbers, row_numbers
from lowmoe.decoder.rope import rope_frequencies, rope_length
from lowmoe.decoder.weights import DenseWeights, LayerWeights
from lowmoe.kernels import cpu
from lowmoe.kernels.gpu import Gpu
from lowmoe.spec import (
    Activation,
    ExpertsFeedForward,
    LayerSpec,
    ModelSpec,
    Router,
    SigmoidRouter,
    SoftmaxRouter,
    grouped,
)
from quant.matrix import Matrix, TrellisMatrix
from quant.trellis import TrellisCode

KV_DTYPES: dict[cpu.KvFormat, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "int8": torch.int8,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shared:
    """An expert of all tokens."""

    gate_up: TrellisMatrix
    down: TrellisMatrix
    router: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    """What a layer's operations take beside buffers and experts."""

    spec: LayerSpec
    weights: LayerWeights
    qkv: TrellisMatrix
    out: TrellisMatrix
    frequencies: Tensor
    rope_length: float
    score_scale: float
    heads: tuple[int, Tensor | None, Tensor | None, float, float]  # see rope_store
    shared: _Shared | None
    router: tuple[Tensor, Tensor | None, Tensor | None, bool, bool, int, int, float]


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
        self._norm_epsilon = norm_epsilon(spec)  # over x / residual_scale, as native code computes
        self._buffers = Buffers.make(spec, gpu, max_tokens)
        self._buffers_of_one = self._buffers.of(1)
        # A narrower window ignores the upper bits of a wider one.
        table = torch.tensor(code.table * (2**cpu.WINDOW_BITS // len(code.table)), dtype=torch.int8)
        self._code = (table.to(gpu.place), code.scale_unit)
        self._embedding, self._head = _planes(weights.embedding), _planes(weights.head)
        self._final_norm = weights.final_norm
        self._layers = [
            _layer(layer, of, n_context, gpu.place)
            for layer, of in zip(spec.layers, weights.layers, strict=True)
        ]

    def buffers(self, n_tokens: int) -> Buffers:
        """For a pass of so many: the same memory for all."""
        return self._buffers_of_one if n_tokens == 1 else self._buffers.of(n_tokens)

    def new_cache(self, capacity: int) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values of each layer, [1, B, capacity, row]."""
        dtype = KV_DTYPES[self._kv]
        shapes = _cache_shapes(self._spec, capacity, dtype)
        keys, values = (
            [torch.zeros(shape, dtype=dtype, device=self._gpu.place) for shape in shapes]
            for _ in range(2)
        )
        return keys, values

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
        self._store(layer, b, slice(None), keys, values)
        if b.n_tokens <= MOST_DECODED:
            self._attend_few(layer, b, slice(None), keys, values)
        else:
            b.attended.copy_(_attend_prompt(layer, b.qkv, keys[0], values[0], end))
        self._add_attended(layer, b)

    def attend_each(
        self, layer_id: int, b: Buffers, caches: Sequence[tuple[Tensor, Tensor]]
    ) -> None:
        """The same for a token of each of several conversations.  caches: their keys and values."""
        layer = self._layers[layer_id]
        self._ask(layer, b)
        for t, (keys, values) in enumerate(caches):
            one = slice(t, t + 1)
            self._store(layer, b, one, keys, values)
            self._attend_few(layer, b, one, keys, values)
        self._add_attended(layer, b)

    def _ask(self, layer: _Layer, b: Buffers) -> None:
        """b.qkv = queries, keys and values of norm(b.x)."""
        weights, rounded = layer.weights, (b.normed_codes, b.normed_scales)
        norm = (weights.attention_norm, self._norm_epsilon)
        self._ops.norm_round(b.x, *norm, layer.qkv.d, b.normed, *rounded)
        self._linear(rounded, layer.qkv, b.qkv, weights.optional("qkv_bias"))

    def _store(
        self, layer: _Layer, b: Buffers, tokens: slice, keys: Tensor, values: Tensor
    ) -> None:
        """Queries and keys of some tokens are turned, keys and values go to their cache."""
        where = (b.positions[tokens], b.sequences[tokens], grouped(layer.spec.attention).n_heads)
        turning = (layer.frequencies, layer.rope_length)
        self._ops.rope_store(b.qkv[tokens], *turning, *where, *layer.heads, keys, values)

    def _attend_few(
        self, layer: _Layer, b: Buffers, tokens: slice, keys: Tensor, values: Tensor
    ) -> None:
        """b.attended of some tokens, of one conversation."""
        spec = grouped(layer.spec.attention)
        where = (b.positions[tokens], b.sequences[tokens], spec.n_heads)
        how = (spec.window or 0, layer.score_scale, layer.weights.optional("sinks"))
        qkv, attended = b.qkv[tokens], b.attended[tokens]
        self._ops.attend(qkv, keys, values, *where, *how, attended, b.workspace)

    def _add_attended(self, layer: _Layer, b: Buffers) -> None:
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
        if not self.has_experts(layer_id):
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
        return self._layers[layer_id].spec.feed_forward.n_experts > 0

    def share(self, layer_id: int, b: Buffers) -> None:
        """b.x += the shared expert's output, if there is one, after `route`."""
        layer, ops = self._layers[layer_id], self._ops
        shared, spec = layer.shared, layer.spec.feed_forward
        if shared is None:
            return
        gate_up, *inner = b.shared(shared.down.layout.n_in)
        self._linear((b.shared_in_codes, b.shared_in_scales), shared.gate_up, gate_up)
        kind = _numbers_of(spec.activation)
        ops.gate_round(gate_up, *kind, b.normed, shared.router, shared.down.d, *inner)
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
            *_numbers_of(spec.activation), *sizes, *inner, b.workspace,
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


def _numbers_of(activation: Activation) -> tuple[float, float, float]:
    limit = math.inf if activation.limit is None else activation.limit
    return activation.steepness, activation.shift, limit


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


def _attend_prompt(layer: _Layer, qkv: Tensor, keys: Tensor, values: Tensor, end: int) -> Tensor:
    """qkv: [T, ...]; keys, values: [B, capacity, row].  Returns [T, q size]."""
    attention, n_tokens = grouped(layer.spec.attention), qkv.shape[0]
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


def _layer(spec: LayerSpec, weights: LayerWeights, n_context: int, place: torch.device) -> _Layer:
    attention = grouped(spec.attention)
    rope, norm = attention.rope, attention.norm
    assert rope is not None
    return _Layer(
        spec=spec,
        weights=weights,
        qkv=_planes(weights.qkv),
        out=_planes(weights.attention_out),
        frequencies=rope_frequencies(rope, attention.head_size, n_context).to(place),
        rope_length=rope_length(rope, n_context),
        score_scale=attention.score_scale or attention.head_size**-0.5,
        heads=(
            head_norm_kind(norm),
            weights.optional("q_norm"),
            weights.optional("k_norm"),
            1.0 if norm is None else norm.epsilon,
            math.inf if attention.clamp is None else attention.clamp,
        ),
        shared=_shared(weights, spec.feed_forward),
        router=_router(weights, spec.feed_forward.router, place),
    )


def _shared(weights: LayerWeights, spec: ExpertsFeedForward) -> _Shared | None:
    if spec.shared is None:
        return None
    return _Shared(
        gate_up=_planes(weights.parts["shared_gate_up"]),
        down=_planes(weights.parts["shared_down"]),
        router=weights.optional("shared_router"),
    )


def _router(
    weights: LayerWeights, kind: Router, place: torch.device
) -> tuple[Tensor, Tensor | None, Tensor | None, bool, bool, int, int, float]:
    """As cuda_ext/ops.py wants it."""
    sigmoid = kind if isinstance(kind, SigmoidRouter) else None
    scores = weights.optional("router")
    # One expert that every token uses is chosen by any router; one of zeros serves.
    no_choice = torch.zeros(1, weights.experts_norm.shape[0], device=place)
    return (
        no_choice if scores is None else scores,
        weights.optional("router_bias"),
        weights.optional("choice_bias"),
        sigmoid is not None,
        isinstance(kind, SoftmaxRouter | SigmoidRouter) and kind.renormalize,
        1 if sigmoid is None else sigmoid.n_groups,
        1 if sigmoid is None else sigmoid.n_groups_active,
        1.0 if sigmoid is None else sigmoid.scale,
    )


def _planes(matrix: Matrix) -> TrellisMatrix:
    assert isinstance(matrix, TrellisMatrix)
    return matrix
