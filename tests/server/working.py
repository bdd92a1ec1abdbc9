"""A worker over a small model, what it is asked, and what comes of that.

Knows:        how it is begun, held between steps, and ended.
Ignorant of:  what a test looks for.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest

import lowmoe
from lowmoe.engine.batch import Batch
from lowmoe.server.asked import AskedEvents
from lowmoe.server.asking import (
    Ask,
    Ended,
    Event,
    Sampling,
    Text,
)
from lowmoe.server.worker import Worker
from tests.engine.test_batch import prompt

T = TypeVar("T")
GREEDY = Sampling(temperature=0.0, max_new_tokens=12)


class Held:
    """A worker whose thread stops before every step until it is told how many to take."""

    def __init__(self, worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
        self.worker, self._steps = worker, threading.Semaphore(0)
        self._taken = threading.Semaphore(0)
        step = Batch.step

        def held(batch: Batch) -> Any:
            self._steps.acquire()
            try:
                return step(batch)
            finally:
                self._taken.release()

        monkeypatch.setattr(Batch, "step", held)

    async def take(self, n_steps: int) -> None:
        """So many steps; returns when the last has been told of."""
        for _ in range(n_steps):
            self._steps.release()
            await asyncio.to_thread(self._taken.acquire)

    def let_go(self) -> None:
        """From now on it does not stop."""
        for _ in range(10_000):
            self._steps.release()


@asynccontextmanager
async def working(
    folder: Path, *, sequences: int = 4, n_waiting: int = 64, chunk: int | None = None
) -> AsyncIterator[Worker]:
    model = lowmoe.load(folder, sequences=sequences, threads=1)
    worker = Worker(model, name="tiny", n_waiting=n_waiting)
    if chunk is not None:
        worker._batch.chunk_tokens = chunk
    try:
        yield worker
    finally:
        await asyncio.wait_for(worker.close(), 30)


def ids_of(seed: int, n_tokens: int) -> tuple[int, ...]:
    return tuple(prompt(seed, n_tokens))


def to(seed: int, n_tokens: int = 9, **fields: Any) -> Ask:
    return Ask(prompt=ids_of(seed, n_tokens), **{"sampling": GREEDY, **fields})


async def all_of(events: AskedEvents) -> list[Event]:
    return [event async for event in events]


async def answer(worker: Worker, ask: Ask) -> list[Event]:
    return await all_of(worker.ask(ask))


def text_of(events: list[Event], which: int = 0) -> str:
    return "".join(e.text for e in events if isinstance(e, Text) and e.answer == which)


def end_of(events: list[Event], which: int = 0) -> Ended:
    (end,) = [e for e in events if isinstance(e, Ended) and e.answer == which]
    return end


def run(test: Callable[[], Awaitable[T]]) -> T:
    async def limited() -> T:
        return await asyncio.wait_for(test(), 30)

    return asyncio.run(limited())
