"""Measures how loud every channel is at the input of every matrix.

A few thousand tokens of text run through the original weights, one layer at a time. The layer's
moments go into the transforms d (see quant/transform.py), the tokens' hidden states on to the next.

Knows:        hidden states of the calibration text, second moments of activations.
Ignorant of:  how weights are coded, files, text.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lowmoe.decoder.attention import attend
from lowmoe.decoder.kv_cache import layer_cache
from lowmoe.decoder.moe import Routing, expert_output, shared_output
from lowmoe.decoder.norm import norm, normed_output, residual_sum
from lowmoe.decoder.weights import LayerWeights
from lowmoe.kernels.reference import ReferenceKernels
from lowmoe.spec import ExpertsFeedForward, LayerSpec, ModelSpec, layer_parts
from quant.expert import Expert
from quant.matrix import Matrix
from quant.transform import hadamard_size

# An expert that saw n tokens counts n / (n + SHRINKAGE) for itself, the layer for the rest. The
# number is a guess.
SHRINKAGE = 64


class Moments:
    """Second moments of one matrix's input, of channels within the same Hadamard block."""

    def __init__(self, n_in: int) -> None:
        """total: [blocks, h, h] sums of products, h channels to a block; count: tokens."""
        size = hadamard_size(n_in)
        self.total = torch.zeros(n_in // size, size, size)
        self.count = 0

    def add(self, x: Tensor) -> None:
        """Count tokens x [T, n_in]."""
        n_blocks, size, _ = self.total.shape
        blocks = x.float().view(-1, n_blocks, size).transpose(0, 1)  # [blocks, T, h]
        self.total += blocks.transpose(1, 2) @ blocks
        self.count += x.shape[0]

    def covariance(self) -> Tensor:
        """The mean, [blocks, h, h] float32."""
        return self.total / max(self.count, 1)

    def shrunk_towards(self, layer: "Moments") -> Tensor:
        """The same, with SHRINKAGE tokens of the layer's average mixed in."""
        mixed = self.total + SHRINKAGE * layer.covariance()
        return mixed / (self.count + SHRINKAGE)


def rms_of(covariance: Tensor) -> Tensor:
    """Root mean square of every channel, [n_in] float32.  covariance: [blocks, h, h]."""
    return covariance.diagonal(dim1=1, dim2=2).flatten().clamp_min(0).sqrt()


class ListeningKernels(ReferenceKernels):
    """Reference kernels that keep the moments of what they multiply, by matrix."""

    def __init__(self) -> None:
        self._moments: dict[int, Moments] = {}

    def linear(self, x: Tensor, matrix: Matrix) -> Tensor:
        """y = W x, counted.  x: [T, n_in]."""
        self._moments.setdefault(id(matrix), Moments(x.shape[1])).add(x)
        return super().linear(x, matrix)

    def heard(self, matrix: Matrix) -> Moments | None:
        """The moments of a matrix's input; None if it was never used.  Forgets them."""
        return self._moments.pop(id(matrix), None)


class LayerExperts(Protocol):
    """The original experts of a layer, read one at a time."""

    def matrices(self, expert_id: int) -> tuple[Tensor | None, Tensor, Tensor]:
        """gate [I, H], None where there is none, up [I, H] and down [H, I], any float dtype."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerMoments:
    """What was heard at a layer's matrices: covariances [blocks, h, h] of their inputs.

    dense: at matrices that are no routed expert's, by part; experts_in: at gate and up, shared by
    all experts; inner: at each expert's down.
    counts: [E] int64, tokens that went to each expert;
    gate_up_columns: [H] rms of the columns of gate and up over all experts; down_columns: [E, I].
    """

    dense: Mapping[str, Tensor]
    experts_in: Tensor
    inner: list[Tensor]
    counts: Tensor
    gate_up_columns: Tensor
    down_columns: Tensor

    def are_finite(self) -> bool:
        """Whether no activation was so large that its square overflowed, or NaN."""
        heard = (*self.dense.values(), self.experts_in, *self.inner)
        return all(bool(covariance.isfinite().all()) for covariance in heard)


class CalibrationRun:
    """Calibration tokens on their way through the layers, in float32."""

    def __init__(self, hidden: Tensor, lengths: list[int], spec: ModelSpec) -> None:
        """hidden: [T, H] float32, sequences of these lengths one after the other."""
        self.hidden, self._lengths, self._spec = hidden, lengths, spec
        self._kernels = ListeningKernels()

    @torch.inference_mode()
    def through_layer(
        self, layer_id: int, weights: LayerWeights, experts: LayerExperts
    ) -> LayerMoments:
        """Take all tokens through one layer; returns what was heard on the way.

        Raises ValueError where activations overflow, before anything is made from them.
        """
        model, spec = self._spec, self._spec.layers[layer_id]
        hidden = self._attended(spec, weights)
        bias = weights.optional("experts_norm_bias")
        normed = norm(hidden, weights.experts_norm, bias, model)
        routing = Routing.of(normed, weights, spec.feed_forward.router)
        inputs = Moments(normed.shape[1])
        inputs.add(normed)
        mixed, inner, columns = self._experts(routing, spec.feed_forward, weights, experts)
        shared = shared_output(normed, spec.feed_forward, weights, self._kernels)
        if shared is not None:
            mixed += shared
        mixed = normed_output(mixed, "experts_out_norm", weights, model)
        how, scale = spec.feed_forward_residual, model.residual_scale
        self.hidden = residual_sum(hidden, normed, mixed, how, scale)
        layer_inner = Moments(spec.feed_forward.n_inner)
        for moments in inner:
            layer_inner.total += moments.total
            layer_inner.count += moments.count
        heard = LayerMoments(
            dense={
                part.name: self._heard(weights.parts[part.name])
                for part in layer_parts(spec, model)
                if part.coded
            },
            experts_in=inputs.covariance(),
            inner=[m.shrunk_towards(layer_inner) for m in inner],
            counts=torch.bincount(
                routing.expert_ids.flatten(), minlength=spec.feed_forward.n_experts
            ),
            gate_up_columns=columns.gate_up_rms(),
            down_columns=columns.down_rms(),
        )
        if not (heard.are_finite() and self.hidden.isfinite().all()):
            raise ValueError("the calibration text's activations are not finite")
        return heard

    def _heard(self, matrix: Matrix) -> Tensor:
        moments = self._kernels.heard(matrix)
        assert moments is not None, "a matrix every token passes through"
        return moments.covariance()

    def head_covariance(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The covariance of the output head's input, [blocks, h, h].  weight, bias: of the norm."""
        moments = Moments(self.hidden.shape[1])
        moments.add(norm(self.hidden, weight, bias, self._spec))
        return moments.covariance()

    def _attended(self, spec: LayerSpec, weights: LayerWeights) -> Tensor:
        """Hidden states behind attention, [T, H]."""
        outputs, bias = [], weights.optional("attention_norm_bias")
        how, scale = spec.attention_residual, self._spec.residual_scale
        for sequence in torch.split(self.hidden, self._lengths):
            cache = layer_cache(spec.attention, sequence.shape[0], torch.float32)
            normed = norm(sequence, weights.attention_norm, bias, self._spec)
            out = attend(normed, weights, spec.attention, cache, 0, self._kernels)
            out = normed_output(out, "attention_out_norm", weights, self._spec)
            outputs.append(residual_sum(sequence, normed, out, how, scale))
        return torch.cat(outputs)

    def _experts(
        self,
        routing: Routing,
        spec: ExpertsFeedForward,
        weights: LayerWeights,
        experts: LayerExperts,
    ) -> tuple[Tensor, list[Moments], "_Columns"]:
        """The sum of the experts' outputs [T, H], and the moments inside each of them."""
        assert routing.given is not None
        mixed = torch.zeros_like(routing.given)
        inner, columns = [], _Columns(torch.zeros(mixed.shape[1], dtype=torch.float64), 0, [])
        for expert_id in range(spec.n_experts):
            inner.append(self._expert(routing, experts, expert_id, spec, weights, mixed, columns))
        return mixed, inner, columns

    def _expert(
        self,
        routing: Routing,
        experts: LayerExperts,
        expert_id: int,
        spec: ExpertsFeedForward,
        weights: LayerWeights,
        mixed: Tensor,
        columns: "_Columns",
    ) -> Moments:
        """Add one expert's outputs to mixed [T, H]; returns the moments inside it.

        A function of its own, so that no two experts are in memory at once.
        """
        gate, up, down = experts.matrices(expert_id)
        n_inner, wide = up.shape[0], [up] if gate is None else [gate, up]
        columns.add(wide, down)
        whole = Expert(torch.cat(wide), down, n_inner, blocked=False, gated=gate is not None)
        del gate, up, wide
        token, rank = torch.where(routing.expert_ids == expert_id)
        if token.numel() and routing.given is not None:
            heard = routing.weights[token, rank][:, None]
            output = expert_output(
                routing.given[token], heard, whole, expert_id, spec, weights, self._kernels
            )
            mixed.index_add_(0, token, output)
        self._kernels.heard(whole.gate_up)  # the layer's own input is counted once, by itself
        return self._kernels.heard(whole.down) or Moments(n_inner)


@dataclass(slots=True)
class _Columns:
    """gate_up: [H] sums of squares of columns over all experts; down: [I] rms for each expert."""

    gate_up: Tensor
    n_rows: int
    down: list[Tensor]

    def add(self, wide: list[Tensor], down: Tensor) -> None:
        for weights in wide:
            self.gate_up += column_squares(weights)
            self.n_rows += weights.shape[0]
        self.down.append(column_rms(down))

    def gate_up_rms(self) -> Tensor:
        return (self.gate_up / max(self.n_rows, 1)).sqrt().float()

    def down_rms(self) -> Tensor:
        """[E, I]."""
        return torch.stack(self.down) if self.down else torch.empty(0, 0)


def column_squares(weights: Tensor) -> Tensor:
    """The sum of squares of every column, [n_in] float64, in pieces small beside the matrix."""
    total = torch.zeros(weights.shape[1], dtype=torch.float64)
    for rows in torch.split(weights, 1024):
        total += rows.float().square().sum(0, dtype=torch.float64)
    return total


def column_rms(weights: Tensor) -> Tensor:
    """Root mean square of every column, [n_in] float32."""
    return (column_squares(weights) / weights.shape[0]).sqrt().float()
