"""What a card can do at best: bytes copied and float16 products, measured in the same run.

Knows:        torch's copy and matrix product.
Ignorant of:  lowmoe's kernels.
"""

import torch

from benchmarks.gpu.timing import median, seconds

COPY_BYTES = 2 * 2**30  # read, and as many written: far more than any L2 cache
SIDE = 8192  # of the square matrices


def copy_bandwidth() -> float:
    """Bytes read plus bytes written a second of a copy within the card's memory."""
    source = torch.randint(0, 256, (COPY_BYTES,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / median(seconds(lambda: target.copy_(source)))


def half_precision_flops() -> float:
    """Operations a second, a multiplication and an addition counting two, of float16 matrices."""
    a, b = (torch.randn(SIDE, SIDE, device="cuda").half() for _ in range(2))
    out = torch.empty_like(a)
    return 2 * SIDE**3 / median(seconds(lambda: torch.matmul(a, b, out=out)))
