"""From RAM to a GPU: through a few buffers that copies beside the GPU's work read from.

All of a model's RAM cannot be pinned; a little of it can, and is written while the copy before
is still under way.

Knows:        whose turn a buffer is, when it may be written again.
Ignorant of:  what is copied, where to, why.
"""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from lowmoe.kernels.gpu import Event, Gpu

N_BUFFERS = 2  # one to write, one to copy from
# One thread copies within RAM slower than PCIe 4 x16 takes it on.
N_COPIERS = 4
COPIED_AT_ONCE = 2**20  # bytes at least that a thread is worth


class PinnedRing:
    """copies: beside the GPU's work, in which all that is sent goes; n_sent_bytes: so far."""

    def __init__(self, gpu: Gpu, buffer_bytes: int) -> None:
        """buffer_bytes: the most that is sent at once."""
        self.copies = gpu.copies()
        self._buffers = [gpu.staging(buffer_bytes) for _ in range(N_BUFFERS)]
        self._in_use: list[Event | None] = [None] * N_BUFFERS
        self._next = self.n_sent_bytes = 0
        self._copiers = ThreadPoolExecutor(N_COPIERS, thread_name_prefix="lowmoe-copy")

    @staticmethod
    def needed_bytes(buffer_bytes: int) -> int:
        """RAM that it takes."""
        return N_BUFFERS * buffer_bytes

    def send(self, targets: Iterable[Tensor], sources: Iterable[Tensor]) -> Event:
        """Copy from RAM to the GPU, uint8 tensors of which a target takes the first bytes.

        The sources may change when this returns, which is not before there is a buffer for them.
        Returns an event after the copies.
        """
        which, self._next = self._next, (self._next + 1) % N_BUFFERS
        last = self._in_use[which]
        if last is not None:
            last.wait()
        rest = self._buffers[which]
        for target, source in zip(targets, sources, strict=True):
            part, rest = rest[: target.shape[0]], rest[target.shape[0] :]
            self._write(part, source[: target.shape[0]])
            self.copies.copy(target, part)
            self.n_sent_bytes += target.nbytes
        event = self._in_use[which] = self.copies.event()
        return event

    def close(self) -> None:
        """Give the threads back, and buffers when nothing is copied from them."""
        for event in self._in_use:
            if event is not None:
                event.wait()
        self._copiers.shutdown()

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


def _copy(target: Tensor, source: Tensor) -> None:
    # What a thread may do to tensors made in inference mode, it must be in inference mode for.
    with torch.inference_mode():
        target.copy_(source)
