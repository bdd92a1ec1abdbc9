"""Events on their way from the model's thread to the event loop, to one client.

Knows:        threads and the loop, what of unread events can be put together, how much may wait.
Ignorant of:  how events come about, what becomes of them.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from lowmoe.server.asking import (
    CallArguments,
    CallBegan,
    ChosenToken,
    Ended,
    Event,
    Failed,
    Reading,
    Text,
)

# What comes sooner after the last delivery waits until then, and goes with what comes meanwhile,
# unless it is the end. At thousands of tokens/s, waking the loop for each would cost more than
# making it (benchmarks/server_overhead.py); fewer than 50 a second are delivered one by one.
LEAST_INTERVAL_S = 0.02
# Characters, and a hundred for each chance of a token, that may wait for a client that does not
# read: a book, some thousand times what comes between two reads of one that does.
MOST_WAITING = 4 * 2**20
CHANCE_WEIGHT = 100


@dataclass(slots=True)
class _Growing:
    """A text, or the arguments of a call, that more may be added to until it is taken."""

    first: Text | CallArguments
    pieces: list[str]
    tokens: list[ChosenToken] = field(default_factory=list)

    def takes(self, event: Text | CallArguments) -> bool:
        """Whether it goes on with this."""
        if isinstance(self.first, Text) and isinstance(event, Text):
            return self.first.kind == event.kind
        if isinstance(self.first, CallArguments) and isinstance(event, CallArguments):
            return self.first.call == event.call
        return False

    def grown(self) -> Event:
        """All of it."""
        whole = "".join(self.pieces)
        if isinstance(self.first, Text):
            return Text(self.first.answer, self.first.kind, whole, tuple(self.tokens))
        return CallArguments(self.first.answer, self.first.call, whole)


class Outbox:
    """`put` by the model's thread, `take` on the event loop, which it must be made on."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._arrived = asyncio.Event()
        self._lock = threading.Lock()
        self._waiting: list[Event | _Growing] = []
        self._latest: dict[int, _Growing] = {}  # of each answer, what may grow
        self._weight = 0
        self._told = False  # the loop knows that something waits
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False
        self._taken_at = float("-inf")

    def put(self, event: Event) -> bool:
        """False if it was not: the client is gone, or reads so little that too much waits."""
        with self._lock:
            if self._closed or self._weight > MOST_WAITING:
                return False
            self._add(event)
            is_last = isinstance(event, (Ended, Failed))
            is_heard = self._told and not is_last
            self._told = True
        if not is_heard:
            self._tell(is_last)
        return True

    def put_last(self, event: Event) -> None:
        """However much waits."""
        with self._lock:
            self._weight = 0
        self.put(event)

    async def take(self) -> deque[Event]:
        """All that came since, as soon as anything did."""
        await self._arrived.wait()
        self._arrived.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        with self._lock:
            waiting, self._waiting = self._waiting, []
            self._latest.clear()
            self._weight, self._told = 0, False
        if any(isinstance(event, _Growing) for event in waiting):  # a first text never waits
            self._taken_at = time.monotonic()
        return deque(e.grown() if isinstance(e, _Growing) else e for e in waiting)

    def close(self) -> None:
        """Nobody takes any more."""
        with self._lock:
            self._closed = True
            self._waiting, self._weight = [], 0
            self._latest.clear()

    def _add(self, event: Event) -> None:
        if isinstance(event, Text):
            self._weight += len(event.text)
            for token in event.tokens:
                self._weight += CHANCE_WEIGHT * (1 + len(token.others))
            self._grow(event, event.text, event.tokens)
        elif isinstance(event, CallArguments):
            self._weight += len(event.json)
            self._grow(event, event.json, ())
        else:
            if isinstance(event, CallBegan | Ended):
                self._latest.pop(event.answer, None)  # what comes after is not added to it
            if isinstance(event, Reading):  # of which only the latest counts
                self._waiting = [e for e in self._waiting if not isinstance(e, Reading)]
            self._waiting.append(event)

    def _grow(self, event: Text | CallArguments, text: str, tokens: Sequence[ChosenToken]) -> None:
        growing = self._latest.get(event.answer)
        if growing is not None and growing.takes(event):
            growing.pieces.append(text)
            growing.tokens += tokens
            return
        growing = self._latest[event.answer] = _Growing(event, [text], list(tokens))
        self._waiting.append(growing)

    def _tell(self, is_last: bool) -> None:
        try:
            self._loop.call_soon_threadsafe(self._hear, is_last)
        except RuntimeError:  # the loop is closed, and everybody gone with it
            self.close()

    def _hear(self, is_last: bool) -> None:
        """On the event loop: something waits, or did until it was taken."""
        if not self._told:
            return
        wait_s = self._taken_at + LEAST_INTERVAL_S - time.monotonic()
        if is_last or wait_s <= 0:
            self._arrived.set()
        elif self._timer is None:
            self._timer = self._loop.call_later(wait_s, self._arrived.set)
