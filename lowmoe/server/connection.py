"""How this server listens: uvicorn, and connections that must not dawdle over a request's head.

Knows:        what uvicorn leaves unbounded, sockets.
Ignorant of:  what is asked, who may ask.
"""

import asyncio
import sys
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from lowmoe.server.guard import MAX_BODY_BYTES, MAX_HEAD_BYTES

CLOSING_S = 5  # for connections to close, when all answers have ended
HEAD_S = 10.0  # for a whole head to arrive
# Each holds some kilobytes and a descriptor.
MAX_CONNECTIONS = 4096


class BoundedHttp(HttpToolsProtocol):
    """uvicorn's HTTP/1.1, for which a head may be as long and come as slowly as it likes, and what
    is left of a body that was refused may go on for ever.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_head = True
        self._n_bytes = 0  # of a head, or of what is left of a body
        self._got_on = False
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Expect a head."""
        super().connection_made(transport)
        self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        """Expect nothing."""
        self._disarm()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take bytes, unless they are too many for what they are part of."""
        self._got_on = False
        super().data_received(data)
        if self._got_on:
            self._n_bytes = 0  # a head's few bytes beside the end of another; the guard counts all
        elif self._in_head or self.cycle.response_complete:
            self._n_bytes += len(data)
            if self._n_bytes > (MAX_HEAD_BYTES if self._in_head else MAX_BODY_BYTES):
                self._close(b"431 Request Header Fields Too Large")
            self._arm()

    def on_message_begin(self) -> None:
        """A head begins."""
        super().on_message_begin()
        self._arm()

    def on_headers_complete(self) -> None:
        """A head is whole."""
        self._in_head, self._got_on = False, True
        self._disarm()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """A body is whole; what comes now is another head."""
        self._in_head, self._got_on = True, True
        self._disarm()
        if self.cycle.response_complete:
            self._arm()  # uvicorn's own clock stopped when the rest of this body came
        super().on_message_complete()

    def shutdown(self) -> None:
        """Let answers under way end; a request that is not whole, and has none, becomes none."""
        cycle = self.cycle  # of the latest request: with a pipeline, another one is being answered
        if cycle is not None and cycle.more_body and not (cycle.response_started or self.pipeline):
            self.transport.close()
        else:
            super().shutdown()

    def _arm(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(HEAD_S, self._expired)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _expired(self) -> None:
        self._timer = None
        if self.cycle is not None and not self.cycle.response_complete:
            self._arm()  # bytes after a request that is being answered; that goes on
        else:
            self._close(b"408 Request Timeout")

    def _close(self, status: bytes) -> None:
        """Close; a head is answered with this status, what comes after an answer with nothing."""
        if self.transport.is_closing():
            return
        if self._in_head:
            self.transport.write(b"HTTP/1.1 " + status + b"\r\nconnection: close\r\n")
            self.transport.write(b"content-length: 0\r\n\r\n")
        self.transport.close()


def allow_connections() -> None:
    """Let this process hold as many descriptors as MAX_CONNECTIONS need, or as it may: systems
    begin with 1024, and accepting fails beyond them.
    """
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_CONNECTIONS + 1024  # the model's files and the rest
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def configured(app: FastAPI, host: str, port: int) -> uvicorn.Config:
    """uvicorn's configuration for this app.  What a proxy says of a client is not believed,
    logging is left as it is, websockets are not spoken.
    """
    return uvicorn.Config(
        app,
        host=host,
        port=port,
        http=BoundedHttp,
        ws="none",
        proxy_headers=False,
        server_header=False,
        access_log=False,
        log_config=None,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=CLOSING_S,
    )
