"""Streams: what is answered when, and that nobody works for a client who is gone."""

import asyncio
import contextlib
import itertools
import socket
import time
from collections.abc import AsyncGenerator

import httpx2
import pytest
from starlette.types import Message

from lowmoe.errors import FolderError, PromptError
from lowmoe.server import sse
from lowmoe.server.asking import Failed, Overloaded, Text
from lowmoe.server.errors import Problem
from tests.server.fake_service import FakeService, Gate, Script, reading, saying
from tests.server.raw_http import connected, head
from tests.server.serving import serving

# One path of each dialect, and what it sends.
MESSAGES = [{"role": "user", "content": "Hi"}]
BODIES = {
    "/v1/messages": {"model": "demo", "max_tokens": 9, "messages": MESSAGES},
    "/v1/chat/completions": {"model": "demo", "messages": MESSAGES},
    "/v1/completions": {"model": "demo", "prompt": "Hi"},
}
LAST = {
    "/v1/messages": "event: message_stop",
    "/v1/chat/completions": "data: [DONE]",
    "/v1/completions": "data: [DONE]",
}
paths = pytest.mark.parametrize("path", BODIES)


def streaming(path: str) -> dict[str, object]:
    return {**BODIES[path], "stream": True}


def answer_to(path: str, script: Script) -> httpx2.Response:
    with serving(FakeService([script])) as url, httpx2.Client(base_url=url) as client:
        return client.post(path, json=streaming(path))


@paths
def test_a_stream_ends_as_its_dialect_ends_streams(path: str) -> None:
    answer = answer_to(path, [*reading(0, 7), *saying("Hello")])

    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.text.rstrip().rpartition("\n\n")[2].startswith(LAST[path])


@paths
@pytest.mark.parametrize("begin", [[], reading(0)], ids=["at once", "while the prompt is read"])
def test_headers_and_a_first_byte_come_before_the_prompt_is_read(path: str, begin: Script) -> None:
    gate = Gate()
    service = FakeService([[*begin, gate, *saying("Hello")]])
    with (
        serving(service) as url,
        httpx2.Client(base_url=url) as client,
        client.stream("POST", path, json=streaming(path)) as answer,
    ):
        pieces = answer.iter_text()
        first = next(pieces)
        gate.open()
        rest = "".join(pieces)
    assert answer.status_code == 200
    assert first
    assert LAST[path] in rest


