"""A GPU, a ring to it, a CPU and a disk whose work takes simulated time and comes to nothing.

Where tokens go is made up; an expert is a few bytes that stand for all of its.

Knows:        what lowmoe/kernels/gpu.py asks for, what each operation moves.
Ignorant of:  what lowmoe does with it.
"""

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.simulated.machine import Machine, Mark, Queue
from benchmarks.simulated.routing import MadeUpRouting
from cuda_ext.ops import NAMESPACE, OPERATIONS
from lowmoe.decoder.cpu_share import HostTokens
from lowmoe.decoder.moe import Routing
from lowmoe.experts.pinned_ring import N_BUFFERS, PIECE_BYTES, Sending, Span
from lowmoe.kernels.gpu import Event


@dataclass(frozen=True, slots=True, kw_only=True)
class Overheads:
    """Seconds that move nothing.

    operation_gap: of the GPU, at an operation's ends (docs/performance.md); layer: of the host, on
    a layer: Python, four launches, waking up after the wait; operation: on one that is not
    captured; begin: on telling the thread that sends, hand_over until it does; wake: of threads
    that compute.
    """

    operation_gap: float = 0.0
    layer: float = 0.0
    operation: float = 0.0
    begin: float = 0.0
    hand_over: float = 0.0
    wake: float = 0.0


