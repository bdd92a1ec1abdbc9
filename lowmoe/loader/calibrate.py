"""Measures how loud every channel is at the input of every matrix.

A few thousand tokens of text run through the original weights, one layer at a time. The layer's
moments go into the transforms d (see quant/transform.py), the tokens' hidden states on to the next.

Knows:        hidden states of the calibration text, second moments of activations.
Ignorant of:  how weights are coded, files, text.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lowmoe.decoder.attention import attend
from lowmoe.decoder.kv_cache import LayerCache
from lowmoe.decoder.moe import Routing
from lowmoe.decoder.norm import rms_norm
from lowmoe.decoder.weights import LayerWeights
from lowmoe.kernels.reference import ReferenceKernels
from lowmoe.spec import LayerSpec
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

    def matrices(self, expert_id: int) -> tuple[Tensor, Tensor, Tensor]:
        """gate [I, H], up [I, H] and down [H, I], any float dtype."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerMoments:
    """What was heard at a layer's matrices: covariances [blocks, h, h] of their inputs.

    experts_in: at gate and up, shared by all experts; inner: at each expert's down.
    gate_up_columns: [H] rms of the columns of gate and up over all experts; down_columns: [E, I].
    """

    qkv: Tensor
    attention_out: Tensor
    experts_in: Tensor
    inner: list[Tensor]
    gate_up_columns: Tensor
    down_columns: Tensor

    def are_finite(self) -> bool:
        """Whether no activation was so large that its square overflowed, or NaN."""
        heard = (self.qkv, self.attention_out, self.experts_in, *self.inner)
        return all(bool(covariance.isfinite().all()) for covariance in heard)


class CalibrationRun:
    """Calibration tokens on their way through the layers, in float32."""

    def __init__(self, hidden: Tensor, lengths: list[int], norm_epsilon: float) -> None:
        """hidden: [T, H] float32, sequences of these lengths one after the other."""
        self.hidden, self._lengths, self._epsilon = hidden, lengths, norm_epsilon
        self._kernels = ListeningKernels()

    @torch.inference_mode()
    def through_layer(
        self, spec: LayerSpec, weights: LayerWeights, experts: LayerExperts
    ) -> LayerMoments:
        """Take all tokens through one layer; returns what was heard on the way.

        Raises ValueError where activations overflow, before anything is made from them.
        """
        hidden = self.hidden
        hidden = hidden + self._attention(spec, weights)
        normed = rms_norm(hidden, weights.experts_norm, self._epsilon)
        routing = Routing.of(normed, weights.router, spec.feed_forward.router)
        inputs = Moments(normed.shape[1])
        inputs.add(normed)
        mixed, inner, columns = self._experts(normed, routing, spec, experts)
        self.hidden = hidden + mixed
        layer_inner = Moments(spec.feed_forward.n_inner)
        for moments in inner:
            layer_inner.total += moments.total
            layer_inner.count += moments.count
        heard = LayerMoments(
            qkv=self._heard(weights.qkv),
            attention_out=self._heard(weights.attention_out),
            experts_in=inputs.covariance(),
            inner=[m.shrunk_towards(layer_inner) for m in inner],
            gate_up_columns=columns.gate_up_rms(),
            down_columns=torch.stack(columns.down),
        )
        if not (heard.are_finite() and self.hidden.isfinite().all()):
            raise ValueError("the calibration text's activations are not finite")
        return heard

    def _heard(self, matrix: Matrix) -> Tensor:
        moments = self._kernels.heard(matrix)
        assert moments is not None, "a matrix every token passes through"
        return moments.covariance()

    def head_covariance(self, weight: Tensor) -> Tensor:
        """The covariance of the output head's input, [blocks, h, h].  weight: the final norm's."""
        moments = Moments(self.hidden.shape[1])
        moments.add(rms_norm(self.hidden, weight, self._epsilon))
        return moments.covariance()

    def _attention(self, spec: LayerSpec, weights: LayerWeights) -> Tensor:
        outputs = []
        for sequence in torch.split(self.hidden, self._lengths):
            cache = LayerCache(spec, sequence.shape[0], torch.float32)
            normed = rms_norm(sequence, weights.attention_norm, self._epsilon)
            outputs.append(attend(normed, weights, spec.attention, cache, 0, self._kernels))
        return torch.cat(outputs)

    def _experts(
        self, x: Tensor, routing: Routing, spec: LayerSpec, experts: LayerExperts
    ) -> tuple[Tensor, list[Moments], "_Columns"]:
        """The sum of the experts' outputs [T, H], and the moments inside each of them."""
        mixed = torch.zeros_like(x)
        inner, columns = [], _Columns(torch.zeros(x.shape[1], dtype=torch.float64), 0, [])
        for expert_id in range(spec.feed_forward.n_experts):
            inner.append(self._expert(x, routing, experts, expert_id, mixed, columns))
        return mixed, inner, columns

    def _expert(
        self,
        x: Tensor,
        routing: Routing,
        experts: LayerExperts,
        expert_id: int,
        mixed: Tensor,
        columns: "_Columns",
    ) -> Moments:
        """Add one expert's outputs to mixed [T, H]; returns the moments inside it.

        A function of its own, so that no two experts are in memory at once.
        """
        gate, up, down = experts.matrices(expert_id)
        columns.add(gate, up, down)
        n_inner = gate.shape[0]
        whole = Expert(torch.cat([gate, up]), down, n_inner, blocked=False)
        del gate, up
        token, rank = torch.where(routing.expert_ids == expert_id)
        if token.numel():
            output = self._kernels.expert(x[token], whole)
            mixed.index_add_(0, token, output * routing.weights[token, rank][:, None])
        self._kernels.heard(whole.gate_up)  # the layer's own input is counted once, by itself
        return self._kernels.heard(whole.down) or Moments(n_inner)


@dataclass(slots=True)
class _Columns:
    """gate_up: [H] sums of squares of columns over all experts; down: [I] rms for each expert."""

    gate_up: Tensor
    n_rows: int
    down: list[Tensor]

    def add(self, gate: Tensor, up: Tensor, down: Tensor) -> None:
        self.gate_up += column_squares(gate) + column_squares(up)
        self.n_rows += gate.shape[0] + up.shape[0]
        self.down.append(column_rms(down))

    def gate_up_rms(self) -> Tensor:
        return (self.gate_up / self.n_rows).sqrt().float()


def column_squares(weights: Tensor) -> Tensor:
    """The sum of squares of every column, [n_in] float64, in pieces small beside the matrix."""
    total = torch.zeros(weights.shape[1], dtype=torch.float64)
    for rows in torch.split(weights, 1024):
        total += rows.float().square().sum(0, dtype=torch.float64)
    return total


def column_rms(weights: Tensor) -> Tensor:
    """Root mean square of every column, [n_in] float32."""
    return (column_squares(weights) / weights.shape[0]).sqrt().float()
