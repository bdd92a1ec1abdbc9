"""What a pass asks of a GPU: memory, operations, copies, work that is captured.

Knows:        the requests.
Ignorant of:  CUDA; which operations a pass is made of.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from lowmoe.timeline import Mark


class Event(Protocol):
    """All that was asked for, of a GPU or of copies beside, before the event was made."""

    def wait(self) -> None:
        """Until it is done; the host waits."""

    def seconds_since(self, earlier: "Event") -> float | None:
        """From an earlier event of the same order to this one, None as long as one is to come."""


class Copies(Protocol):
    """Copies that go on beside a GPU's other work, in an order of their own.

    Until an event after a copy is waited for, what it writes to holds anything; what it reads from
    stays as it is.
    """

    def copy(self, target: Tensor, source: Tensor) -> None:
        """target at the GPU's place, source of its `staging`, contiguous and of one size."""

    def wait_for(self, event: Event) -> None:
        """What is asked for after this begins after the event; nobody waits now."""

    def event(self) -> Event:
        """After all copies asked for so far."""

    def mark(self) -> Mark:
        """The moment in which all copies asked for so far are done."""


class GpuSizes(Protocol):
    """What of a GPU decides how its memory is divided, whether or not there is one."""

    @property
    def name(self) -> str:
        """For people."""

    @property
    def n_multiprocessors(self) -> int:
        """Decides how work is cut."""

    @property
    def memory_bytes(self) -> int:
        """Of which shares are counted: all of it, or what it is limited to."""

    def available_bytes(self) -> int:
        """Memory that may be taken now, what is left to others already taken off."""


class Gpu(GpuSizes, Protocol):
    """One GPU, opened.  Work is done in the order it is asked for; reading a result waits.

    Where its memory does not do, requests raise what shortage.py knows.
    """

    @property
    def place(self) -> torch.device:
        """Where a tensor is made that is to be in its memory."""

    @property
    def operations(self) -> Any:
        """Those of cuda_ext/ops.py by their names, for tensors at `place`."""

    def release_unused(self) -> None:
        """Leave memory that no tensor takes any more to whoever else takes some there."""

    def staging(self, n_bytes: int) -> Tensor:
        """Memory of the host to copy from and to, [n_bytes] uint8, beginning where a page does.

        Raises torch.OutOfMemoryError, as making a tensor at `place` does.
        """

    def copy(self, target: Tensor, source: Tensor) -> None:
        """One of them at `place`, one of `staging`, contiguous and of one size.  Does not wait."""

    def add(self, target: Tensor, source: Tensor) -> None:
        """target += source, both at `place`.  Does not wait."""

    def event(self) -> Event:
        """After all work asked for so far, copies beside it left out."""

    def mark(self) -> Mark:
        """The moment in which all that is done; not while work is captured."""

    def wait_for(self, event: Event) -> None:
        """What is asked for after this begins after the event; nobody waits now."""

    def copies(self) -> Copies:
        """A new order of copies."""

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """What does some work again, on the same memory, at the cost of one launch.

        work: calls operations, `copy` and `add`, and nothing else; it is done, maybe more than
        once, to learn it.
        """

    def read_bandwidth(self) -> float:
        """Bytes a second that its memory moves, measured at the first call."""
