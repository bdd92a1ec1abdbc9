"""What a client is told when there is no answer: one Problem, which each dialect writes its way.

Knows:        which error is whose fault, status codes, what must not be told to a client.
Ignorant of:  field names of any API, how an answer is made.
"""

import dataclasses
import logging
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from lowmoe.errors import ContextError, LowMoeError, TextError, UsageError
from lowmoe.server.asking import Overloaded

RETRY_AFTER_S = 2  # an answer's usual length, so that who comes back finds a place
MAX_FIELD = 100  # characters of a field's name that are repeated

log = logging.getLogger("lowmoe.server")


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Why there is no answer.  status: HTTP's, by which a dialect names its type of error;
    field: of the request, with dots, that is at fault; id: by which the log knows it; too_long:
    the prompt is, so that clients who hear of it shorten it and ask again.
    """

    status: int
    message: str
    field: str | None = None
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    id: str | None = None
    too_long: bool = False


class FieldError(UsageError):
    """A field of a request that contradicts another, or names what is not here.

    field: with dots; status: HTTP's.
    """

    def __init__(self, field: str, message: str, *, status: int = 400) -> None:
        super().__init__(f"{field}: {message}")
        self.field, self.status = field, status


Dialect: TypeAlias = Callable[[Problem], Mapping[str, Any]]  # to the body of an answer, JSON


def plain(problem: Problem) -> Mapping[str, Any]:
    """The dialect of paths that belong to no API of others."""
    return {"error": {"message": problem.message}}


def status_of(error: LowMoeError) -> int:
    """400 if the request is at fault, 503 if it came too early, else 500."""
    if isinstance(error, Overloaded):
        return 503
    if isinstance(error, FieldError):
        return error.status
    return 400 if isinstance(error, (UsageError, TextError)) else 500


def problem_of(error: Exception) -> Problem:
    """What to tell about an error.  One that is not the request's fault is written to the log,
    and the client is told nothing of this machine but where in the log it stands.
    """
    status = status_of(error) if isinstance(error, LowMoeError) else 500
    if status == 500:
        identity = uuid.uuid4().hex
        log.error("request %s failed", identity, exc_info=error)
        return Problem(
            status=500,
            message=f"The server failed; its log says why under {identity}.",
            id=identity,
        )
    retry = {"retry-after": str(RETRY_AFTER_S)} if status == 503 else {}
    name = error.field if isinstance(error, FieldError) else None
    return Problem(
        status=status,
        message=str(error),
        field=name,
        headers=retry,
        too_long=isinstance(error, ContextError),
    )


def problem_of_body(error: RequestValidationError) -> Problem:
    """The first thing that is wrong with a request's body, path or query, by the field's name."""
    first = error.errors()[0]
    place, *path = first["loc"]
    name = ".".join(str(part) for part in path)[:MAX_FIELD]
    if first["type"] == "extra_forbidden":
        message = f"{name} is not supported here. Leave it out."
    elif first["type"] == "json_invalid" or not path:
        message, name = f"The {place} is no JSON object of this route: {first['msg']}.", ""
    else:
        message = f"{name}: {first['msg']}."
    return Problem(status=400, message=message, field=name or None)


@dataclass(frozen=True, slots=True)
class Dialects:
    """By path, whose dialect an error is written in: that of the longest prefix, else plain."""

    by_prefix: Mapping[str, Dialect]

    def response(self, path: str, problem: Problem) -> JSONResponse:
        """The whole answer to a request to this path."""
        prefixes = [p for p in self.by_prefix if path == p or path.startswith(p + "/")]
        dialect = self.by_prefix[max(prefixes, key=len)] if prefixes else plain
        return JSONResponse(dialect(problem), problem.status, dict(problem.headers))

    def install(self, app: FastAPI) -> None:
        """Let the app's errors be written so.  What nobody foresaw is left to who stands around."""

        async def failed(request: Request, error: Exception) -> JSONResponse:
            return self.response(request.url.path, problem_of(error))

        async def bad_body(request: Request, error: Exception) -> JSONResponse:
            assert isinstance(error, RequestValidationError)
            return self.response(request.url.path, problem_of_body(error))

        async def no_route(request: Request, error: Exception) -> JSONResponse:
            assert isinstance(error, HTTPException)
            told = Problem(
                status=error.status_code, message=error.detail, headers=error.headers or {}
            )
            return self.response(request.url.path, told)

        app.add_exception_handler(LowMoeError, failed)
        app.add_exception_handler(RequestValidationError, bad_body)
        app.add_exception_handler(HTTPException, no_route)
