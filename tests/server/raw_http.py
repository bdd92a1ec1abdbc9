"""Bytes to a server and back, for requests that no client of others would send.

Knows:        sockets.
Ignorant of:  HTTP, what is sent.
"""

import socket
from collections.abc import Iterable
from urllib.parse import urlsplit


def connected(url: str) -> socket.socket:
    """A connection to the server at this address."""
    place = urlsplit(url)
    assert place.hostname is not None
    return socket.create_connection((place.hostname, place.port or 80), timeout=10)


def status(url: str, *sent: bytes) -> int:
    """The status of what comes back.  Raises TimeoutError after 10 s of silence."""
    with connected(url) as connection:
        for part in sent:
            connection.sendall(part)
        return int(connection.recv(65536).split(b" ", 2)[1])


def until_closed(connection: socket.socket) -> bytes:
    """All that comes until the server closes.  Raises TimeoutError after 10 s of silence."""
    return b"".join(iter(lambda: connection.recv(65536), b""))


def head(method: str, path: str, headers: Iterable[str] = ()) -> bytes:
    """A request's head, for loopback."""
    lines = [f"{method} {path} HTTP/1.1", "host: localhost", *headers, "", ""]
    return "\r\n".join(lines).encode("latin-1")
