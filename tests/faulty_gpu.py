"""A stand-in for a GPU that fails at a moment of the test's choice.

Knows:        allocations at its place, copies, operations, by their numbers.
Ignorant of:  who asks for them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tests.stand_in_gpu import StandInCopies, StandInGpu

KINDS = ("allocation", "pinned", "copy", "operation")


class Faults:
    """Counts moments by kind, and raises at the one that `arm` names, or at it and all after."""

    def __init__(self) -> None:
        self.counts = dict.fromkeys(KINDS, 0)
        self._kind, self._at, self._error = "", 0, Exception()
        self._for_ever = False
        self.has_failed = False

    def arm(self, kind: str, at: int, error: BaseException, *, for_ever: bool = False) -> None:
        """at: 1 for the first from now on."""
        assert kind in KINDS
        self.has_failed, self._for_ever = False, for_ever
        self._kind, self._at, self._error = kind, self.counts[kind] + at, error  # type: ignore[assignment]

    def disarm(self) -> None:
        self._kind = ""

    def moment(self, kind: str) -> None:
        self.counts[kind] += 1
        count = self.counts[kind]
        if kind == self._kind and (count == self._at or (self._for_ever and count > self._at)):
            self.has_failed = True
            raise self._error.with_traceback(None)


class FaultyCopies(StandInCopies):
    def __init__(self, faults: Faults) -> None:
        super().__init__()
        self._faults = faults

    def copy(self, target: Tensor, source: Tensor) -> None:
        self._faults.moment("copy")
        super().copy(target, source)


class FaultyGpu(StandInGpu):
    """What is made at its place is told from what is made elsewhere by the device's number."""

    place = torch.device("cpu", 0)

    def __init__(self, faults: Faults, free_bytes: int) -> None:
        super().__init__(free_bytes=free_bytes)
        self.faults = faults
        call = self.operations.call

        def counted(operation: Callable[..., None], *arguments: Any) -> None:
            faults.moment("operation")
            call(operation, *arguments)

        self.operations.call = counted

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        replay = super().capture(work)

        def counted() -> None:
            self.faults.moment("operation")
            replay()

        return counted

    def staging(self, n_bytes: int) -> Tensor:
        self.faults.moment("pinned")
        return super().staging(n_bytes)

    def copies(self) -> FaultyCopies:
        return FaultyCopies(self.faults)


class _Allocations(TorchFunctionMode):
    def __init__(self, faults: Faults) -> None:
        super().__init__()
        self._faults = faults

    def __torch_function__(
        self, function: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        places = [*arguments, *(options or {}).values()]
        if any(isinstance(p, torch.device) and p == FaultyGpu.place for p in places):
            self._faults.moment("allocation")
        return function(*arguments, **(options or {}))


@contextmanager
def counted_allocations(faults: Faults) -> Iterator[None]:
    """Of this thread, until the block ends."""
    with _Allocations(faults):
        yield
