"""The operations in plain torch: slow, right, for every format, on any machine.

Knows:        how to multiply with a matrix of each format.
Ignorant of:  layers, caches, where weights came from.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from quant.expert import Expert
from quant.matrix import Matrix, TrellisMatrix, dequantize
from quant.transform import transform_activations


class ReferenceKernels:
    """Weights are decoded at every use and dropped; activations stay in floating point."""

    def linear(self, x: Tensor, matrix: Matrix) -> Tensor:
        """y = W x.  x: [T, n_in], W: [n_out, n_in].  Returns [T, n_out]."""
        if isinstance(matrix, TrellisMatrix):
            # Turning T activations is cheaper than turning n_out rows of weights back.
            return F.linear(transform_activations(x, matrix.d), matrix.transformed()).to(x.dtype)
        return F.linear(x, dequantize(matrix).to(x.dtype))

    def embed(self, ids: Tensor, matrix: Matrix, dtype: torch.dtype) -> Tensor:
        """Rows of W.  ids: [T] int64, W: [V, H].  Returns [T, H] of dtype."""
        if isinstance(matrix, TrellisMatrix):
            return matrix.rows(ids).to(dtype)
        return dequantize(matrix)[ids].to(dtype)

    def expert(self, x: Tensor, expert: Expert) -> Tensor:
        """y = down (silu(gate x) * (up x)).  x: [T, H].  Returns [T, H]."""
        gate, up = expert.split(self.linear(x, expert.gate_up))  # [T, I] each
        return self.linear(F.silu(gate) * up, expert.down)
