"""Runs the server until it is told to stop, and lets it end well.

Knows:        sockets, signals, in which order things end.
Ignorant of:  requests, models.
"""

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn

from lowmoe.errors import UsageError
from lowmoe.server.app import ServerOptions, create_app
from lowmoe.server.connection import allow_connections, configured
from lowmoe.server.request_log import RequestLog
from lowmoe.server.watching import Watching
from lowmoe.server.worker import Worker

GRACE_S = 10.0  # for answers under way when the server is told to stop


def bound_socket(host: str, port: int) -> socket.socket:
    """One that is this server's, and takes no connections yet.

    Raises UsageError for an address that is not this machine's, or is taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        raise UsageError(
            f"--host is {host!r}, which is no address here ({error}). Give 127.0.0.1, or one of "
            "this machine's."
        ) from error
    bound = socket.socket(family, kind, protocol)
    try:
        # Else the port stays taken for a minute after a server that has ended.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise UsageError(
            f"port {port} of {host} cannot be listened on ({error.strerror}). Give another --port, "
            "or stop what listens there."
        ) from error
    return bound


def serve(
    worker: Worker,
    watching: Watching,
    options: ServerOptions,
    bound: socket.socket,
    *,
    announce: Callable[[], None],
) -> None:
    """Answer until SIGINT or SIGTERM, then let answers under way end; a second signal cancels them.

    bound: to listen on; announce: called once it does.  The worker's model is closed at the end.
    """
    allow_connections()
    app = create_app(worker, options, numbers=worker.numbers, watch=watching)
    app.add_middleware(RequestLog)
    server = _Server(configured(app, options.host, options.port), worker, watching, announce)
    asyncio.run(server.serve([bound]))


class _Server(uvicorn.Server):
    def __init__(
        self,
        config: uvicorn.Config,
        worker: Worker,
        watching: Watching,
        announce: Callable[[], None],
    ) -> None:
        super().__init__(config)
        self._worker, self._watching, self._announce = worker, watching, announce

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn raises them once more when it has ended, which would end us by a signal."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._told_to_stop)
        try:
            yield
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so."""
        await super().startup(sockets)
        self._announce()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Answers first: connections that stream end with them."""
        await self._worker.close(GRACE_S)
        self._watching.close()
        await super().shutdown(sockets)

    def _told_to_stop(self) -> None:
        if self.should_exit:
            self._worker.cancel_all()
        self.should_exit = True
