"""A connection between a client and a server that a test can cut and mend.

Knows:        bytes, in both directions.
Ignorant of:  what they say.
"""

import asyncio
import contextlib
import threading
from collections.abc import Coroutine, Iterator
from typing import Any


class Line:
    """Listens at a port of loopback for who is to be connected with another."""

    def __init__(self, loop: asyncio.AbstractEventLoop, to_port: int) -> None:
        self._loop, self._to_port = loop, to_port
        self._server: asyncio.Server | None = None
        self._writers: list[asyncio.StreamWriter] = []
        self._copying: list[asyncio.Future[None]] = []
        self.port = 0
        self.mend()

    def cut(self) -> None:
        """Break every connection; nobody gets through any more."""
        self._run(self._cut())

    def mend(self) -> None:
        """Connect again, at the same port."""
        self._run(self._mend())

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _mend(self) -> None:
        self._server = await asyncio.start_server(self._connect, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _cut(self) -> None:
        assert self._server is not None
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()
        await asyncio.gather(*self._copying, return_exceptions=True)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there_reader, there = await asyncio.open_connection("127.0.0.1", self._to_port)
        self._writers += [writer, there]
        both = [_copy(reader, there), _copy(there_reader, writer)]
        self._copying += [asyncio.ensure_future(copy) for copy in both]


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


@contextlib.contextmanager
def line_to(port: int) -> Iterator[Line]:
    """One that is cut at the end."""
    loop, end = asyncio.new_event_loop(), asyncio.Event()

    def run() -> None:
        with contextlib.closing(loop):
            loop.run_until_complete(end.wait())

    thread = threading.Thread(target=run)
    thread.start()
    try:
        line = Line(loop, port)
        yield line
        line.cut()
    finally:
        loop.call_soon_threadsafe(end.set)
        thread.join()
