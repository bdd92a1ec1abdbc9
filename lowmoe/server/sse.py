"""Streams of server-sent events, and answers that end when their client is gone.

Knows:        how a frame is written, how long a client waits in silence, how one sees that it is
              gone.
Ignorant of:  what a frame says, dialects, models.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from lowmoe.server.asking import Event, Events
from lowmoe.server.errors import Problem, problem_of

# Proxies and clients cut a silent stream at 30 to 600 s, some at less.
PING_S = 5.0
# How long an answer may be refused with a status of its own, before headers say 200.
REFUSE_S = 0.25
# A client that takes nothing for so long is gone; its answer would fill memory.
STUCK_S = 60.0

# For a route's description, that it may answer so.
STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}

T = TypeVar("T")


def frame(data: Mapping[str, Any], *, event: str | None = None) -> str:
    """One frame of a stream.  event: its name."""
    # All but ASCII is escaped: some clients take other line ends than \n for the end of a frame's
    # line, and half of a surrogate pair has no bytes.
    named = "" if event is None else f"event: {event}\n"
    return f"{named}data: {json.dumps(data, separators=(',', ':'))}\n\n"


class ClientGone(Exception):
    """Nobody waits for this answer any more."""


def respond(
    frames: AsyncGenerator[str, None],
    *,
    failed: Callable[[Problem], str],
    ping: str = ": ping\n\n",
) -> Response:
    """Stream frames, each a whole one ("event: x\\ndata: {...}\\n\\n"), as they come.

    What `frames` raises before its first frame, and within REFUSE_S, is answered with a status
    of its own as if nothing was streamed; what it raises later becomes the frame that `failed`
    writes, and ends the stream.  So a face lets errors pass, raises a Failed's error, asks within
    `frames` (which may be closed before it began) and makes its first frame after its first event.

    Headers go out with the first frame or after REFUSE_S, then `ping` whenever PING_S passed
    without a frame.  `frames` is closed when the client goes away, or takes nothing for STUCK_S.
    """
    return _Stream(frames, failed, ping)


async def collect(request: Request, events: Events) -> list[Event]:
    """All events, for an answer in one piece.  Raises ClientGone, the events closed, once nobody
    waits for it.
    """

    async def to_the_end() -> list[Event]:
        return [event async for event in events]

    async with aclosing(events):
        return await _unless(_gone(request.receive), work=to_the_end())


async def _gone(receive: Receive) -> None:
    """Return once the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _unless(*ends: Coroutine[Any, Any, None], work: Coroutine[Any, Any, T]) -> T:
    """The work's result.  Raises ClientGone, the work cancelled, if one of the ends comes first."""
    # Plain tasks: a cancelled scope of anyio's would also cancel what a generator does to clean up.
    task = asyncio.ensure_future(work)
    tasks = [task, *(asyncio.ensure_future(end) for end in ends)]
    try:
        await asyncio.sleep(0)  # the work begins, so that it can end what it was given
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for one in tasks:
            one.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _Stream(StreamingResponse):
    def __init__(
        self, frames: AsyncGenerator[str, None], failed: Callable[[Problem], str], ping: str
    ) -> None:
        # The last two keep proxies from holding frames back.
        headers = {"cache-control": "no-cache, no-transform", "x-accel-buffering": "no"}
        super().__init__(frames, headers=headers, media_type="text/event-stream")
        self._frames, self._failed, self._ping = frames, failed, ping
        self._writing = asyncio.Lock()  # frames and pings come from two tasks
        self._started = False
        self._wrote_at = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(ClientGone):
            await _unless(_gone(receive), self._break_silence(send), work=self._write_all(send))

    async def _write_all(self, send: Send) -> None:
        async with aclosing(self._frames) as frames:
            try:
                async for frame in frames:
                    await self._write(send, frame)
            except Exception as error:
                if not self._started:
                    raise
                await self._write(send, self._failed(problem_of(error)))
        await self._write(send, "", more=False)

    async def _break_silence(self, send: Send) -> None:
        """Write pings; return once the client takes nothing any more."""
        clock = asyncio.get_running_loop().time
        await asyncio.sleep(REFUSE_S)
        while True:
            silent_s = clock() - self._wrote_at
            if not self._started or silent_s >= PING_S:
                try:
                    await asyncio.wait_for(self._write(send, self._ping), STUCK_S)
                except asyncio.TimeoutError:
                    return
                silent_s = 0.0
            await asyncio.sleep(PING_S - silent_s)

    async def _write(self, send: Send, frame: str, *, more: bool = True) -> None:
        async with self._writing:
            if not self._started:
                self._started = True
                await send(
                    {
                        "type": "http.response.start",
                        "status": self.status_code,
                        "headers": self.raw_headers,
                    }
                )
            await send({"type": "http.response.body", "body": frame.encode(), "more_body": more})
            self._wrote_at = asyncio.get_running_loop().time()
