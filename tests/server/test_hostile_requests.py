"""What brought other servers down, or made them tell what they should not: one test for each class.

The classes are those of published advisories on servers of language models and what they stand on.
Hosts, origins and the key are in test_guard, slow and endless connections in test_connection,
paths out of the page's folder in test_page_routes.
"""

import json
import logging
import socket
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from lowmoe.server import guard
from lowmoe.server.app import ServerOptions
from tests.server.fake_service import FakeService
from tests.server.fake_watch import FakeWatch
from tests.server.serving import serving

MESSAGES = [{"role": "user", "content": "Hi"}]
CHAT = {"model": "demo", "messages": MESSAGES}
ANTHROPIC = {**CHAT, "max_tokens": 9}
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def service() -> FakeService:
    return FakeService()


@pytest.fixture(scope="module")
def client(service: FakeService) -> Iterator[httpx2.Client]:
    with serving(service) as url, httpx2.Client(base_url=url, timeout=10) as client:
        yield client


@pytest.fixture(autouse=True)
def nothing_asked(service: FakeService) -> Iterator[None]:
    """None of this reaches who answers."""
    yield
    assert service.asks == []


def refused(answer: httpx2.Response, status: int = 400) -> str:
    """The body of a refusal, which is short and in one of the dialects."""
    assert answer.status_code == status, answer.text
    assert len(answer.content) < 2000
    assert answer.json()["error"]["message"]
    return answer.text


def test_the_key_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    # Class: a comparison that ends at the first wrong byte tells, by its time, how many are right.
    compared: list[tuple[bytes, bytes]] = []

    def compare_digest(given: bytes, key: bytes) -> bool:
        compared.append((given, key))
        return given == key

    monkeypatch.setattr(guard.hmac, "compare_digest", compare_digest)
    keys = {"authorization": "Bearer first", "x-api-key": "second"}
    with serving(FakeService(), ServerOptions(api_key="key")) as url:
        assert httpx2.get(f"{url}/v1/models", headers=keys).status_code == 401
    assert compared == [(b"second", b"key"), (b"first", b"key")]


def test_a_page_that_asks_first_is_told_nothing(client: httpx2.Client) -> None:
    # Class: CORS headers that repeat whatever Origin asks, with credentials.
    asks_first = {
        "origin": "https://elsewhere.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization, content-type",
    }
    for path in ("/v1/chat/completions", "/v1/messages", "/v1/models", "/"):
        answer = client.options(path, headers=asks_first)
        assert answer.status_code == 403
        assert not [name for name in answer.headers if name.startswith("access-control-")]


@pytest.mark.parametrize(
    "fields",
    [
        {"chat_template": "{{ cycler.__init__.__globals__.os.popen('id').read() }}"},
        {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}},
        {"chat_template_kwargs": {"messages": []}},
        {"chat_template_kwargs": {"tokenize": True}},
        {"add_generation_prompt": False},
    ],
    ids=str,
)
def test_a_request_brings_no_template(client: httpx2.Client, fields: dict[str, Any]) -> None:
    # Class: templates, or what changes them, from a request: code execution, endless loops.
    assert next(iter(fields)) in refused(client.post("/v1/chat/completions", json=CHAT | fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 10**9},
        {"n": 0},
        {"n": True},
        {"best_of": 10**9},
        {"max_tokens": -1},
        {"max_tokens": 10**30},
        {"max_tokens": 1.5},
        {"max_tokens": "9"},
        {"temperature": -1},
        {"temperature": 1e400},
        {"top_k": -(10**9)},
        {"top_p": 2},
        {"min_p": -0.5},
        {"repetition_penalty": 0},
        {"seed": 2**64},
        {"logprobs": True, "top_logprobs": 10**6},
        {"n_discard": -5},
        {"n_keep": -5},
        {"logit_bias": {str(10**9): 5}},
        {"stop": [""]},
        {"stop": ["x"] * 1000},
        {"stop": "x" * 10**6},
    ],
    ids=lambda fields: str(fields)[:40],
)
def test_every_number_has_bounds(client: httpx2.Client, fields: dict[str, Any]) -> None:
    # Class: a negative or huge count that becomes an index, an allocation or a million answers.
    answer = client.post(
        "/v1/chat/completions", headers=JSON, content=json.dumps(CHAT | fields).encode()
    )
    refused(answer)


