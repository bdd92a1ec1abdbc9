"""What every operation launches: kernels, grids, blocks, in order.

Knows:        which kernel serves which shapes, how a workspace is divided.
Ignorant of:  how kernels are compiled, what they compute inside.
"""

from torch import Tensor

from quant.layout import MAX_PLANES

# The beginning of every workspace: counters by which blocks find out who is the last. Each
# operation leaves them 0; what it keeps beyond them is its own, and garbage to the next.
COUNTER_BYTES = 64 * 1024


def three(planes: list[Tensor]) -> list[Tensor]:
    """As many as a kernel has parameters for, of which it reads len(planes)."""
    return [*planes, *planes[-1:] * (MAX_PLANES - len(planes))]