NO_OVERHEADS = Overheads()
# A layer's Python takes 50 us by a profile of this simulation; no card has measured the rest.
USUAL_OVERHEADS = Overheads(
    operation_gap=2e-6, layer=80e-6, operation=15e-6, begin=20e-6, hand_over=30e-6, wake=10e-6
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What is moved.  expert: bytes of one; layer: of a layer's other weights; head: of the last
    matrix; cached: of a layer's keys and values so far; vocabulary: of the stand-in's head.
    """

    expert: float
    layer: float
    head: float
    cached: float
    vocabulary: int


class SimulatedEvent:
    """A place in a queue of work."""

    def __init__(self, machine: Machine, queue: Queue, after_s: float = 0.0) -> None:
        """after_s: of the host, once it has waited."""
        self._machine, self._after_s = machine, after_s
        self.mark: Mark = queue.mark()

    def wait(self) -> None:
        self._machine.until(self.mark)
        self._machine.do("time", self._after_s)

    def seconds_since(self, earlier: Event) -> float | None:
        assert isinstance(earlier, SimulatedEvent)
        if self.mark.at is None or earlier.mark.at is None:
            return None
        return self.mark.at - earlier.mark.at


class SimulatedCopies:
    """What is copied is there at once; what comes after it comes when it would."""

    def __init__(self, machine: Machine) -> None:
        self._machine, self.queue = machine, machine.queue()

    def copy(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source)

    def wait_for(self, event: Event) -> None:
        assert isinstance(event, SimulatedEvent)
        self.queue.wait_for(event.mark)

    def event(self) -> SimulatedEvent:
        return SimulatedEvent(self._machine, self.queue)


class SimulatedSending(Sending):
    """Whose experts are read from RAM a ring ahead of the bus."""

    def __init__(self, machine: Machine, span: Future[Span], read: Mark) -> None:
        super().__init__(span)
        self._machine, self._read = machine, read

    def event(self) -> Event:
        self.join()
        return super().event()

    def join(self) -> None:
        self._machine.until(self._read)


class SimulatedRing:
    """In place of PinnedRing: sends what stands for an expert in the time of all its bytes."""

    def __init__(self, gpu: "SimulatedGpu") -> None:
        self.copies, self._machine = gpu.copies(), gpu.machine
        self._expert_bytes, self._overheads = gpu.sizes.expert, gpu.overheads
        self._in_ring = min(self._expert_bytes, N_BUFFERS * PIECE_BYTES)
        self._read = Mark(at=0.0)

    def begin(self, send: Callable[[], object], after: Event | None) -> Sending:
        if after is not None:
            self.copies.wait_for(after)
        self._machine.do("time", self._overheads.begin)
        begin = self.copies.event()
        self.copies.queue.add("time", self._overheads.hand_over)
        send()
        span: Future[Span] = Future()
        span.set_result(Span(begin, self.copies.event()))
        return SimulatedSending(self._machine, span, self._read)

    def send(self, targets: Iterable[Tensor], sources: Iterable[Tensor]) -> Event:
        """All parts of one expert."""
        for target, source in zip(targets, sources, strict=True):
            self.copies.copy(target, source[: target.shape[0]])
        queue = self.copies.queue
        queue.add("bus", self._expert_bytes - self._in_ring)
        self._read = queue.mark()
        queue.add("bus", self._in_ring)
        return self.copies.event()

    def close(self) -> None:
        """Nothing."""


class SimulatedGpu:
    """operations: those of cuda_ext/ops.py by their names."""

    name = "simulated"
    place = torch.device("cpu")
    n_multiprocessors = 4
    memory_bytes = 2**40

    def __init__(
        self, machine: Machine, sizes: Sizes, routing: MadeUpRouting, overheads: Overheads
    ) -> None:
        self.machine, self.sizes, self.overheads = machine, sizes, overheads
        self._queue, self._routing = machine.queue(), routing
        self._recorded: list[Callable[[], None]] | None = None
        self.operations: Any = self

    def __getattr__(self, name: str) -> Callable[..., None]:
        return partial(self._operate, name)

    def available_bytes(self) -> int:
        return self.memory_bytes

    def release_unused(self) -> None:
        """Nothing."""

    def staging(self, n_bytes: int) -> Tensor:
        return torch.zeros(n_bytes, dtype=torch.uint8)

    def copy(self, target: Tensor, source: Tensor) -> None:
        self._ask(lambda: self._small(lambda: target.copy_(source)))

    def add(self, target: Tensor, source: Tensor) -> None:
        self._ask(lambda: self._small(lambda: None))

    def event(self) -> SimulatedEvent:
        return SimulatedEvent(self.machine, self._queue, self.overheads.layer)

    def wait_for(self, event: Event) -> None:
        assert isinstance(event, SimulatedEvent)
        self._queue.wait_for(event.mark)

    def copies(self) -> SimulatedCopies:
        return SimulatedCopies(self.machine)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        self._recorded = calls = []
        work()
        self._recorded = None

        def replay() -> None:
            for call in calls:
                call()

        return replay

    def read_bandwidth(self) -> float:
        return self.machine.speeds.gpu

    # --- what operations take

    def _ask(self, call: Callable[[], None]) -> None:
        if self._recorded is not None:
            self._recorded.append(call)
        else:
            call()

    def _operate(self, name: str, *given: Any) -> None:
        if self._recorded is None:
            self.machine.do("time", self.overheads.operation)
        self._ask(partial(self._do, name, given))

    def _small(self, work: Callable[[], object]) -> None:
        work()
        self._queue.add("time", self.overheads.operation_gap)

    def _do(self, name: str, given: tuple[Any, ...]) -> None:
        of = dict(zip(_arguments(name), given, strict=True))
        self._queue.add("time", self.overheads.operation_gap)
        self._queue.add("gpu", self._bytes(name, of))
        if name == "norm_route":
            self._routing.route(of["router"].data_ptr(), of["weights"], of["ids"], of["first"])

    def _bytes(self, name: str, of: Mapping[str, Any]) -> float:
        sizes = self.sizes
        if name == "linear":
            # Queries, keys and values and the output of attention, half of a layer's weights each.
            return sizes.head if of["n_out"] == sizes.vocabulary else sizes.layer / 2
        if name == "attend":
            return sizes.cached
        if name == "experts_inner":
            return 2 / 3 * sizes.expert * _n_there(of["parts"], of["first"])
        if name == "experts_down":
            return 1 / 3 * sizes.expert * _n_there(of["parts"], of["first"])
        return 0.0


@cache
def _arguments(name: str) -> tuple[str, ...]:
    """An operation's, by the names that its schema gives them."""
    schema = torch._C.parse_schema(f"{NAMESPACE}::{name}{OPERATIONS[name][1]}")
    return tuple(argument.name for argument in schema.arguments)


def _n_there(table: Tensor, first: Tensor) -> int:
    """Experts that have tokens and an address."""
    return int(((first[1:] > first[:-1]) & (table[: first.shape[0] - 1, 0] != 0)).sum())


class SimulatedShare:
    """In place of CpuShare."""

    def __init__(self, gpu: SimulatedGpu, routing: MadeUpRouting) -> None:
        self._machine, self._sizes, self._routing = gpu.machine, gpu.sizes, routing
        self._wake = gpu.overheads.wake

    def begin(self, layer_id: int, tokens: HostTokens) -> None:
        """Nothing."""

    def run(self, layer_id: int, experts: Mapping[int, object]) -> None:
        self._machine.do("time", self._wake)
        self._machine.do("cpu", self._sizes.expert * len(experts))

    def finish(self, layer_id: int, tokens: HostTokens) -> None:
        """Nothing."""

    def foresee(self, layer_id: int, x: Tensor) -> Routing:
        return self._routing.foreseen(layer_id)


class SimulatedReads:
    """In place of the store's threads: reads follow one another at the disk's bandwidth."""

    def __init__(self, machine: Machine, expert_bytes: float) -> None:
        self._machine, self._expert_bytes = machine, expert_bytes
        self._queue = machine.queue()

    def submit(self, read: Callable[..., None], *given: object) -> "SimulatedRead":
        read(*given)
        self._queue.add("disk", self._expert_bytes)
        return SimulatedRead(self._machine, self._queue.mark())

    def shutdown(self, *, wait: bool, cancel_futures: bool) -> None:
        """Nothing."""


class SimulatedRead(Future[None]):
    """A read that is done when its bytes have been moved."""

    def __init__(self, machine: Machine, mark: Mark) -> None:
        super().__init__()
        self._machine, self._mark = machine, mark

    def done(self) -> bool:
        return self._mark.at is not None

    def result(self, timeout: float | None = None) -> None:
        self._machine.until(self._mark)

    def exception(self, timeout: float | None = None) -> None:
        return self.result()


def wait_for_one(reads: Iterable[SimulatedRead], return_when: str) -> None:
    """In place of concurrent.futures.wait: reads are done in the order they were asked for."""
    assert return_when == "FIRST_COMPLETED"
    next(iter(reads)).result()
