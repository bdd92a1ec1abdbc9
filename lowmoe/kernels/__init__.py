"""One operation, several implementations, chosen once when a model is loaded.

Knows:        the operations a decoder needs of weights in any format.
Ignorant of:  layers, caches, where weights came from.
"""

from typing import Protocol

import torch
from torch import Tensor

from quant.expert import Expert
from quant.matrix import Matrix


class Kernels(Protocol):
    """What every implementation offers.  x keeps its dtype from input to output."""

    def linear(self, x: Tensor, matrix: Matrix) -> Tensor:
        """y = W x.  x: [T, n_in], W: [n_out, n_in].  Returns [T, n_out]."""

    def embed(self, ids: Tensor, matrix: Matrix, dtype: torch.dtype) -> Tensor:
        """Rows of W.  ids: [T] int64, W: [V, H].  Returns [T, H] of dtype."""

    def expert(self, x: Tensor, expert: Expert) -> Tensor:
        """y = down (silu(gate x) * (up x)).  x: [T, H].  Returns [T, H]."""

    def working_bytes(self, n_out: int, n_in: int) -> int:
        """The most memory that `linear` takes for weights of such a matrix in any format."""
