"""The operations in plain torch: slow, right, for every format, on any machine.

Knows:        how to multiply with a matrix of each format.
Ignorant of:  layers, caches, where weights came from.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lowmoe.kernels.row_chunks import most_chunk_weights, row_chunks
from lowmoe.spec import SILU, Activation
from quant.expert import Expert
from quant.matrix import Matrix, TrellisMatrix, dequantize
from quant.transform import transform_activations

# At the peak of decoding planes, a weight takes 4 bytes in the sum, 4 in the plane that is added to
# it, and 1 in look-ups; its cut-out codes at most 1 more, the allocator 2 (a process grew by 11.5).
# Other formats take less.
DECODING_BYTES = 12


class ReferenceKernels:
    """Weights are decoded at every use and dropped; activations stay in floating point.

    A matrix is decoded some rows at a time. How many depends on its shape only, so that a product
    rounds the same way every time; with another number of rows torch may add up in another order.
    """

    def linear(self, x: Tensor, matrix: Matrix) -> Tensor:
        """y = W x.  x: [T, n_in], W: [n_out, n_in].  Returns [T, n_out]."""
        if isinstance(matrix, Tensor) and matrix.dtype == x.dtype:
            return F.linear(x, matrix)
        # Turning T activations is cheaper than turning n_out rows of weights back.
        turned = transform_activations(x, matrix.d) if isinstance(matrix, TrellisMatrix) else x
        n_out = matrix.shape[0] if isinstance(matrix, Tensor) else matrix.n_out
        out = torch.empty(x.shape[0], n_out, dtype=x.dtype)
        for first, rows in row_chunks(matrix):
            product = F.linear(turned, _decoded(rows, turned.dtype))
            out[:, first : first + product.shape[1]] = product
        return out

    def embed(self, ids: Tensor, matrix: Matrix, dtype: torch.dtype) -> Tensor:
        """Rows of W.  ids: [T] int64, W: [V, H].  Returns [T, H] of dtype."""
        if isinstance(matrix, TrellisMatrix):
            return matrix.rows(ids).to(dtype)
        return dequantize(matrix)[ids].to(dtype)

    def expert(
        self,
        x: Tensor,
        expert: Expert,
        activation: Activation = SILU,
        gate_up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
    ) -> Tensor:
        """y = down act(gate x, up x), silu(gate x) * (up x) for one.  x, y: [T, H]."""
        gate, up = expert.split(self.linear(x, expert.gate_up))  # [T, I] each
        if gate_up_bias is not None:
            n_inner = expert.n_inner
            gate = gate + gate_up_bias[:n_inner].to(x.dtype)
            up = None if up is None else up + gate_up_bias[n_inner:].to(x.dtype)
        out = self.linear(_activated(gate, up, activation), expert.down)
        return out if down_bias is None else out + down_bias.to(x.dtype)

    def working_bytes(self, n_out: int, n_in: int) -> int:
        """The most memory that `linear` takes for weights of such a matrix in any format."""
        return DECODING_BYTES * most_chunk_weights(n_out, n_in)


def _activated(gate: Tensor, up: Tensor | None, kind: Activation) -> Tensor:
    """What down multiplies, [T, I].  gate: what is activated; up: None for an expert without."""
    if kind.limit is not None:
        gate = gate.clamp(max=kind.limit)
        up = None if up is None else up.clamp(-kind.limit, kind.limit)
    curve = F.silu(gate) if kind.steepness == 1 and kind.cubic == 0 else _curve(gate, kind)
    return curve if up is None else curve * (up + kind.shift if kind.shift else up)


def _curve(x: Tensor, kind: Activation) -> Tensor:
    bent = x if kind.cubic == 0 else x + kind.cubic * x**3
    return x * torch.sigmoid(kind.steepness * bent)


def _decoded(matrix: Matrix, dtype: torch.dtype) -> Tensor:
    """What a turned activation is multiplied with."""
    if isinstance(matrix, TrellisMatrix):
        return matrix.transformed()
    return dequantize(matrix).to(dtype)
