"""A face over a real socket: the app on uvicorn in a thread, at a free port of loopback.

Knows:        how it is begun and ended.
Ignorant of:  faces, clients.
"""

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator

import uvicorn

from lowmoe.server.app import ServerOptions, create_app
from lowmoe.server.asking import Service
from lowmoe.server.connection import configured
from lowmoe.server.numbers import Numbers
from lowmoe.server.watching import Watch


@contextlib.contextmanager
def serving(
    service: Service,
    options: ServerOptions | None = None,
    *,
    numbers: Callable[[], Numbers] | None = None,
    watch: Watch | None = None,
) -> Iterator[str]:
    """The address, "http://127.0.0.1:PORT", for as long as it answers."""
    app = create_app(service, options or ServerOptions(), numbers=numbers, watch=watch)
    server = uvicorn.Server(configured(app, "127.0.0.1", 0))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            # The socket listens already: who connects now waits for the server, not in vain.
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
