"""An NVIDIA card as a Gpu: memory by torch, kernels by cuda_ext, CUDA graphs.

Knows:        torch.cuda, how the ops of cuda_ext come to run on a card.
Ignorant of:  models; which card was asked for, and why.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cuda_ext import ops
from cuda_ext.card import Card
from cuda_ext.compile import Announce
from cuda_ext.on_card import OnCard, put_on
from lowmoe.errors import UsageError
from lowmoe.kernels.gpu import Event
from lowmoe.settings import Settings
from quant.layout import round_up

# Left to the driver, to kernels' local memory, and to gaps between torch's pieces of memory.
MARGIN_BYTES = 512 * 2**20
PAGE_BYTES = 4096
PROBE_BYTES = 256 * 2**20  # twice, read and written: several times the L2 cache of any card
PROBE_RUNS = 5


class CapturedWork:
    """A CUDA graph.  Call it to replay it on torch's current stream."""

    def __init__(self, work: Callable[[], None], place: torch.device) -> None:
        # On a stream of its own, since the default one cannot be captured; once beforehand, since
        # what is loaded or allocated at a first call cannot be either.
        with torch.cuda.device(place):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            # torch.cuda.graph leaves its stream the current one where ending the capture fails, as
            # it does for want of memory; this puts the one before back.
            with torch.cuda.stream(stream):
                work()
                self._graph = torch.cuda.CUDAGraph()
                # Other threads may allocate meanwhile, which ends a capture in the default mode.
                with torch.cuda.graph(
                    self._graph, stream=stream, capture_error_mode="thread_local"
                ):
                    work()
            torch.cuda.current_stream().wait_stream(stream)

    def __call__(self) -> None:
        self._graph.replay()


class CudaEvent:
    """An event on a stream.  stream: of the work it comes after; sleeping: whether who waits for
    it sleeps instead of spinning, and wakes up later.
    """

    def __init__(self, stream: torch.cuda.Stream, *, sleeping: bool) -> None:
        self.event = torch.cuda.Event(enable_timing=True, blocking=sleeping)
        self.event.record(stream)

    def wait(self) -> None:
        self.event.synchronize()

    def seconds_since(self, earlier: Event) -> float | None:
        assert isinstance(earlier, CudaEvent)
        if not (earlier.event.query() and self.event.query()):
            return None
        return float(earlier.event.elapsed_time(self.event)) / 1e3


class CudaClock:
    """A card's clock beside the host's: both read at one moment."""

    def __init__(self, place: torch.device) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record(torch.cuda.current_stream(place))
        self.event.synchronize()
        self.time_s = time.perf_counter()


class CudaMark:
    """A moment on a stream."""

    def __init__(self, stream: torch.cuda.Stream, clock: CudaClock) -> None:
        self._event, self._clock = torch.cuda.Event(enable_timing=True), clock
        self._event.record(stream)

    def time_s(self) -> float:
        self._event.synchronize()
        since_ms: float = self._clock.event.elapsed_time(self._event)
        return self._clock.time_s + since_ms / 1e3


class CudaCopies:
    """A stream of its own."""

    def __init__(self, place: torch.device, clock: Callable[[], CudaClock]) -> None:
        # Of another priority than captures': torch has 32 streams of each and hands them out in
        # turn, so that the 33rd capture would have this very one, and what is copied meanwhile
        # would become part of it or break it off.
        self._stream, self._clock = torch.cuda.Stream(place, priority=-1), clock

    def copy(self, target: Tensor, source: Tensor) -> None:
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def wait_for(self, event: Event) -> None:
        assert isinstance(event, CudaEvent)
        self._stream.wait_event(event.event)

    def event(self) -> CudaEvent:
        # Who sends waits most of the time for a buffer, another being copied meanwhile: spinning,
        # it would take a core from the threads that compute.
        return CudaEvent(self._stream, sleeping=True)

    def mark(self) -> CudaMark:
        return CudaMark(self._stream, self._clock())