def nested(depth: int) -> Any:
    schema: Any = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    "schema",
    [nested(90), {"type": "string", "enum": ["x" * 70_000]}, "{}", [1], None],
    ids=["deep", "large", "a text", "a list", "null"],
)
def test_a_schema_is_bounded_before_anything_compiles_it(
    client: httpx2.Client, schema: Any
) -> None:
    # Class: schemas that crash or occupy a compiler of grammars, and with it the engine.
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    form = {"type": "json_schema", "json_schema": {"name": "f", "schema": schema}}
    refused(client.post("/v1/chat/completions", json={**CHAT, "response_format": form}))
    if schema is not None:  # which means that there are no parameters
        refused(client.post("/v1/chat/completions", json={**CHAT, "tools": tools}))
    tools = [{"name": "f", "input_schema": schema}]
    refused(client.post("/v1/messages", json={**ANTHROPIC, "tools": tools}))


@pytest.mark.parametrize("kind", ["web_search", "", 7, None, {}, "x" * 10**6], ids=repr)
def test_a_tool_of_an_unknown_type_is_refused(client: httpx2.Client, kind: Any) -> None:
    # Class: a type nobody expected, of a tool or of its fields, that ends the engine's process.
    tools: list[Any] = [{"type": kind, "function": {"name": "f", "parameters": {}}}]
    refused(client.post("/v1/chat/completions", json={**CHAT, "tools": tools}))


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"[" * 5000 + b"]" * 5000,
        b'{"model": NaN}',
        b'{"model": Infinity}',
        b'{"model": "\xff"}',
        b'{"model": "\\ud800"}',
        '{"model": "demo"}'.encode("utf-16"),
        b'{"model": ' + b"9" * 10_000 + b"}",
        b'{"model": "demo"',
        b"{} {}",
        b"",
        b"null",
        b"[]",
        b'"text"',
        b"\x00",
    ],
    ids=lambda body: repr(body[:20]),
)
def test_what_is_not_json_for_everybody_is_refused(client: httpx2.Client, body: bytes) -> None:
    # Class: bodies that overflow a parser's stack, or mean different things to different readers.
    for path in ("/v1/chat/completions", "/v1/messages"):
        refused(client.post(path, headers=JSON, content=body))


