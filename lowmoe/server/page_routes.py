"""The page at /, its files, and the live picture of the machine that it shows.

Knows:        which files there are, what browsers are to allow them, how frames are written.
Ignorant of:  what a frame is made from; who may ask.
"""

import base64
import dataclasses
import hashlib
import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import APIRouter
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from lowmoe.server import sse
from lowmoe.server.errors import Problem
from lowmoe.server.watching import Frame, Watch

PAGE = Path(__file__).parent / "page"
TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".mjs": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".LICENSE": "text/plain; charset=utf-8",
}
# Only what comes from here, no script in the markup, nothing framed; and a string becomes markup
# through DOMPurify or not at all.
POLICY = (
    "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "object-src 'none'; require-trusted-types-for 'script'; trusted-types dompurify"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    # Asked for again each time, which costs little here: an update is seen at once.
    "Cache-Control": "no-cache",
}


def files() -> dict[str, Path]:
    """What is served, by its path in a request: read from the package, not from requests."""
    found = sorted(path for path in PAGE.rglob("*") if path.suffix in TYPES)
    served = {f"/page/{path.relative_to(PAGE).as_posix()}": path for path in found}
    return {"/": served.pop("/page/index.html"), **served}


def routes(watch: Watch) -> APIRouter:
    """/ and its files, which hold no secrets; /lowmoe/machine and /lowmoe/live, which need the key
    that the server needs.
    """
    router = APIRouter(include_in_schema=False)
    for path, file in files().items():
        _serve(router, path, file)

    @router.get("/lowmoe/machine")
    async def machine() -> JSONResponse:
        return JSONResponse(dataclasses.asdict(watch.about))

    @router.get("/lowmoe/live")
    async def live() -> Response:
        return sse.respond(_frames(watch), failed=_failed)

    return router


def _serve(router: APIRouter, path: str, file: Path) -> None:
    content = file.read_bytes()
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {**HEADERS, "ETag": tag, "Content-Type": TYPES[file.suffix]}

    async def serve(request: Request) -> Response:
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers)

    router.add_api_route(path, serve, methods=["GET", "HEAD"])


async def _frames(watch: Watch) -> AsyncGenerator[str, None]:
    async with aclosing(watch.frames()) as frames:
        async for frame in frames:
            yield f"data: {json.dumps(frame_to_json(frame), separators=(',', ':'))}\n\n"


def _failed(problem: Problem) -> str:
    return f"event: error\ndata: {json.dumps({'message': problem.message})}\n\n"


def frame_to_json(frame: Frame) -> Mapping[str, Any]:
    """Numbers of experts and what is said of them as base64 of little-endian integers."""
    return {
        "whole": frame.whole,
        "moved": {"at": _packed(frame.moved_at, "<u4"), "to": _packed(frame.moved_to, "u1")},
        "used": {"at": _packed(frame.used_at, "<u4"), "times": _packed(frame.used_times, "<u4")},
        "rates": dataclasses.asdict(frame.rates),
    }


def _packed(values: NDArray[np.integer[Any]], kind: str) -> str:
    return base64.b64encode(values.astype(kind).tobytes()).decode()
