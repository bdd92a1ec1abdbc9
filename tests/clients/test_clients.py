"""Clients of others do with this server what people do with them.

openai and anthropic for Python run with every other test, the rest where make_environments.py has
installed them: pytest -m clients tests/clients.
"""

import json
import time
from collections.abc import Mapping
from typing import Any

import jsonschema
import pytest

from benchmarks.server.process import Served
from tests.clients.driven import CLIENTS, DRIVERS, Client, drive, is_installed

QUESTIONS = json.loads((DRIVERS / "questions.json").read_text())
IDLE_S = 1.0  # within which a server stops for a client that has gone


GONE = 'lowmoe_requests_unanswered_total{reason="client_gone"}'


@pytest.fixture(
    scope="session",
    params=[
        pytest.param(c, id=c.title, marks=[pytest.mark.clients] if c.environment else [])
        for c in CLIENTS
    ],
)
def client(request: pytest.FixtureRequest) -> Client:
    found: Client = request.param
    if not is_installed(found):
        pytest.fail(f"{found.package} is not installed: python tests/clients/make_environments.py")
    return found


@pytest.fixture(scope="session")
def driven(
    client: Client, server: Served, tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, Mapping[str, Any]]:
    """What became of each behaviour, and how many requests the server saw abandoned."""
    gone = server.metric(GONE)
    found = drive(client, server.url, tmp_path_factory.mktemp(client.launch))
    deadline = time.monotonic() + IDLE_S
    while server.metric("lowmoe_num_requests_running") and time.monotonic() < deadline:
        pass
    running = server.metric("lowmoe_num_requests_running")
    return {**found, "server": {"gone": server.metric(GONE) - gone, "running": running}}


def saw(driven: Mapping[str, Mapping[str, Any]], behaviour: str) -> Any:
    told = driven[behaviour]
    if "absent" in told:
        pytest.skip(told["absent"])
    assert "failed" not in told, told["failed"]
    return told["saw"]


def test_models(driven: Mapping[str, Mapping[str, Any]]) -> None:
    assert "demo" in saw(driven, "models")


def test_chat(driven: Mapping[str, Mapping[str, Any]]) -> None:
    found = saw(driven, "chat")
    assert found["text"]
    assert found["n_new"] == QUESTIONS["N_TOKENS"]
    assert found["finish"] in ("length", None)  # None of a client that does not tell


def test_stream(driven: Mapping[str, Mapping[str, Any]]) -> None:
    found, whole = saw(driven, "stream"), saw(driven, "chat")
    assert found["pieces"]
    assert "".join(found["pieces"]) == whole["text"]
    assert found["n_new"] in (whole["n_new"], None)


def test_cancel(driven: Mapping[str, Mapping[str, Any]]) -> None:
    assert saw(driven, "cancel")["first"]
    assert driven["server"] == {"gone": 1, "running": 0}


def test_tools(driven: Mapping[str, Mapping[str, Any]]) -> None:
    found = saw(driven, "tools")
    assert found["name"] == QUESTIONS["TOOL"]["name"]
    jsonschema.validate(json.loads(found["arguments"]), QUESTIONS["TOOL"]["parameters"])


def test_schema(driven: Mapping[str, Mapping[str, Any]]) -> None:
    jsonschema.validate(json.loads(saw(driven, "schema")), QUESTIONS["SCHEMA"])


def test_error(driven: Mapping[str, Mapping[str, Any]]) -> None:
    found = saw(driven, "error")
    assert found["status"] == 400
    assert "the context holds 1024" in found["message"]


def test_two_at_once(driven: Mapping[str, Mapping[str, Any]]) -> None:
    alone = [saw(driven, question)["text"] for question in ("chat", "other")]
    assert saw(driven, "two") == alone
