"""What of a card can be tried without one: the arithmetic of its memory, that there is but one,
which streams and events it is asked for.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cuda_ext.card import Card
from lowmoe.checkpoint.buffers import page_aligned
from lowmoe.errors import UsageError
from lowmoe.kernels import cuda
from lowmoe.kernels.cuda import MARGIN_BYTES, CudaGpu, open_card
from tests.stand_in_gpu import CARD

GIB = 2**30


class Driver:
    """What torch says of a card's memory.  share: of it that this process is limited to."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.free = 20 * GIB
        self.reserved = self.allocated = 0
        self.share: float | None = None
        patch.setattr(torch.cuda, "mem_get_info", lambda place: (self.free, CARD.memory_bytes))
        patch.setattr(torch.cuda, "memory_reserved", lambda place: self.reserved)
        patch.setattr(torch.cuda, "memory_allocated", lambda place: self.allocated)
        patch.setattr(torch.cuda, "set_per_process_memory_fraction", self._limit)

    def _limit(self, share: float, place: torch.device) -> None:
        self.share = share


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    return Driver(monkeypatch)


def test_what_is_available_is_what_is_free_and_what_torch_keeps_less_a_margin(
    driver: Driver,
) -> None:
    gpu = CudaGpu(CARD, limit_bytes=None)
    assert driver.share == 1
    assert gpu.memory_bytes == CARD.memory_bytes
    assert gpu.available_bytes() == 20 * GIB - MARGIN_BYTES
    driver.reserved, driver.allocated = 3 * GIB, GIB
    assert gpu.available_bytes() == 22 * GIB - MARGIN_BYTES
    driver.free = driver.reserved = driver.allocated = 0
    assert gpu.available_bytes() == 0


def test_a_limit_is_of_all_that_this_process_takes(driver: Driver) -> None:
    gpu = CudaGpu(CARD, limit_bytes=8 * GIB)
    assert driver.share == 8 * GIB / CARD.memory_bytes
    assert gpu.memory_bytes == 8 * GIB
    assert gpu.available_bytes() == 8 * GIB - MARGIN_BYTES
    driver.reserved = driver.allocated = 5 * GIB
    assert gpu.available_bytes() == 3 * GIB - MARGIN_BYTES
    driver.free = GIB
    assert gpu.available_bytes() == GIB - MARGIN_BYTES


def test_a_limit_beyond_the_card_is_the_cards(driver: Driver) -> None:
    assert CudaGpu(CARD, limit_bytes=100 * GIB).memory_bytes == CARD.memory_bytes
    assert driver.share == 1


