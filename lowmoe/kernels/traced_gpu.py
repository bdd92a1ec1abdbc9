"""A GPU that says when it works, copies, and is waited for.

Every operation stands between two marks of the GPU's own clock. Captured work stands between two
marks as a whole, since nothing may come between its operations.

Knows:        what lowmoe/kernels/gpu.py asks for.
Ignorant of:  how it is shown, CUDA.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lowmoe.kernels.gpu import Copies, Event, Gpu
from lowmoe.timeline import COPIES, GPU, WAITS, Mark, Timeline


class TracedEvent:
    """event: the GPU's own; name: of what it comes after."""

    def __init__(self, event: Event, name: str, timeline: Timeline) -> None:
        self.event, self._name, self._timeline = event, name, timeline

    def wait(self) -> None:
        with self._timeline.span(self._timeline.row_of_thread(WAITS), self._name):
            self.event.wait()

    def seconds_since(self, earlier: Event) -> float | None:
        return self.event.seconds_since(_own(earlier))


class TracedCopies:
    """Copies of a GPU's."""

    def __init__(self, copies: Copies, timeline: Timeline) -> None:
        self._copies, self._timeline = copies, timeline

    def copy(self, target: Tensor, source: Tensor) -> None:
        begin = self._copies.mark()
        self._copies.copy(target, source)
        facts = {"bytes": source.nbytes}
        self._timeline.add(COPIES, "to the GPU", begin, self._copies.mark(), **facts)

    def wait_for(self, event: Event) -> None:
        self._copies.wait_for(_own(event))

    def event(self) -> TracedEvent:
        return TracedEvent(self._copies.event(), "copies", self._timeline)

    def mark(self) -> Mark:
        return self._copies.mark()


class TracedGpu:
    """Another Gpu, which does the work."""

    def __init__(self, gpu: Gpu, timeline: Timeline) -> None:
        self._gpu, self._timeline = gpu, timeline
        self.name, self.place = gpu.name, gpu.place
        self.n_multiprocessors, self.memory_bytes = gpu.n_multiprocessors, gpu.memory_bytes
        self.operations: Any = _TracedOperations(self)
        self._captured: list[str] | None = None  # what is being captured, while it is

    def run(self, name: str, operation: Callable[..., None], *arguments: Any) -> None:
        """Do this work, a span of its own unless it is being captured."""
        if self._captured is not None:
            self._captured.append(name)
            operation(*arguments)
            return
        begin = self._gpu.mark()
        operation(*arguments)
        self._timeline.add(GPU, name, begin, self._gpu.mark())

    def operation(self, name: str) -> Callable[..., None]:
        """One of those of the GPU."""
        found: Callable[..., None] = getattr(self._gpu.operations, name)
        return found

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        captured: list[str] = []
        self._captured = captured
        try:
            replay = self._gpu.capture(work)
        finally:
            self._captured = None
        names = list(dict.fromkeys(captured))
        shown = " … ".join(dict.fromkeys((names[0], names[-1]))) if names else "nothing"

        def replay_marked() -> None:
            begin = self._gpu.mark()
            replay()
            self._timeline.add(GPU, shown, begin, self._gpu.mark(), operations=names)

        return replay_marked

    def available_bytes(self) -> int:
        return self._gpu.available_bytes()

    def release_unused(self) -> None:
        self._gpu.release_unused()

    def staging(self, n_bytes: int) -> Tensor:
        return self._gpu.staging(n_bytes)

    def copy(self, target: Tensor, source: Tensor) -> None:
        self.run("copy", self._gpu.copy, target, source)

    def add(self, target: Tensor, source: Tensor) -> None:
        self.run("add", self._gpu.add, target, source)

    def event(self) -> TracedEvent:
        return TracedEvent(self._gpu.event(), "GPU", self._timeline)

    def mark(self) -> Mark:
        return self._gpu.mark()

    def wait_for(self, event: Event) -> None:
        self._gpu.wait_for(_own(event))

    def copies(self) -> TracedCopies:
        return TracedCopies(self._gpu.copies(), self._timeline)

    def read_bandwidth(self) -> float:
        return self._gpu.read_bandwidth()

    name: str
    place: torch.device
    n_multiprocessors: int
    memory_bytes: int


class _TracedOperations:
    """The operations of a GPU by their names."""

    def __init__(self, gpu: TracedGpu) -> None:
        self._gpu = gpu

    def __getattr__(self, name: str) -> Callable[..., None]:
        return partial(self._gpu.run, name, self._gpu.operation(name))


def _own(event: Event) -> Event:
    """The GPU's own event."""
    return event.event if isinstance(event, TracedEvent) else event
