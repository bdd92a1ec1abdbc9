"""One operation, several implementations, chosen once when a model is loaded.

Knows:        the operations a decoder needs of weights in any format.
Ignorant of:  layers, caches, where weights came from.
"""

from typing import Protocol

import torch
from torch import Tensor

from lowmoe.spec import SILU, Activation
from quant.expert import Expert
from quant.matrix import Matrix


class Kernels(Protocol):
    """What every implementation offers.  x keeps its dtype from input to output."""

    def linear(self, x: Tensor, matrix: Matrix) -> Tensor:
        """y = W x.  x: [T, n_in], W: [n_out, n_in].  Returns [T, n_out]."""

    def embed(self, ids: Tensor, matrix: Matrix, dtype: torch.dtype) -> Tensor:
        """Rows of W.  ids: [T] int64, W: [V, H].  Returns [T, H] of dtype."""

    def expert(
        self,
        x: Tensor,
        expert: Expert,
        activation: Activation = SILU,
        gate_up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
    ) -> Tensor:
        """y = down act(gate x, up x), silu(gate x) * (up x) for one.  x: [T, H].  Returns [T, H].

        gate_up_bias: [2 I], gate's first, or [I] without a gate; down_bias: [H]; what is added to
        the linear maps.
        """

    def working_bytes(self, n_out: int, n_in: int) -> int:
        """The most memory that `linear` takes for weights of such a matrix in any format."""
