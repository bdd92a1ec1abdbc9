"""The same layer of experts in float16 by torch, and in nf4 by bitsandbytes.

Knows:        how both are called.
Ignorant of:  lowmoe's kernels, clocks.
"""

from collections.abc import Callable

import bitsandbytes.functional as bnb
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.shapes import ExpertShape

Work = Callable[[], None]


def half_precision(shape: ExpertShape, x: Tensor) -> Work:
    """One expert, x [T, H] float16."""
    gate_up = torch.randn(2 * shape.n_inner, shape.n_hidden, device=x.device).half() / 64
    down = torch.randn(shape.n_hidden, shape.n_inner, device=x.device).half() / 64

    def work() -> None:
        gate, up = F.linear(x, gate_up).chunk(2, dim=1)
        F.linear(F.silu(gate) * up, down)

    return work


def nf4(shape: ExpertShape, x: Tensor) -> Work:
    """One expert, x [1, H] float16: bitsandbytes' own kernel for one token."""
    matrices = []
    for n_out, n_in in ((2 * shape.n_inner, shape.n_hidden), (shape.n_hidden, shape.n_inner)):
        weights = torch.randn(n_out, n_in, device=x.device).half() / 64
        matrices.append(bnb.quantize_4bit(weights, blocksize=64, quant_type="nf4"))

    def product(x: Tensor, index: int) -> Tensor:
        codes, state = matrices[index]
        return bnb.gemv_4bit(x, codes.t(), state=state)

    def work() -> None:
        gate, up = product(x, 0).chunk(2, dim=-1)
        product((F.silu(gate) * up).contiguous(), 1)

    return work
