"""Memory that files are read into and kernels read from, in large pages.

4 KiB pages cost up to 13 % of read bandwidth, and only stretches of 2 MiB can be large pages. So
small buffers are cut out of large pieces.

Knows:        pages, alignment, how much is taken.
Ignorant of:  what the bytes are.
"""

import contextlib
import mmap
import sys

import torch
from torch import Tensor

from quant.layout import REGION_ALIGNMENT, round_up


def page_aligned(n_bytes: int) -> Tensor:
    """Zeroed memory of its own, uint8, in large pages where the kernel gives them."""
    if sys.platform == "win32":
        return torch.frombuffer(mmap.mmap(-1, n_bytes), dtype=torch.uint8)
    # Private, because Linux as it comes gives huge pages to private memory only.
    pages = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel built without larger ones refuses
            pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)


class Arena:
    """One piece of memory that buffers are cut from, none of them given back alone."""

    def __init__(self, n_bytes: int) -> None:
        self._memory = page_aligned(max(n_bytes, 1))
        self._taken = 0

    def take(self, n_bytes: int, alignment: int = REGION_ALIGNMENT) -> Tensor:
        """The next n_bytes, uint8, from a multiple of alignment on, at most a page."""
        first = round_up(self._taken, alignment)
        assert first + n_bytes <= self._memory.numel(), (first, n_bytes, self._memory.numel())
        self._taken = first + n_bytes
        return self._memory[first : self._taken]
