"""A GPU for machines that have none: CPU tensors, and operations that somebody else implements.

What it captures are calls of operations with the very arguments they had; replaying makes the same
calls and runs nothing else. So work that is not the same work every time, or that is done by
anything but operations, is found out as a CUDA graph would find it out: by wrong results.

Knows:        what lowmoe/kernels/gpu.py asks for, where lowmoe finds cards.
Ignorant of:  what operations do.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from cuda_ext import ops
from cuda_ext.card import Card, Facts
from cuda_ext.launch import Launch
from lowmoe.checkpoint.buffers import page_aligned
from tests.cuda_ext import oracle

Operation = Callable[..., None]
CARD = Card(
    index=0,
    name="NVIDIA GeForce RTX 4090",
    sm=89,
    memory_bytes=25_400_000_000,
    n_multiprocessors=128,
    l2_bytes=72 * 2**20,
)


POISON = 0xFF  # as a scale it is no number, and no answer that it enters is one


class StandInEvent:
    """copies: those to be made before it has come, if it is of copies."""

    def __init__(self, copies: Callable[[], None] | None = None) -> None:
        self._copies = copies

    def wait(self) -> None:
        if self._copies is not None:
            self._copies()

    def seconds_since(self, earlier: "StandInEvent") -> float:
        return 1e-6  # there is no time; that is in benchmarks/simulated


class StandInMark:
    """came_s: is told when it had come, for those that were asked for before."""

    def __init__(self, came_s: Callable[[], float] | None = None) -> None:
        self._asked_s, self._came_s = time.perf_counter(), came_s

    def time_s(self) -> float:
        return self._asked_s if self._came_s is None else max(self._asked_s, self._came_s())


class StandInCopies:
    """Copies as late as they may be: when an event after them is waited for.

    Until then what they write to is poisoned, so that whoever reads it too early reads nonsense,
    and so does who gives it away too early; what they read from too early changed, is read changed.
    """

    def __init__(self) -> None:
        self._waiting: deque[tuple[Tensor, Tensor]] = deque()
        self._n_asked = self._n_made = 0
        self._made_s = [time.perf_counter()]  # when none was made, one, two, ..
        # Whoever sends in the background waits for events as well as the host.
        self._one_at_a_time = threading.Lock()

    def copy(self, target: Tensor, source: Tensor) -> None:
        assert target.shape == source.shape
        assert target.is_contiguous()
        assert source.is_contiguous()
        target.view(torch.uint8).fill_(POISON)
        with self._one_at_a_time:
            self._waiting.append((target, source))
            self._n_asked += 1

    def wait_for(self, event: Any) -> None:
        event.wait()

    def event(self) -> StandInEvent:
        return StandInEvent(partial(self._make, self._n_asked))

    def mark(self) -> StandInMark:
        n_asked = self._n_asked

        def came_s() -> float:
            self._make(n_asked)
            return self._made_s[n_asked]

        return StandInMark(came_s)

    def _make(self, n_copies: int) -> None:
        """The first so many."""
        with self._one_at_a_time, torch.inference_mode():
            while self._n_made < n_copies:
                target, source = self._waiting.popleft()
                target.copy_(source)
                self._n_made += 1
                self._made_s.append(time.perf_counter())


class StandInGpu:
    """free_bytes: what may be taken, whatever was; n_captured, n_replayed,
    n_released: how often.
    """

    name = "a stand-in"
    place = torch.device("cpu")
    n_multiprocessors = 4

    def __init__(
        self, operations: Mapping[str, Operation] = oracle.OPERATIONS, free_bytes: int = 2**40
    ) -> None:
        self.operations: Any = _Operations(operations)
        self.memory_bytes = self.free_bytes = free_bytes
        self.n_captured = self.n_replayed = self.n_released = 0

    def available_bytes(self) -> int:
        return self.free_bytes

    def release_unused(self) -> None:
        self.n_released += 1

    def staging(self, n_bytes: int) -> Tensor:
        return page_aligned(n_bytes)

    def copy(self, target: Tensor, source: Tensor) -> None:
        assert target.shape == source.shape
        assert target.is_contiguous()
        assert source.is_contiguous()
        self.operations.call(lambda to, of: to.copy_(of), target, source)

    def add(self, target: Tensor, source: Tensor) -> None:
        self.operations.call(lambda to, of: to.add_(of), target, source)

    def event(self) -> StandInEvent:
        return StandInEvent()  # all work is done when it is asked for

    def mark(self) -> StandInMark:
        assert not self.operations.is_recording
        return StandInMark()

    def wait_for(self, event: StandInEvent) -> None:
        event.wait()

    def copies(self) -> StandInCopies:
        return StandInCopies()

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        calls = self.operations.recorded(work)
        self.n_captured += 1

        def replay() -> None:
            self.n_replayed += 1
            for operation, arguments in calls:
                operation(*arguments)

        return replay

    def read_bandwidth(self) -> float:
        return 1e12


def with_kernels(launch: Launch) -> dict[str, Operation]:
    """The operations as cuda_ext launches them."""

    def bound(run: Callable[..., None]) -> Operation:
        return lambda *arguments: run(launch, *arguments)

    return {name: bound(run) for name, (run, _) in ops.OPERATIONS.items()}


class Cards:
    """A machine whose cards are stand-ins, a 4090 unless others are put.

    free_bytes: of each; limits: those they were opened with.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._patch = patch
        self.free_bytes = 2**40
        self.limits: list[int | None] = []
        patch.setattr("lowmoe.engine.gpu.open_card", self._open)
        self.put(CARD)

    def put(self, *cards: Card) -> None:
        facts = Facts(driver=(13, 0), torch=(13, 0), cuda_core=(99, 0), cards=cards)
        self._patch.setattr("lowmoe.engine.gpu.look", lambda: facts)

    def _open(self, card: Card, *, limit_bytes: int | None, **others: Any) -> StandInGpu:
        self.limits.append(limit_bytes)
        return StandInGpu(free_bytes=self.free_bytes)


class _Operations:
    def __init__(self, operations: Mapping[str, Operation]) -> None:
        self._operations = operations
        self._calls: list[tuple[Operation, tuple[Any, ...]]] | None = None

    def __getattr__(self, name: str) -> Operation:
        return partial(self.call, self._operations[name])

    @property
    def is_recording(self) -> bool:
        return self._calls is not None

    def call(self, operation: Operation, *arguments: Any) -> None:
        if self._calls is not None:
            self._calls.append((operation, arguments))
        operation(*arguments)

    def recorded(self, work: Callable[[], None]) -> list[tuple[Operation, tuple[Any, ...]]]:
        """The calls that some work makes, made."""
        self._calls = calls = []
        work()
        self._calls = None
        return calls
