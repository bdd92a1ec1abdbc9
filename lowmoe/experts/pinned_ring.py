"""From RAM to a GPU: through a few small buffers that copies beside the GPU's work read from.

All of a model's RAM cannot be pinned; a little of it can, and is written while the copy before
is still under way. It is so little that it stays in the last-level cache: then RAM is read once for
what is sent, as if the GPU read it there itself.

Knows:        whose turn a buffer is, when it may be written again; what is done in the background.
Ignorant of:  what is copied, where to, why.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from lowmoe.kernels.gpu import Event, Gpu

N_BUFFERS = 3  # one to write, one to copy from, one for whoever is late
# Of a buffer: PCIe 4 x16 takes it in 0.3 ms, many times what it costs to begin its copy. A power of
# two, as every buffer is: torch pins no other sizes.
PIECE_BYTES = 8 * 2**20
# One thread copies within RAM slower than PCIe 4 x16 takes it on.
N_COPIERS = 4
COPIED_AT_ONCE = 2**20  # bytes at least that a thread is worth


@dataclass(frozen=True, slots=True)
class Span:
    """Of copies: events before the first and after the last."""

    begin: Event
    end: Event


class Sending:
    """Copies begun in the background."""

    def __init__(self, span: "Future[Span]") -> None:
        self._span = span

    def event(self) -> Event:
        """After the copies.  Waits until what they come from is no longer read.

        Raises what sending raised.
        """
        return self._span.result().end

    def join(self) -> None:
        """The same, whatever was raised."""
        self._span.exception()

    @property
    def has_failed(self) -> bool:
        """Whether sending has raised something."""
        return self._span.done() and self._span.exception() is not None

    def seconds(self) -> float | None:
        """That the copies took, None as long as they go on or if they failed."""
        if not self._span.done() or self.has_failed:
            return None
        span = self._span.result()
        return span.end.seconds_since(span.begin)


class PinnedRing:
    """copies: beside the GPU's work, in which all that is sent goes.

    What is sent is sent by one thread at a time: the one that `begin` has, or before there was
    anything to begin, any.
    """

    def __init__(self, gpu: Gpu, buffer_bytes: int) -> None:
        """buffer_bytes: the most that is sent at once."""
        self.copies = gpu.copies()
        self._buffers = [gpu.staging(_size(buffer_bytes)) for _ in range(N_BUFFERS)]
        self._in_use: list[Event | None] = [None] * N_BUFFERS
        self._next = 0
        self._copiers = ThreadPoolExecutor(N_COPIERS, thread_name_prefix="lowmoe-copy")
        self._sender = ThreadPoolExecutor(1, thread_name_prefix="lowmoe-send")

    @staticmethod
    def needed_bytes(buffer_bytes: int) -> int:
        """RAM that it takes."""
        return N_BUFFERS * _size(buffer_bytes)

    def begin(self, send: Callable[[], object], after: Event | None) -> Sending:
        """Do what sends, and asks for other `copies`, in the background, in the order of calls.

        after: whatever of the GPU's work the copies must come after.
        """
        return Sending(self._sender.submit(self._span_of, send, after))

    def send(self, targets: Iterable[Tensor], sources: Iterable[Tensor]) -> Event:
        """Copy from RAM to the GPU, uint8 tensors of which a target takes the first bytes.

        The sources may change when this returns.  Returns an event after the copies.
        """
        for target, source in zip(targets, sources, strict=True):
            pieces = source[: target.shape[0]].split(PIECE_BYTES)
            for to, of in zip(target.split(PIECE_BYTES), pieces, strict=True):
                self._send_piece(to, of)
        return self.copies.event()

    def close(self) -> None:
        """Give the threads back, and buffers when nothing is copied from them."""
        self._sender.shutdown()
        for event in self._in_use:
            if event is not None:
                event.wait()
        self._copiers.shutdown()

    def _span_of(self, send: Callable[[], object], after: Event | None) -> Span:
        # What a thread may do to tensors made in inference mode, it must be in inference mode for.
        with torch.inference_mode():
            if after is not None:
                self.copies.wait_for(after)
            begin = self.copies.event()
            send()
            return Span(begin, self.copies.event())

    def _send_piece(self, target: Tensor, source: Tensor) -> None:
        which, self._next = self._next, (self._next + 1) % N_BUFFERS
        last = self._in_use[which]
        if last is not None:
            last.wait()
        piece = self._buffers[which][: target.shape[0]]
        self._write(piece, source)
        self.copies.copy(target, piece)
        self._in_use[which] = self.copies.event()

    def _write(self, target: Tensor, source: Tensor) -> None:
        n_bytes = target.shape[0]
        step = max(COPIED_AT_ONCE, -(-n_bytes // N_COPIERS))
        if n_bytes <= step:
            target.copy_(source)
            return
        pairs = zip(target.split(step), source.split(step), strict=True)
        copied = [self._copiers.submit(_copy, *pair) for pair in pairs]
        for copy in copied:
            copy.result()


def _size(buffer_bytes: int) -> int:
    """Of each buffer, in bytes."""
    power = 1 << (buffer_bytes - 1).bit_length()  # no less than buffer_bytes
    return min(power, PIECE_BYTES)


def _copy(target: Tensor, source: Tensor) -> None:
    with torch.inference_mode():
        target.copy_(source)