@paths
def test_a_ping_breaks_every_silence(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "PING_S", 0.05)
    gate = Gate()
    service = FakeService([[*reading(0), gate, *saying("Hello")]])
    with (
        serving(service) as url,
        httpx2.Client(base_url=url, timeout=10) as client,
        client.stream("POST", path, json=streaming(path)) as answer,
    ):
        arrived = []
        for piece in answer.iter_text():
            if "ping" in piece and len(arrived) < 8:
                arrived.append(time.monotonic())
                if len(arrived) == 8:
                    gate.open()
    gaps = [later - sooner for sooner, later in itertools.pairwise(arrived)]
    # Nobody promises when a thread gets on; the middle one says what the clock was set to.
    assert 0.04 < sorted(gaps)[len(gaps) // 2] < 0.5


@paths
@pytest.mark.parametrize(
    ("error", "status"),
    [
        (PromptError("the prompt has 9000 tokens, the context 4096. Shorten it."), 400),
        (Overloaded("too many wait. Ask again later."), 503),
        (FolderError("/secret/folder is damaged"), 500),
        (RuntimeError("0x7f8efc208d68"), 500),
    ],
    ids=["prompt", "overloaded", "folder", "bug"],
)
def test_what_fails_at_once_has_a_status_of_its_own(
    path: str, error: Exception, status: int
) -> None:
    answer = answer_to(path, [error])

    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/json"
    assert (str(error) in answer.text) is (status != 500)
    assert ("retry-after" in answer.headers) is (status == 503)


@paths
@pytest.mark.parametrize("as_event", [True, False], ids=["Failed", "raised"])
def test_a_stream_that_fails_says_so_and_does_not_end_as_if_whole(
    path: str, as_event: bool
) -> None:
    error = FolderError("/secret/folder is damaged")
    answer = answer_to(path, [*saying("Hel")[:1], Failed(error) if as_event else error])

    assert answer.status_code == 200
    assert '"error"' in answer.text.rstrip().rpartition("\n\n")[2]
    assert "the server failed" in answer.text.lower()
    assert "secret" not in answer.text
    assert LAST[path] not in answer.text


@paths
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_who_goes_away_cancels_its_answer(path: str, stream: bool) -> None:
    gate = Gate()
    service = FakeService([[*reading(0), gate, *saying("Hello")]])
    with serving(service) as url, httpx2.Client(base_url=url, timeout=0.5) as client:
        body = {**BODIES[path], "stream": stream}
        with (
            contextlib.suppress(httpx2.ReadTimeout),
            client.stream("POST", path, json=body),
        ):
            gate.reached.result(timeout=5)
        client.close()
        assert service.cancelled.get(timeout=5) is service.tapes[0]


@paths
def test_a_client_who_is_gone_before_anything_began_cancels_its_answer(path: str) -> None:
    service = FakeService([[Gate(), *saying("Hello")]])
    with serving(service) as url:
        with httpx2.Client(base_url=url) as client:
            request = client.build_request("POST", path, json=streaming(path))
        sent = head("POST", path, [f"{k}: {v}" for k, v in request.headers.items() if k != "host"])
        with connected(url) as connection:
            connection.sendall(sent + request.content)
        # Closed with the request still unread, perhaps.
        assert service.cancelled.get(timeout=5).cancelled


def test_a_client_who_takes_nothing_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "PING_S", 0.05)
    monkeypatch.setattr(sse, "STUCK_S", 0.2)
    path = "/v1/messages"
    # 32 MiB: more than sockets and uvicorn hold.
    service = FakeService([[*(Text(0, "answer", "x" * 2**20) for _ in range(32)), Gate()]])
    with serving(service) as url, httpx2.Client(base_url=url) as client:
        request = client.build_request("POST", path, json=streaming(path))
        sent = head("POST", path, [f"{k}: {v}" for k, v in request.headers.items() if k != "host"])
        with connected(url) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.sendall(sent + request.content)
            assert service.cancelled.get(timeout=5).cancelled


def test_frames_and_pings_are_whole_and_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "PING_S", 0.0)  # as often as it may
    sent: list[Message] = []

    async def frames() -> AsyncGenerator[str, None]:
        for number in range(200):
            await asyncio.sleep(0)
            yield f"data: {number}\n\n"

    async def send(message: Message) -> None:
        await asyncio.sleep(0.0005)  # another task's turn, in the middle of a frame
        sent.append(message)

    async def receive() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    async def stream() -> None:
        monkeypatch.setattr(sse, "REFUSE_S", 0.0)
        await sse.respond(frames(), failed=str)({}, receive, send)

    asyncio.run(stream())

    assert [message["type"] for message in sent[:2]] == [
        "http.response.start",
        "http.response.body",
    ]
    bodies = [message["body"].decode() for message in sent[1:]]
    assert ": ping\n\n" in bodies
    assert [b for b in bodies if "ping" not in b] == [*(f"data: {n}\n\n" for n in range(200)), ""]
    assert sent[-1] == {"type": "http.response.body", "body": b"", "more_body": False}


def test_frames_that_fail_clean_up_with_time_to_do_so() -> None:
    cleaned = []

    async def frames() -> AsyncGenerator[str, None]:
        try:
            yield "data: 1\n\n"
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.01)
            cleaned.append("up")

    async def send(message: Message) -> None:
        pass

    async def receive() -> Message:
        await asyncio.sleep(0.01)
        return {"type": "http.disconnect"}

    def failed(problem: Problem) -> str:
        raise AssertionError

    async def stream() -> None:
        await sse.respond(frames(), failed=failed)({}, receive, send)

    asyncio.run(stream())
    assert cleaned == ["up"]
