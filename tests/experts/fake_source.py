"""Experts made of nothing, whose reading a test can watch, hold up and break."""

import threading
from collections import Counter
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor

from lowmoe.experts.policy import Key

PATIENCE_S = 20  # far more than anything here takes, far less than a person waits

Result = TypeVar("Result")


def within_patience(work: Callable[[], Result]) -> Result:
    """What `work` returns or raises, unless it hangs."""
    done: list[Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            done.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    assert not thread.is_alive(), f"still waiting after {PATIENCE_S} s"
    if errors:
        raise errors[0]
    return done[0]


class FakeExperts:
    """An ExpertSource.  Its bytes follow from layer and expert, no two experts' are the same."""

    def __init__(self, buffer_bytes: tuple[int, ...] = (96, 32)) -> None:
        self.buffer_bytes = buffer_bytes
        self.reads: Counter[Key] = Counter()
        self.memory: set[int] = set()  # addresses of all buffers ever seen
        self.violations: list[str] = []
        self.broken: set[Key] = set()
        self._protected: Counter[int] = Counter()
        self._gates: dict[Key, threading.Event] = {}
        self._begun: dict[Key, threading.Event] = {}

    # --- what a test says

    def hold(self, keys: Iterable[Key]) -> None:
        """Reads of these experts begin, and go on only when released."""
        for key in keys:
            if key not in self._gates:
                self._gates[key], self._begun[key] = threading.Event(), threading.Event()

    def release(self, *keys: Key) -> None:
        """Let the reads of these experts end; of all that are held, if none is named."""
        for key in keys or list(self._gates):
            self._gates.pop(key).set()

    def await_begin(self, key: Key) -> None:
        """Wait until the read of an expert that is held has begun."""
        assert self._begun[key].wait(PATIENCE_S)

    def protect(self, buffers: Iterable[Tensor]) -> None:
        """From now on it is a violation to read into these."""
        self._protected.update(b.data_ptr() for b in buffers)

    def unprotect(self, buffers: Iterable[Tensor]) -> None:
        """The opposite."""
        self._protected.subtract(b.data_ptr() for b in buffers)

    def content(self, key: Key) -> tuple[Tensor, ...]:
        """What an expert's buffers must hold."""
        generator = torch.Generator().manual_seed(1000 * key[0] + key[1])
        return tuple(
            torch.randint(256, (n,), generator=generator, dtype=torch.uint8)
            for n in self.buffer_bytes
        )

    # --- what the store does

    def read(self, layer_id: int, expert_id: int, buffers: list[Tensor]) -> int:
        """Fill the buffers, after a while if the expert is held, or not at all if it is broken."""
        key = (layer_id, expert_id)
        self.reads[key] += 1
        self.memory.update(b.data_ptr() for b in buffers)
        self._scribble(key, buffers)
        gate = self._gates.get(key)
        if gate is not None:
            self._begun[key].set()
            if not gate.wait(PATIENCE_S):
                self.violations.append(f"nobody released {key}")
        self._scribble(key, buffers)
        if key in self.broken:
            raise OSError(f"cannot read {key}")
        for buffer, content in zip(buffers, self.content(key), strict=True):
            buffer.copy_(content)
        return sum(self.buffer_bytes)

    def _scribble(self, key: Key, buffers: list[Tensor]) -> None:
        """Half-read experts are garbage, and whoever borrows one shall notice."""
        for buffer in buffers:
            if self._protected[buffer.data_ptr()] > 0:
                self.violations.append(f"{key} is read into a buffer that is lent")
            buffer.fill_(0xEE)
