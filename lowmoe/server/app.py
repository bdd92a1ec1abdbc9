"""The server as one ASGI application: every face, behind one guard.

Knows:        which faces there are, whose paths are whose.
Ignorant of:  what a face says, how a model answers, sockets.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from lowmoe.server import health, metrics, page_routes
from lowmoe.server.anthropic import routes as anthropic
from lowmoe.server.anthropic.errors import error_body as anthropic_error
from lowmoe.server.asking import Service
from lowmoe.server.errors import Dialect, Dialects
from lowmoe.server.guard import Guard
from lowmoe.server.hosts import Hosts, check_exposure
from lowmoe.server.metrics import Measured
from lowmoe.server.numbers import Numbers
from lowmoe.server.openai import routes as openai
from lowmoe.server.openai.errors import error_body as openai_error
from lowmoe.server.sse import ClientGone
from lowmoe.server.watching import Watch

# Whose paths begin so is told of errors in this dialect; the longest that fits.
DIALECTS: dict[str, Dialect] = {"/v1": openai_error, "/v1/messages": anthropic_error}

# Of every route; what is said of errors here keeps FastAPI from promising others.
_REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {
        "description": told,
        "content": {"application/json": {"schema": {"type": "object", "required": ["error"]}}},
    }
    for status, told in {
        "4XX": "Not asked as it should be, or by somebody who may not; which, in words.",
        "500": "The server's fault; where its log says why.",
        "501": "Nothing this server does.",
        "503": "Too many ask; when to ask again.",
    }.items()
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """Where to listen, and who may ask.

    allow_hosts: names, besides loopback's and `host`, by which clients may call this server.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    api_key: str | None = None
    allow_hosts: tuple[str, ...] = ()


def create_app(
    service: Service,
    options: ServerOptions,
    *,
    numbers: Callable[[], Numbers] | None = None,
    watch: Watch | None = None,
) -> FastAPI:
    """The application.  Pages that describe it would fetch scripts from elsewhere: there are none,
    the description itself is at /openapi.json.

    numbers: of who answers, for /metrics and /health/ready; called on the event loop.  watch: what
    the page at / shows of the machine; None for no page.

    Raises UsageError for a key that cannot be sent, and for none where other machines may ask.
    """
    hosts, dialects = Hosts(options.host, options.allow_hosts), Dialects(DIALECTS)
    check_exposure(hosts, options.api_key)
    app = FastAPI(title="lowmoe", version="1", docs_url=None, redoc_url=None, responses=_REFUSALS)
    measured = Measured(service, numbers)
    app.include_router(openai.routes(measured))
    app.include_router(anthropic.routes(measured))
    app.include_router(health.routes(service, numbers))
    app.include_router(metrics.routes(measured))
    if watch is not None:
        app.include_router(page_routes.routes(watch))
    dialects.install(app)
    app.add_exception_handler(ClientGone, _nobody_there)
    app.add_middleware(Guard, hosts=hosts, api_key=options.api_key, dialects=dialects)
    return app


async def _nobody_there(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nginx's number for a request whose client went away
