"""Errors as OpenAI writes them.

Knows:        OpenAI's types and codes of errors.
Ignorant of:  what went wrong, HTTP.
"""

from collections.abc import Mapping
from typing import Any

from lowmoe.server.errors import Problem
from lowmoe.server.sse import frame

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    501: "not_implemented_error",
    503: "overloaded_error",
}
# By which agents know that they must shorten their conversation.
TOO_LONG = "context_length_exceeded"
_CODES = {401: "invalid_api_key", 501: "not_implemented", 503: "overloaded"}


def error_body(problem: Problem) -> Mapping[str, Any]:
    """The body of an answer that says why there is none."""
    kind = "server_error" if problem.status >= 500 else "invalid_request_error"
    code = TOO_LONG if problem.too_long else _CODES.get(problem.status)
    if problem.status == 404 and problem.field == "model":
        code = "model_not_found"
    error = {
        "message": problem.message,
        "type": _TYPES.get(problem.status, kind),
        "param": problem.field,
        "code": code,
    }
    return {"error": error}


def error_frame(problem: Problem) -> str:
    """What ends a stream that failed; no [DONE] follows, for it would say that all is well."""
    return frame(error_body(problem))
