"""Several asks that one request makes, as one.

Knows:        how their answers are numbered together.
Ignorant of:  what was asked, dialects.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace

from lowmoe.server.asking import Ask, Event, Events, Failed, Reading, Service


class Joined:
    """Events of several asks as they come.  Answer j of ask i is told as answer i * n + j."""

    def __init__(self, several: Sequence[Events], n: int) -> None:
        self._several, self._n = several, n
        self._events = self._join()

    def __aiter__(self) -> "Joined":
        return self

    async def __anext__(self) -> Event:
        return await anext(self._events)

    async def aclose(self) -> None:
        """Cancel all of them."""
        await self._events.aclose()
        for events in self._several:
            await events.aclose()

    async def _join(self) -> AsyncGenerator[Event, None]:
        waiting = {asyncio.ensure_future(_next(one)): i for i, one in enumerate(self._several)}
        try:
            while waiting:
                done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    index = waiting.pop(task)
                    event = task.result()
                    if event is not None:
                        waiting[asyncio.ensure_future(_next(self._several[index]))] = index
                        yield _renumbered(event, index * self._n)
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)


async def ask_all(service: Service, asks: Sequence[Ask]) -> Events:
    """Ask all of them, each for as many answers as the first; none is left if one is refused."""
    several: list[Events] = []
    try:
        for ask in asks:
            several.append(service.ask(ask))
    except BaseException:
        for events in several:
            await events.aclose()
        raise
    return several[0] if len(several) == 1 else Joined(several, asks[0].n)


async def _next(events: Events) -> Event | None:
    """None at the end: a task cannot end by StopAsyncIteration's being raised in who awaits it."""
    return await anext(events, None)


def _renumbered(event: Event, first: int) -> Event:
    if isinstance(event, (Reading, Failed)):
        return event
    return replace(event, answer=first + event.answer)
