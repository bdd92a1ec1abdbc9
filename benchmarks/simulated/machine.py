"""A clock, and what moves bytes while it runs: a GPU, a bus, a CPU, a disk, one RAM for all.

Work is queued and done in order, queue by queue; it moves on only when the host lets time pass. RAM
is shared by who reads or writes it just then: all get what they want if there is enough, else those
that want little get it and the others share the rest alike, as memory controllers do.

Knows:        bytes, bandwidths, who comes after whom.
Ignorant of:  what the bytes are.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

Resource: TypeAlias = Literal["gpu", "bus", "cpu", "disk", "time"]
A_MOMENT = 1e-12  # seconds, less than anything here takes


@dataclass(slots=True, kw_only=True)
class Speeds:
    """Bytes a second.

    cpu: that the CPU computes if it has RAM to itself; ram: of all that read and write it together;
    ram_per_bus_byte: bytes of RAM that a byte sent over the bus costs, 1 where what it passes
    through stays in a cache.
    """

    gpu: float
    bus: float
    ram: float
    cpu: float
    disk: float
    ram_per_bus_byte: float = 1.0

    def most(self, resource: Resource) -> float:
        """What a resource moves at most; of time, seconds."""
        return 1.0 if resource == "time" else float(getattr(self, resource))

    def ram_bytes(self, resource: Resource) -> float:
        """Of RAM, for a byte of a resource."""
        shares = {"gpu": 0.0, "time": 0.0, "cpu": 1.0, "disk": 1.0, "bus": self.ram_per_bus_byte}
        return shares[resource]


@dataclass(slots=True)
class _Work:
    resource: Resource
    left: float


@dataclass(slots=True, eq=False)
class Mark:
    """A place in a queue.  at: when all before it was done, None until then."""

    at: float | None = None


@dataclass(slots=True)
class _Await:
    mark: Mark


class Queue:
    """Work that is done in order."""

    def __init__(self) -> None:
        self._items: deque[_Work | Mark | _Await] = deque()

    def add(self, resource: Resource, amount: float) -> None:
        """So many bytes, or seconds of time, after all before."""
        if amount > 0:
            self._items.append(_Work(resource, amount))

    def mark(self) -> Mark:
        """After all before."""
        mark = Mark()
        self._items.append(mark)
        return mark

    def wait_for(self, mark: Mark) -> None:
        """What is added later begins after it."""
        if mark.at is None:
            self._items.append(_Await(mark))

    def settle(self, now: float) -> bool:
        """Pass what takes no time; whether there was any."""
        before = len(self._items)
        while self._items:
            head = self._items[0]
            if isinstance(head, _Work) or (isinstance(head, _Await) and head.mark.at is None):
                break
            if isinstance(head, Mark):
                head.at = now
            self._items.popleft()
        return len(self._items) < before

    @property
    def work(self) -> _Work | None:
        """What is being done, if anything."""
        head = self._items[0] if self._items else None
        return head if isinstance(head, _Work) else None

    def drop_done(self) -> None:
        """Leave what is being done behind if nothing is left of it."""
        work = self.work
        if work is not None and work.left <= 0:
            self._items.popleft()


class Machine:
    """now: seconds; speeds: may be changed at any time."""

    def __init__(self, speeds: Speeds) -> None:
        self.now, self.speeds = 0.0, speeds
        self._queues: list[Queue] = []
        self._host = self.queue()

    def queue(self) -> Queue:
        """One more."""
        queue = Queue()
        self._queues.append(queue)
        return queue

    def clock(self) -> float:
        """In place of time.perf_counter."""
        return self.now

    def do(self, resource: Resource, amount: float) -> None:
        """The host does this and nothing else until it is done."""
        self._host.add(resource, amount)
        self.until(self._host.mark())

    def until(self, mark: Mark) -> None:
        """The host waits."""
        self._run(lambda: mark.at is not None)

    def _run(self, is_done: Callable[[], bool]) -> None:
        while True:
            while any([queue.settle(self.now) for queue in self._queues]):
                pass
            if is_done():
                return
            self._step()

    def _step(self) -> None:
        """Until the first of what is being done is done."""
        works = [work for queue in self._queues if (work := queue.work) is not None]
        assert works, "deadlock: waiting for work that waits for itself"
        rates = self._rates(works)
        seconds = min(work.left / rate for work, rate in zip(works, rates, strict=True))
        for work, rate in zip(works, rates, strict=True):
            work.left -= seconds * rate
            if work.left / rate < A_MOMENT:
                work.left = 0.0
        self.now += seconds
        for queue in self._queues:
            queue.drop_done()

    def _rates(self, works: list[_Work]) -> list[float]:
        speeds = self.speeds
        most = [speeds.most(work.resource) for work in works]
        shares = [speeds.ram_bytes(work.resource) for work in works]
        wanted = sorted((m * s, i) for i, (m, s) in enumerate(zip(most, shares, strict=True)) if s)
        left = speeds.ram
        for n_before, (ram, i) in enumerate(wanted):
            given = min(ram, left / (len(wanted) - n_before))
            left -= given
            most[i] = given / shares[i]
        return most
