"""Every request leaves one line, whatever it is."""

import logging
from collections.abc import AsyncIterator

import httpx2
import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from lowmoe.server.request_log import RequestLog, note
from tests.server.working import run


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    request = Request(scope, receive)
    if request.url.path == "/fails":
        raise ZeroDivisionError
    if request.url.path == "/streams":

        async def frames() -> AsyncIterator[str]:
            yield "a"
            note("5 tokens")
            yield "b"

        await StreamingResponse(frames())(scope, receive, send)
        return
    await PlainTextResponse("no", 404)(scope, receive, send)


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("/streams", "127.0.0.1 GET /streams 200 in 0.0 s; 5 tokens"),
        ("/none?secret=1", "127.0.0.1 GET /none 404 in 0.0 s"),
        ("/a%0Ab", "127.0.0.1 GET /a%0Ab 404 in 0.0 s"),
        ("/fails", "127.0.0.1 GET /fails - in 0.0 s"),
    ],
)
def test_one_line_says_how_it_ended(caplog: pytest.LogCaptureFixture, path: str, line: str) -> None:
    caplog.set_level(logging.INFO, "lowmoe.requests")

    async def test() -> None:
        transport = httpx2.ASGITransport(RequestLog(app), raise_app_exceptions=False)
        async with httpx2.AsyncClient(transport=transport, base_url="http://here") as client:
            await client.get(path)

    run(test)
    assert [record.getMessage() for record in caplog.records] == [line]


def test_a_note_without_a_request_goes_nowhere(caplog: pytest.LogCaptureFixture) -> None:
    note("nobody asked")
    assert caplog.records == []