@pytest.mark.parametrize("part", [b"[],", b'{"a":1},', b"[[]],"], ids=repr)
def test_a_body_of_millions_of_parts_is_refused_before_they_are_made(
    client: httpx2.Client, part: bytes
) -> None:
    # Class: small to send, large to hold, and nobody else is answered while it is made.
    body = b'{"messages": [' + part * (7_000_000 // len(part)) + b"1]}"
    refused(client.post("/v1/messages", headers=JSON, content=body), 413)


def test_a_compressed_body_is_not_unpacked(client: httpx2.Client) -> None:
    # Class: a few kilobytes that unpack into gigabytes.
    headers = {**JSON, "content-encoding": "gzip"}
    refused(client.post("/v1/messages", headers=headers, content=b"\x1f\x8b"), 415)


def test_nothing_is_fetched_on_a_requests_word(
    client: httpx2.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Class: addresses and files in a request that the server fetches, inside its own network.
    connected: list[object] = []
    there = client.get("/health/live")  # the client's own connection is open already
    monkeypatch.setattr(socket.socket, "connect", lambda _, address: connected.append(address))
    for url in ("http://169.254.169.254/latest/meta-data", "file:///etc/passwd"):
        image: dict[str, Any] = {"type": "image_url", "image_url": {"url": url}}
        messages = [{"role": "user", "content": [image]}]
        assert "image_url" in refused(
            client.post("/v1/chat/completions", json={**CHAT, "messages": messages})
        )
        image = {"type": "image", "source": {"type": "url", "url": url}}
        messages = [{"role": "user", "content": [image]}]
        refused(client.post("/v1/messages", json={**ANTHROPIC, "messages": messages}))
    assert there.status_code == 200
    assert connected == []


@pytest.mark.parametrize(
    "model",
    [
        "../../etc/passwd",
        "/etc/passwd",
        "..%2f..%2fetc%2fpasswd",
        "https://elsewhere.example/m",
        "x\0y",
    ],
)
def test_a_models_name_is_no_path(client: httpx2.Client, model: str) -> None:
    # Class: names from a request that become paths to files or addresses to pull from.
    refused(client.post("/v1/chat/completions", json={**CHAT, "model": model}), 404)
    assert client.get(f"/v1/models/{model.replace(chr(0), '%00')}").status_code == 404


def test_a_file_is_sent_whole_whatever_ranges_are_asked() -> None:
    # Class: a header of thousands of overlapping ranges, each merged with all others or sent.
    ranges = "bytes=" + ",".join(f"{n}-" for n in range(4000))
    with serving(FakeService(), watch=FakeWatch()) as url:
        whole = httpx2.get(f"{url}/page/chat.js")
        asked = httpx2.get(f"{url}/page/chat.js", headers={"range": ranges})
    assert (asked.status_code, asked.content) == (200, whole.content)


def test_a_bug_tells_the_log_and_not_the_client(caplog: pytest.LogCaptureFixture) -> None:
    # Class: addresses of memory, paths and tracebacks in the text of errors.
    secret = "0x7f8efc208d68 /home/somebody/models"
    with (
        caplog.at_level(logging.ERROR),
        serving(FakeService([[RuntimeError(secret)]])) as url,
    ):
        for path, body in (("/v1/chat/completions", CHAT), ("/v1/messages", ANTHROPIC)):
            told = refused(httpx2.post(url + path, json=body), 500)
            assert "0x7f" not in told
            assert "Traceback" not in told
            identity = told.partition("its log says why under ")[2][:32]
            assert any(identity in record.getMessage() for record in caplog.records)
    assert secret in caplog.text


def test_a_refusal_does_not_repeat_what_was_sent(client: httpx2.Client) -> None:
    # Class: bodies that come back in errors, much larger than the answer should be.
    name = "x" * 100_000
    for fields in ({name: 1}, {"model": name}, {"messages": name}, {"tool_choice": name}):
        for path in ("/v1/chat/completions", "/v1/messages"):
            answer = client.post(path, json={**ANTHROPIC, **fields})
            assert 400 <= answer.status_code < 500
            assert len(answer.content) < 2000


def test_a_proxys_word_on_who_asks_is_not_believed() -> None:
    # Class: a header that lets a client pass for another, or for loopback.
    service = FakeService()
    forwarded = {
        "x-forwarded-for": "10.0.0.1",
        "forwarded": "for=10.0.0.1",
        "x-real-ip": "10.0.0.1",
    }
    forwarded |= {"x-forwarded-host": "elsewhere.example", "x-forwarded-proto": "https"}
    with serving(service) as url:
        assert (
            httpx2.post(f"{url}/v1/messages", headers=forwarded, json=ANTHROPIC).status_code == 200
        )
    assert service.asks[0].caller == "127.0.0.1"


def test_a_method_override_overrides_nothing(client: httpx2.Client) -> None:
    # Class: a simple request that a header turns into one a page could not have sent.
    headers = {"x-http-method-override": "POST", **JSON}
    answer = client.request("GET", "/v1/chat/completions", headers=headers, content=b"{}")
    assert answer.status_code == 405


@pytest.mark.parametrize("body", [b"{}", b"no JSON", b""])
@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "TRACE", "PROPFIND"])
def test_other_methods_do_nothing(client: httpx2.Client, method: str, body: bytes) -> None:
    # Class: forgotten routes that create, pull, delete or stop.
    for path in ("/v1/models", "/v1/models/demo", "/v1/chat/completions", "/metrics"):
        assert client.request(method, path, content=body).status_code == 405


@pytest.mark.parametrize(
    "path",
    [
        "/docs",
        "/redoc",
        "/invocations",
        "/pause",
        "/shutdown",
        "/v1/load_lora_adapter",
        "/api/pull",
        "/api/create",
        "/api/delete",
        "/slots/0",
        "/props",
        "/server_info",
        "/collective_rpc",
        "/debug/pprof",
    ],
)
def test_there_is_no_way_in_beside_the_apis(client: httpx2.Client, path: str) -> None:
    # Class: routes of development and administration, open beside those that are guarded.
    assert client.get(path).status_code == 404
    assert client.post(path, json={}).status_code == 404
