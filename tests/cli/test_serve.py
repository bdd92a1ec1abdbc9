"""`lowmoe serve` says what is wrong before it loads, answers, and ends when it is told to."""

import os
import signal
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import httpx2
import pytest

from lowmoe.cli import serve
from lowmoe.engine.batch import Batch
from lowmoe.server.app import ServerOptions
from lowmoe.server.worker import Worker
from tests.cli.conftest import Done, RunCommand

T = TypeVar("T")
COMPLETION = "/v1/completions"


@pytest.fixture
def not_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object) -> None:
        raise AssertionError("a model is loaded")

    monkeypatch.setattr(serve, "load_model", load)


# --- before a model is loaded


@pytest.mark.usefixtures("not_loading")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--host", "0.0.0.0"), "Give one with --api-key"),
        (("--host", "a host", "--api-key", "k"), "is no address here"),
        (("--port", "70000"), "--port is 70000"),
        (("--queue", "-1"), "--queue is -1"),
        (("--sequences", "9"), "sequences is 9, but must be 1 to 8"),
        (("--sequences", "0"), "sequences is 0, but must be 1 to 8"),
        (("--api-key", "a b"), "none of them blank"),
        (("--ram", "much"), "--ram is 'much'"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(
    lowmoe_command: RunCommand, arguments: tuple[str, ...], said: str
) -> None:
    done = lowmoe_command("serve", "demo", "--port", "0", *arguments)
    assert done.code == 2
    (line,) = done.err.splitlines()
    assert said in line


@pytest.mark.usefixtures("not_loading")
def test_a_port_that_is_taken_is_said_in_a_line(lowmoe_command: RunCommand) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = lowmoe_command("serve", "--port", port)
    assert done.code == 2
    assert f"port {port} of 127.0.0.1 cannot be listened on" in done.err
    assert len(done.err.splitlines()) == 1


# --- while it runs


def while_serving(
    lowmoe_command: RunCommand,
    monkeypatch: pytest.MonkeyPatch,
    work: Callable[[str, Worker], T],
    *arguments: object,
) -> tuple[Done, T]:
    """What the command left when `work(address, worker)` was done beside it; SIGINT ends it."""
    listening: list[tuple[ServerOptions, Worker]] = []
    is_listening = threading.Event()
    announce = serve._announce

    def announced(worker: Worker, options: ServerOptions) -> None:
        announce(worker, options)
        listening.append((options, worker))
        is_listening.set()

    def beside() -> T:
        assert is_listening.wait(30)
        ((options, worker),) = listening
        try:
            return work(f"http://127.0.0.1:{options.port}", worker)
        finally:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(serve, "_announce", announced)
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(beside)
        done = lowmoe_command("serve", *arguments, "--port", "0", "--threads", "1")
        return done, found.result(30)


def test_it_answers_says_so_and_ends_when_it_is_told_to(
    lowmoe_command: RunCommand, monkeypatch: pytest.MonkeyPatch, model_folder: Path
) -> None:
    def work(address: str, worker: Worker) -> Any:
        asked = {
            "model": worker.model.name,
            "prompt": "secret words",
            "max_tokens": 4,
            "temperature": 0,
        }
        return httpx2.post(address + COMPLETION, json=asked, timeout=30).json()

    done, answer = while_serving(lowmoe_command, monkeypatch, work, model_folder)
    assert answer["usage"]["completion_tokens"] == 4
    assert done.code == 0
    assert done.out.startswith("talking-6bit answers at http://127.0.0.1:")
    assert "OPENAI_BASE_URL=http://127.0.0.1:" in done.out
    caches, line = done.err.splitlines()
    assert caches.startswith("8 conversations at once, ")
    assert "POST /v1/completions 200 in" in line
    assert "4 new: length" in line
    assert "secret" not in done.err + done.out


def test_a_key_is_asked_for_as_it_was_given(
    lowmoe_command: RunCommand, monkeypatch: pytest.MonkeyPatch, model_folder: Path
) -> None:
    monkeypatch.setenv("LOWMOE_API_KEY", "swordfish")

    def work(address: str, worker: Worker) -> list[int]:
        keys = (None, "wrong", "swordfish")
        headers = [{} if key is None else {"authorization": f"Bearer {key}"} for key in keys]
        return [httpx2.get(f"{address}/v1/models", headers=h).status_code for h in headers]

    done, found = while_serving(lowmoe_command, monkeypatch, work, model_folder, "--sequences", "2")
    assert found == [401, 401, 200]
    assert "swordfish" not in done.out + done.err


def test_an_answer_under_way_has_its_end_told_when_the_server_is_told_to_stop(
    lowmoe_command: RunCommand, monkeypatch: pytest.MonkeyPatch, model_folder: Path
) -> None:
    step, begun, go_on = Batch.step, threading.Event(), threading.Event()

    def held(batch: Batch) -> Any:
        begun.set()
        assert go_on.wait(30)
        return step(batch)

    monkeypatch.setattr(Batch, "step", held)

    def work(address: str, worker: Worker) -> str:
        asked = {"model": worker.model.name, "prompt": "Once", "max_tokens": 300, "stream": True}
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(httpx2.post, address + COMPLETION, json=asked, timeout=30)
            assert begun.wait(30)
            os.kill(os.getpid(), signal.SIGINT)  # answers under way may end
            while not worker._closing:
                pass
            os.kill(os.getpid(), signal.SIGINT)  # or not
            while not worker._cancelling:
                pass
            go_on.set()
            return answer.result(30).text

    done, text = while_serving(lowmoe_command, monkeypatch, work, model_folder)
    assert "the server shuts down" in text.split("data: ")[-1]
    assert done.code == 0
    assert "cancelled" in done.err
