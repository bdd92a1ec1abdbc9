"""What a pass asks of a GPU: memory, operations, work that is captured.

Knows:        the requests.
Ignorant of:  CUDA; which operations a pass is made of.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor


class Gpu(Protocol):
    """One GPU, opened.  Work is done in the order it is asked for; reading a result waits."""

    @property
    def name(self) -> str:
        """For people."""

    @property
    def place(self) -> torch.device:
        """Where a tensor is made that is to be in its memory."""

    @property
    def n_multiprocessors(self) -> int:
        """Decides how work is cut."""

    @property
    def memory_bytes(self) -> int:
        """Of which shares are counted: all of it, or what it is limited to."""

    @property
    def operations(self) -> Any:
        """Those of cuda_ext/ops.py by their names, for tensors at `place`."""

    def available_bytes(self) -> int:
        """Memory that may be taken now, what is left to others already taken off."""

    def staging(self, n_bytes: int) -> Tensor:
        """Memory of the host to copy from, [n_bytes] uint8, beginning where a page does."""

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """What does some work again, on the same memory, at the cost of one launch.

        work: calls operations and nothing else; it is done, maybe more than once, to learn it.
        """

    def read_bandwidth(self) -> float:
        """Bytes a second that its memory moves, measured at the first call."""