def test_kernels_are_loaded_once_and_for_one_card(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    loaded: list[int] = []
    monkeypatch.setattr(cuda, "_registered", {})
    monkeypatch.setattr(cuda, "put_on", lambda card, *others: loaded.append(card.index))
    monkeypatch.setattr(cuda.ops, "define", lambda: None)
    monkeypatch.setattr(cuda.ops, "implement", lambda launch, key: key)

    def opened(card: Card) -> CudaGpu:
        return open_card(card, kernels=tmp_path, limit_bytes=None, announce=lambda line: None)

    assert [opened(CARD).name for _ in range(2)] == [CARD.name] * 2
    assert loaded == [0]
    with pytest.raises(UsageError, match="gpu is cuda:1, but this process computes on cuda:0 alre"):
        opened(replace(CARD, index=1))


# --- memory to copy from

PAGE = 4096


class PinnedMemory:
    """What torch pins.  first_bytes: behind a page's beginning where each piece begins in turn, 0
    after those; asked: for how many bytes.
    """

    def __init__(self, patch: pytest.MonkeyPatch, *first_bytes: int) -> None:
        self._firsts, self.asked = list(first_bytes), list[int]()
        patch.setattr(torch, "empty", self._empty)

    def _empty(self, n_bytes: int, *, dtype: torch.dtype, pin_memory: bool) -> torch.Tensor:
        assert pin_memory
        self.asked.append(n_bytes)
        first = self._firsts.pop(0) if self._firsts else 0
        return page_aligned(first + n_bytes)[first:]


def test_a_power_of_two_of_bytes_is_all_that_is_pinned_for_it(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned = PinnedMemory(monkeypatch)
    memory = CudaGpu(CARD, limit_bytes=None).staging(8 * 2**20)
    assert pinned.asked == [memory.nbytes] == [8 * 2**20]


@pytest.mark.parametrize("firsts", [(512,), (3584, 16)])
def test_what_is_copied_from_begins_where_a_page_does_wherever_the_driver_puts_it(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, firsts: tuple[int, ...]
) -> None:
    pinned = PinnedMemory(monkeypatch, *firsts)
    memory = CudaGpu(CARD, limit_bytes=None).staging(1000)
    assert (memory.nbytes, memory.data_ptr() % PAGE) == (1000, 0)
    assert pinned.asked == [1000, 1000 + PAGE]


def test_ram_that_cannot_be_pinned_is_a_shortage(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: object, **options: object) -> None:
        raise torch.AcceleratorError("CUDA error: invalid argument")

    monkeypatch.setattr(torch, "empty", refused)
    with pytest.raises(torch.OutOfMemoryError, match="1000 bytes of RAM cannot be pinned"):
        CudaGpu(CARD, limit_bytes=None).staging(1000)


# --- streams


@dataclass(frozen=True, slots=True)
class FakeStream:
    """One of those that torch has.  priority: None for the default stream."""

    priority: int | None
    number: int

    def wait_stream(self, other: "FakeStream") -> None:
        """Nothing is ever under way."""


class Streams:
    """torch's streams, 32 of each priority handed out in turn, and how work is captured on them.

    refusal: what ending a capture raises, None for nothing.
    """

    IN_POOL = 32

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.current = FakeStream(None, 0)
        self.refusal: Exception | None = None
        self._n_taken = {0: 0, -1: 0}
        fakes: dict[str, Any] = {
            "Stream": self._take,
            "current_stream": lambda place=None: self.current,
            "stream": self._being_current,
            "device": self._on_device,
            "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
            "graph": self._captured,
        }
        for name, fake in fakes.items():
            patch.setattr(torch.cuda, name, fake)

    def _take(self, place: torch.device | None = None, priority: int = 0) -> FakeStream:
        number, self._n_taken[priority] = self._n_taken[priority], self._n_taken[priority] + 1
        return FakeStream(priority, number % self.IN_POOL)

    @contextmanager
    def _being_current(self, stream: FakeStream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def _on_device(self, place: torch.device) -> Iterator[None]:
        yield

    @contextmanager
    def _captured(
        self, graph: object, *, stream: FakeStream, capture_error_mode: str
    ) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        if self.refusal is not None:
            raise self.refusal  # as torch.cuda.graph does: its stream stays the current one
        self.current = before


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch, driver: Driver) -> Streams:
    return Streams(monkeypatch)


def noted(note: Callable[[], None]) -> Any:
    """In place of a tensor that is copied to."""
    return SimpleNamespace(copy_=lambda source, non_blocking: note())


def test_no_work_is_captured_on_the_stream_of_copies(streams: Streams) -> None:
    gpu = CudaGpu(CARD, limit_bytes=None)
    captured: set[FakeStream] = set()
    copied: set[FakeStream] = set()
    copies = gpu.copies()
    copies.copy(noted(lambda: copied.add(streams.current)), torch.zeros(1))
    for _ in range(2 * Streams.IN_POOL):
        gpu.capture(lambda: captured.add(streams.current))
    assert len(captured) == Streams.IN_POOL
    assert len(copied) == 1
    assert not copied & captured
    assert streams.current == FakeStream(None, 0)


def test_after_a_capture_that_cannot_be_ended_the_stream_before_it_is_the_current_one(
    streams: Streams,
) -> None:
    gpu = CudaGpu(CARD, limit_bytes=None)
    streams.refusal = torch.AcceleratorError("CUDA error: out of memory")
    with pytest.raises(torch.AcceleratorError):
        gpu.capture(lambda: None)
    assert streams.current == FakeStream(None, 0)


def test_who_waits_for_copies_sleeps_and_who_waits_for_the_gpu_does_not(
    streams: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[bool] = []

    def event(*, enable_timing: bool, blocking: bool) -> SimpleNamespace:
        assert enable_timing, "copies are timed by their events"
        made.append(blocking)
        return SimpleNamespace(record=lambda stream: None)

    monkeypatch.setattr(torch.cuda, "Event", event)
    gpu = CudaGpu(CARD, limit_bytes=None)
    gpu.copies().event()
    gpu.event()
    assert made == [True, False]
