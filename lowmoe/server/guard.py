"""Who may ask, and how much at once: stands before every route, so that a new one is guarded too.

Knows:        origins, the key, limits of what is read.
Ignorant of:  what is asked; dialects, but that a refusal is written in one.

A page elsewhere can send requests to a server on loopback, and by DNS rebinding read the answers.
Neither gets past here: the first comes with another Origin, the second with another Host.
"""

import asyncio
import hmac

from pydantic_core import from_json
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lowmoe.server.errors import Dialects, Problem, problem_of
from lowmoe.server.hosts import Hosts

MAX_BODY_BYTES = 8 << 20
MAX_HEAD_BYTES = 32 << 10
# Characters that open an object or a list, in texts too: a million tokens of source code have about
# so many.  Making so many objects takes Python a quarter of a second, in which nobody is answered.
MAX_BRACKETS = 250_000
BODY_S = 60.0  # for a whole body to arrive

# What tells nothing of the model: whether it is there, and the page, which asks for the key.
OPEN_PATHS = frozenset({"/", "/health/live", "/health/ready"})
OPEN_FOLDER = "/page/"

_SECURITY_HEADERS = {
    "content-security-policy": "default-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; object-src 'none'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


class _Refused(Exception):
    def __init__(self, status: int, message: str, **headers: str) -> None:
        told = {name.replace("_", "-"): value for name, value in headers.items()}
        self.problem = Problem(status=status, message=message, headers=told)


class _Gone(Exception):
    pass


class Guard:
    """ASGI middleware: lets through what may ask, whole and within its limits; answers the rest."""

    def __init__(
        self, app: ASGIApp, *, hosts: Hosts, api_key: str | None, dialects: Dialects
    ) -> None:
        self._app, self._hosts, self._dialects = app, hosts, dialects
        self._key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        else:  # a websocket; there are none here
            await send({"type": "websocket.close", "code": 1008})

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def guarded_send(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                for name, value in _SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
                headers.setdefault("cache-control", "no-store")
            await send(message)

        try:
            body = await self._admit(scope, receive)
            await self._app(scope, _replay(body, receive), guarded_send)
        except _Gone:
            pass
        except _Refused as refused:
            response = self._dialects.response(scope["path"], refused.problem)
            await response(scope, receive, guarded_send)
        except Exception as error:
            if started:
                raise
            response = self._dialects.response(scope["path"], problem_of(error))
            await response(scope, receive, guarded_send)

    async def _admit(self, scope: Scope, receive: Receive) -> bytes:
        """The body that the routes are to see.  Raises _Refused, cheapest checks first."""
        headers = Headers(scope=scope)
        n_head = sum(len(name) + len(value) for name, value in headers.raw)
        n_head += len(scope["raw_path"]) + len(scope["query_string"])
        if n_head > MAX_HEAD_BYTES:
            raise _Refused(431, f"The head has {n_head} bytes; {MAX_HEAD_BYTES} are read at most.")
        self._check_host(headers)
        _check_origin(scope, headers)
        self._check_key(scope, headers)
        if scope["method"] != "POST":
            return b""  # whatever comes beside others, no route ever sees it
        _check_media_type(headers)
        body = await _read_all(headers, receive)
        _check_json(body)
        return body

    def _check_host(self, headers: Headers) -> None:
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self._hosts.allow(hosts[0]):
            raise _Refused(
                403,
                "This server goes by other names. If it is that Host, start it with --allow-host.",
            )

    def _check_key(self, scope: Scope, headers: Headers) -> None:
        path = scope["path"]
        is_open = path in OPEN_PATHS or path.startswith(OPEN_FOLDER)
        if self._key is None or (is_open and scope["method"] in ("GET", "HEAD")):
            return
        given = [*headers.getlist("x-api-key")]
        for line in headers.getlist("authorization"):
            scheme, _, credentials = line.partition(" ")
            given += [credentials.strip()] if scheme.lower() == "bearer" else []
        # All of them, each in a time that tells nothing of how much of it is right.
        right = [hmac.compare_digest(one.encode("latin-1"), self._key) for one in given]
        if not any(right):
            raise _Refused(
                401,
                "No key, or not the right one. Send it as Authorization: Bearer or x-api-key.",
                www_authenticate="Bearer",
            )


def _check_origin(scope: Scope, headers: Headers) -> None:
    """Refuse what a page of another origin asked a browser for, unless it is a link to the page."""
    ours = [f"{scheme}://{headers['host']}".lower() for scheme in ("http", "https")]
    for origin in headers.getlist("origin"):
        if origin.lower() not in ours:
            raise _Refused(403, "Pages of other origins may not ask this server.")
    link = headers.get("sec-fetch-mode") == "navigate" and scope["path"] in OPEN_PATHS
    if headers.get("sec-fetch-site") in ("cross-site", "same-site") and not link:
        raise _Refused(403, "Pages of other origins may not ask this server.")


def _check_media_type(headers: Headers) -> None:
    """A form can be sent to anywhere by any page, JSON cannot."""
    media_type, _, _ = headers.get("content-type", "").partition(";")
    if media_type.strip().lower() != "application/json":
        raise _Refused(415, "The body must be JSON, sent as Content-Type: application/json.")
    if "content-encoding" in headers:
        raise _Refused(415, "A body must come as it is, without a Content-Encoding.")


async def _read_all(headers: Headers, receive: Receive) -> bytes:
    """The body.  Counted as it comes: who sends it in chunks need not say how long it is."""
    too_large = _Refused(413, f"The body has more than {MAX_BODY_BYTES} bytes, the most read here.")
    declared = headers.get("content-length", "0")
    if not declared.isdecimal() or int(declared[:20]) > MAX_BODY_BYTES:
        raise too_large
    body = bytearray()

    async def read() -> None:
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _Gone
            body.extend(message.get("body", b""))
            if len(body) > MAX_BODY_BYTES:
                raise too_large
            more = message.get("more_body", False)

    try:
        await asyncio.wait_for(read(), BODY_S)
    except asyncio.TimeoutError:
        raise _Refused(408, f"The body did not arrive within {BODY_S:.0f} seconds.") from None
    return bytes(body)


def _check_json(body: bytes) -> None:
    """Refuse what other parsers read in ways of their own: depths beyond 200, NaN, bytes that are
    no UTF-8, halves of surrogate pairs; and what is made of millions of parts.
    """
    if body.count(b"[") + body.count(b"{") > MAX_BRACKETS:
        raise _Refused(413, f"The body has more than {MAX_BRACKETS} brackets, the most read here.")
    try:
        from_json(body, allow_inf_nan=False, cache_strings="none")
    except ValueError as error:
        raise _Refused(400, f"The body is not JSON: {error}.") from None


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body in one piece, then what comes after it."""
    first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return first.pop() if first else await receive()

    return replayed
