"""How this server listens: uvicorn, and connections that must not dawdle over a request's head.

Knows:        what uvicorn leaves unbounded, sockets.
Ignorant of:  what is asked, who may ask.
"""

import asyncio
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from lowmoe.server.guard import MAX_HEAD_BYTES

HEAD_S = 10.0  # for a whole head to arrive
# Each holds some kilobytes and a descriptor.
MAX_CONNECTIONS = 4096


class BoundedHttp(HttpToolsProtocol):
    """uvicorn's HTTP/1.1, for which a head may be as long and come as slowly as it likes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_head, self._n_head_bytes = True, 0
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Expect a head."""
        super().connection_made(transport)
        self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        """Expect nothing."""
        self._disarm()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take bytes, unless they make a head too long."""
        super().data_received(data)
        if not self._in_head:
            return
        # Bytes that came with a head's end are not counted: the guard counts whole heads.
        self._n_head_bytes += len(data)
        if self._n_head_bytes > MAX_HEAD_BYTES:
            self._close(b"431 Request Header Fields Too Large")
        elif self._head_timer is None:
            self._arm()

    def on_headers_complete(self) -> None:
        """A head is whole."""
        self._in_head, self._n_head_bytes = False, 0
        self._disarm()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """A body is whole; what comes now is another head."""
        self._in_head = True
        super().on_message_complete()

    def _arm(self) -> None:
        self._head_timer = self.loop.call_later(HEAD_S, self._expired)

    def _disarm(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _expired(self) -> None:
        self._head_timer = None
        if self.cycle is not None and not self.cycle.response_complete:
            self._arm()  # bytes after a request that is being answered; that goes on
        else:
            self._close(b"408 Request Timeout")

    def _close(self, status: bytes) -> None:
        if not self.transport.is_closing():
            self.transport.write(b"HTTP/1.1 " + status + b"\r\nconnection: close\r\n")
            self.transport.write(b"content-length: 0\r\n\r\n")
            self.transport.close()


def configured(app: FastAPI, host: str, port: int) -> uvicorn.Config:
    """uvicorn's configuration for this app.  What a proxy says of a client is not believed, nothing
    is logged by uvicorn but warnings, websockets are not spoken.
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
        log_level="warning",
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=5,
    )
