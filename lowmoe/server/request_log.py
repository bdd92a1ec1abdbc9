"""One line a request: who asked for what, how it ended, never a word of what was said.

Knows:        requests, their status and time, what was noted of them on the way.
Ignorant of:  what is answered, where the log is shown.
"""

import logging
import time
from contextvars import ContextVar

from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_PATH = 200  # characters that are written down

log = logging.getLogger("lowmoe.requests")

# Of the request that this task, or the one that began it, belongs to.
_notes: ContextVar[list[str] | None] = ContextVar("notes", default=None)


def note(words: str) -> None:
    """Say something in the request's line, if there is a request."""
    notes = _notes.get()
    if notes is not None:
        notes.append(words)


class RequestLog:
    """ASGI middleware around all others."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status: list[int] = []

        async def noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                status.append(message["status"])
            await send(message)

        notes: list[str] = []
        before, began = _notes.set(notes), time.monotonic()
        try:
            await self._app(scope, receive, noting)
        finally:
            _notes.reset(before)
            # As it came, percent-encoded: no line can be forged with it.
            path = scope["raw_path"].decode("latin-1")[:MAX_PATH]
            client = scope["client"][0] if scope["client"] else "-"
            log.info(
                "%s %s %s %s in %.1f s%s",
                client,
                scope["method"],
                path,
                status[0] if status else "-",
                time.monotonic() - began,
                "".join(f"; {words}" for words in notes),
            )