class CudaGpu:
    """A card whose kernels are loaded."""

    def __init__(self, card: Card, *, limit_bytes: int | None) -> None:
        """limit_bytes: of memory, for the whole process; None for all there is."""
        self.name = card.name
        self.n_multiprocessors = card.n_multiprocessors
        self.place = torch.device("cuda", card.index)
        self.memory_bytes = min(card.memory_bytes, limit_bytes or card.memory_bytes)
        self.operations: Any = torch.ops.lowmoe
        self._bandwidth: float | None = None
        self._clock: CudaClock | None = None  # read when it is first needed
        share = self.memory_bytes / card.memory_bytes
        torch.cuda.set_per_process_memory_fraction(share, self.place)

    def available_bytes(self) -> int:
        free, _ = torch.cuda.mem_get_info(self.place)
        taken = torch.cuda.memory_allocated(self.place)
        free += torch.cuda.memory_reserved(self.place) - taken  # torch's own, for it to give again
        return max(0, min(free, self.memory_bytes - taken) - MARGIN_BYTES)

    def release_unused(self) -> None:
        torch.cuda.empty_cache()

    def staging(self, n_bytes: int) -> Tensor:
        memory = _pinned(n_bytes)
        # The driver cuts small pieces out of pages. To find the next one in a page more is not for
        # all: torch pins a power of two, which of 8 MiB and a page is 16 MiB.
        if memory.data_ptr() % PAGE_BYTES:
            memory = _pinned(n_bytes + PAGE_BYTES)
        first = round_up(memory.data_ptr(), PAGE_BYTES) - memory.data_ptr()
        return memory[first : first + n_bytes]

    def copy(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def add(self, target: Tensor, source: Tensor) -> None:
        target.add_(source)

    def event(self) -> CudaEvent:
        # A layer's routing is waited for at every layer of every token, so without sleep.
        return CudaEvent(torch.cuda.current_stream(self.place), sleeping=False)

    def mark(self) -> CudaMark:
        return CudaMark(torch.cuda.current_stream(self.place), self._clock_now())

    def _clock_now(self) -> CudaClock:
        if self._clock is None:
            self._clock = CudaClock(self.place)
        return self._clock

    def wait_for(self, event: Event) -> None:
        assert isinstance(event, CudaEvent)
        torch.cuda.current_stream(self.place).wait_event(event.event)

    def copies(self) -> CudaCopies:
        return CudaCopies(self.place, self._clock_now)

    def capture(self, work: Callable[[], None]) -> CapturedWork:
        return CapturedWork(work, self.place)

    def read_bandwidth(self) -> float:
        """Of a copy: what is read and what is written."""
        if self._bandwidth is None:
            n_bytes = min(PROBE_BYTES, self.available_bytes() // 4)
            self._bandwidth = 2 * n_bytes / _copy_seconds(n_bytes, self.place)
        return self._bandwidth


def _pinned(n_bytes: int) -> Tensor:
    try:
        return torch.empty(n_bytes, dtype=torch.uint8, pin_memory=True)
    except torch.AcceleratorError as e:
        raise torch.OutOfMemoryError(f"{n_bytes} bytes of RAM cannot be pinned") from e


def _copy_seconds(n_bytes: int, place: torch.device) -> float:
    """The best of some copies within the card, after one that does not count."""
    source, target = (torch.zeros(n_bytes, dtype=torch.uint8, device=place) for _ in range(2))
    times: list[float] = []
    for _ in range(PROBE_RUNS + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record(torch.cuda.current_stream(place))
        target.copy_(source)
        end.record(torch.cuda.current_stream(place))
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return min(times[1:])


# torch knows a kernel for the rest of the process, one for all cards; so does a captured graph.
_registered: dict[int, tuple[OnCard, list[torch.library.Library]]] = {}


def kernels_home(settings: Settings) -> Path:
    """Where compiled kernels are kept."""
    return settings.home / "kernels"


def open_card(card: Card, *, kernels: Path, limit_bytes: int | None, announce: Announce) -> CudaGpu:
    """Compile and load kernels, if that was not done before, and make their ops known to torch.

    kernels: the folder of compiled ones.  Raises CompileError and LaunchError as put_on does, and
    UsageError for a second card.
    """
    if card.index not in _registered:
        for other in _registered:
            raise UsageError(
                f"gpu is cuda:{card.index}, but this process computes on cuda:{other} already. Use "
                "another process for another card."
            )
        launch = put_on(card, kernels, announce)
        _registered[card.index] = launch, [ops.define(), ops.implement(launch, "CUDA")]
    return CudaGpu(card, limit_bytes=limit_bytes)
