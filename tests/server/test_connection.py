"""Connections that dawdle, never end, or are not HTTP at all."""

import contextlib
import socket
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from lowmoe.server import connection, guard
from tests.server.fake_service import FakeService, Gate, saying
from tests.server.raw_http import connected, head, status, until_closed
from tests.server.serving import serving

JSON = "content-type: application/json"
WAIT_S = 0.5


def send_often(to: socket.socket, piece: bytes, times: int) -> None:
    for _ in range(times):
        to.sendall(piece)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server that waits a moment where others wait seconds."""
    monkeypatch.setattr(connection, "HEAD_S", WAIT_S)
    monkeypatch.setattr(guard, "BODY_S", WAIT_S)
    with serving(FakeService()) as url:
        yield url


def test_who_sends_nothing_is_let_go(impatient: str) -> None:
    with connected(impatient) as idle:
        assert until_closed(idle).startswith(b"HTTP/1.1 408 ")


def test_a_head_that_comes_a_byte_at_a_time_is_let_go(impatient: str) -> None:
    # Slowloris, which is slow: every byte is in time, the head never ends.
    began = time.monotonic()
    with connected(impatient) as slow, contextlib.suppress(ConnectionError):
        for byte in head("GET", "/health/live") * 1000:
            slow.sendall(bytes([byte if byte != 10 else 32]))
            time.sleep(WAIT_S / 20)
    assert WAIT_S <= time.monotonic() - began < 20 * WAIT_S


def test_a_second_head_must_come_in_time_too(impatient: str) -> None:
    with connected(impatient) as slow:
        slow.sendall(head("GET", "/health/live") + b"GET /health/live HT")
        answers = until_closed(slow)
    assert answers.startswith(b"HTTP/1.1 200 ")
    assert b"HTTP/1.1 408 " in answers


def test_a_body_must_come_in_time(impatient: str) -> None:
    assert status(impatient, head("POST", "/v1/messages", [JSON, "content-length: 9"])) == 408


def test_a_server_that_ends_waits_for_no_half_of_a_body(caplog: pytest.LogCaptureFixture) -> None:
    asked = head("POST", "/v1/messages", [JSON, "content-length: 900"]) + b"{"
    with contextlib.ExitStack() as until_here:
        with serving(FakeService()) as url:
            slow = until_here.enter_context(connected(url))
            slow.sendall(asked)
            time.sleep(WAIT_S)  # for it to arrive
            told = time.monotonic()
        assert time.monotonic() - told < 2
        assert until_closed(slow) == b""
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


@pytest.mark.parametrize("cut_short", [0, 5])
def test_a_server_that_ends_lets_an_answer_end_though_another_request_came_behind(
    cut_short: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "CLOSING_S", 3 * WAIT_S)  # half a request is waited for then
    body = b'{"model": "demo", "max_tokens": 9, "messages": [{"role": "user", "content": "Hi"}]}'
    asked = head("POST", "/v1/messages", [JSON, f"content-length: {len(body)}"]) + body
    gate = Gate()
    with contextlib.ExitStack() as until_here:
        with serving(FakeService([[gate, *saying("Hello")], saying("again")])) as url:
            client = until_here.enter_context(connected(url))
            client.sendall(asked + asked[: len(asked) - cut_short])
            gate.reached.result(timeout=5)
            threading.Timer(WAIT_S, gate.open).start()
        answers = until_closed(client)
    assert answers.startswith(b"HTTP/1.1 200 ")
    assert b"Hello" in answers


def test_what_is_left_of_a_refused_body_is_not_waited_for(impatient: str) -> None:
    with connected(impatient) as slow:
        slow.sendall(head("POST", "/v1/messages", ["content-length: 900"]) + b"{")
        assert b" 415 " in slow.recv(65536)
        slow.sendall(b"  ")
        assert b"HTTP/1.1 " not in until_closed(slow)  # at most what is left of the one answer


def test_a_refused_body_is_not_taken_for_ever() -> None:
    with serving(FakeService()) as url, connected(url) as endless:
        endless.sendall(head("POST", "/v1/messages", ["transfer-encoding: chunked"]))
        assert b" 415 " in endless.recv(65536)
        chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
        with pytest.raises(ConnectionError):
            send_often(endless, chunk, 4 * guard.MAX_BODY_BYTES // len(chunk))


def test_a_head_without_end_is_not_kept() -> None:
    with serving(FakeService()) as url, connected(url) as endless:
        endless.sendall(b"GET /health/live HTTP/1.1\r\nx: ")
        with pytest.raises(ConnectionError):
            send_often(endless, b"x" * 0x10000, 1000)


def test_a_request_that_comes_in_one_piece_is_no_long_head() -> None:
    body = b'{"model": "demo"' + b" " * 3 * guard.MAX_HEAD_BYTES + b"}"
    whole = head("POST", "/v1/messages", [JSON, f"content-length: {len(body)}"]) + body
    with serving(FakeService()) as url:
        assert status(url, whole) == 400  # there are no messages in it


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost : localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: localhost\r\nx: a\x00b\r\n\r\n",
        b"POST /v1/messages HTTP/1.1\r\nhost: localhost\r\ncontent-length: -1\r\n\r\n",
        b"POST /v1/messages HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1\r\n"
        b"content-length: 2\r\n\r\n{}",
    ],
)
def test_what_is_not_http_is_refused(sent: bytes) -> None:
    with serving(FakeService()) as url:
        assert status(url, sent) == 400


@pytest.mark.parametrize(
    "two_lengths",
    [
        ["content-length: 4", "transfer-encoding: chunked"],
        ["transfer-encoding: chunked", "content-length: 4"],
        ["transfer-encoding: chunked, identity"],
        ["transfer-encoding: identity, chunked, x"],
    ],
)
def test_a_request_of_two_lengths_smuggles_no_second_one(two_lengths: list[str]) -> None:
    # A proxy before us that believes the other length would give us what it took for a body.
    service = FakeService()
    smuggled = head("GET", "/v1/models")
    sent = head("POST", "/v1/messages", [JSON, *two_lengths]) + b"0\r\n\r\n" + smuggled
    with serving(service) as url, connected(url) as connection_:
        connection_.sendall(sent)
        answers = until_closed(connection_)
    assert answers.count(b"HTTP/1.1 ") == 1
    assert answers.startswith(b"HTTP/1.1 400 ")


def test_a_websocket_is_not_opened() -> None:
    asked = ["connection: upgrade", "upgrade: websocket", "sec-websocket-version: 13"]
    with serving(FakeService()) as url:
        assert status(url, head("GET", "/v1/models", [*asked, "sec-websocket-key: x"])) != 101


def test_a_request_without_host_is_refused() -> None:
    with serving(FakeService()) as url:
        assert status(url, b"GET /v1/models HTTP/1.0\r\n\r\n") == 403
        two = b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\nhost: elsewhere.example\r\n\r\n"
        assert status(url, two) in (400, 403)


@pytest.mark.skipif(sys.platform == "win32", reason="there is no such limit")
@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ((1024, 1 << 20), (connection.MAX_CONNECTIONS + 1024, 1 << 20)),
        ((1024, 4096), (4096, 4096)),
        ((1024, -1), (connection.MAX_CONNECTIONS + 1024, -1)),
        ((1 << 19, 1 << 20), None),
        ((-1, -1), None),
    ],
)
def test_as_many_descriptors_are_asked_for_as_connections_need(
    limits: tuple[int, int], expected: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    resource = pytest.importorskip("resource")
    asked = []
    monkeypatch.setattr(resource, "RLIM_INFINITY", -1)
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda _, pair: asked.append(pair))

    connection.allow_connections()

    assert asked == ([] if expected is None else [expected])
