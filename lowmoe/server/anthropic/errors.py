"""Errors as Anthropic writes them.

Knows:        Anthropic's types of errors.
Ignorant of:  what went wrong, HTTP.
"""

from collections.abc import Mapping
from typing import Any

from lowmoe.server.anthropic.frames import frame
from lowmoe.server.errors import Problem

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def error_body(problem: Problem) -> Mapping[str, Any]:
    """The body of an answer that says why there is none."""
    other = "api_error" if problem.status >= 500 else "invalid_request_error"
    error = {"type": _TYPES.get(problem.status, other), "message": problem.message}
    return {"type": "error", "error": error, "request_id": problem.id}


def error_frame(problem: Problem) -> str:
    """What ends a stream that failed."""
    return frame(error_body(problem))
