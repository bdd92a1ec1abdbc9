"""Does every route stand behind the guard, one that nobody has thought of yet as well?"""

import re
from collections.abc import Iterator

import httpx2
import pytest
from fastapi.routing import iter_route_contexts

from lowmoe.errors import UsageError
from lowmoe.server.app import ServerOptions, create_app
from lowmoe.server.guard import MAX_BODY_BYTES, MAX_HEAD_BYTES
from lowmoe.server.hosts import Hosts
from tests.server.fake_service import DEMO_CARD, FakeService
from tests.server.fake_watch import FakeWatch
from tests.server.raw_http import head, status
from tests.server.serving import serving

KEY = "a-key-of-this-test"
WITH_KEY = {"authorization": f"Bearer {KEY}"}
# Whoever adds to these tells the world something without a key: let it be nothing.
OPEN = {"/", "/health/live", "/health/ready"}


def routes() -> list[tuple[str, str]]:
    """Every method and path of the router's table."""
    app = create_app(FakeService(), ServerOptions(), watch=FakeWatch())
    found = []
    for context in iter_route_contexts(app.routes):
        assert context.methods is not None
        assert context.path is not None
        path = re.sub("{[^}]*}", DEMO_CARD.name, context.path)
        found += [(method, path) for method in sorted(context.methods)]
    return sorted(found)


ROUTES = routes()
POSTS = [path for method, path in ROUTES if method == "POST"]


def is_open(path: str) -> bool:
    return path in OPEN or path.startswith("/page/")


@pytest.fixture(scope="module")
def service() -> FakeService:
    return FakeService()


@pytest.fixture(scope="module")
def client(service: FakeService) -> Iterator[httpx2.Client]:
    with (
        serving(service, ServerOptions(api_key=KEY), watch=FakeWatch()) as url,
        httpx2.Client(base_url=url, timeout=10) as client,
    ):
        yield client


def body_of(method: str) -> dict[str, object]:
    return {"json": {}} if method == "POST" else {}


def test_the_table_is_the_one_that_is_served() -> None:
    assert ("POST", "/v1/chat/completions") in ROUTES
    assert ("GET", "/openapi.json") in ROUTES
    assert ("GET", "/lowmoe/live") in ROUTES
    assert ("GET", "/") in ROUTES
    assert {method for method, _ in ROUTES} == {"GET", "HEAD", "POST"}


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_a_route_is_there_for_who_may_ask(client: httpx2.Client, method: str, path: str) -> None:
    # Else the refusals below would prove nothing.  Some answer without an end.
    with client.stream(method, path, headers=WITH_KEY, **body_of(method)) as answer:
        assert answer.status_code in (200, 400, 501)


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize(
    "host",
    [
        "rebound.example",
        "localhost.rebound.example",
        "127.0.0.1.rebound.example",
        "192.168.1.7",
        "",
    ],
)
def test_a_route_does_not_answer_to_another_name(
    client: httpx2.Client, method: str, path: str, host: str
) -> None:
    answer = client.request(method, path, headers={**WITH_KEY, "host": host}, **body_of(method))
    assert answer.status_code == 403


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://elsewhere.example"},
        {"origin": "null"},
        {"origin": "http://localhost:1"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site", "sec-fetch-mode": "no-cors"},
    ],
    ids=str,
)
def test_a_route_does_not_answer_pages_of_other_origins(
    client: httpx2.Client, method: str, path: str, headers: dict[str, str]
) -> None:
    answer = client.request(method, path, headers={**WITH_KEY, **headers}, **body_of(method))
    assert answer.status_code == 403
    assert not [name for name in answer.headers if name.startswith("access-control-")]


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": f"Basic {KEY}"},
        {"authorization": f"Bearer {KEY}x"},
        {"authorization": f"Bearer {KEY[:-1]}"},
        {"authorization": "Bearer"},
        {"x-api-key": "wrong"},
        {"x-api-key": ""},
        {"cookie": f"key={KEY}"},
    ],
    ids=str,
)
def test_a_route_wants_the_key(
    client: httpx2.Client, method: str, path: str, headers: dict[str, str]
) -> None:
    answer = client.request(method, path, headers=headers, **body_of(method))
    assert (answer.status_code == 401) != (is_open(path) and answer.status_code == 200)


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize(
    "media_type",
    ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""],
)
def test_a_route_takes_json_only(client: httpx2.Client, path: str, media_type: str) -> None:
    # These are what a form, or a page's fetch without asking first, can send anywhere.
    headers = {**WITH_KEY, "content-type": media_type}
    assert client.post(path, headers=headers, content=b"{}").status_code == 415


@pytest.mark.parametrize("path", POSTS)
def test_a_route_takes_no_body_of_more_than_eight_mebibytes(
    client: httpx2.Client, path: str
) -> None:
    long = ["content-type: application/json", f"content-length: {MAX_BODY_BYTES + 1}"]
    with_key = [*long, f"x-api-key: {KEY}"]

    assert status(str(client.base_url), head("POST", path, with_key)) == 413


def test_a_body_in_chunks_is_counted_as_it_comes(client: httpx2.Client) -> None:
    headers = {**WITH_KEY, "content-type": "application/json"}
    chunks = (b" " * 65536 for _ in range(MAX_BODY_BYTES // 65536 + 1))

    answer = client.post("/v1/messages", headers=headers, content=chunks)

    assert answer.status_code == 413
    assert answer.json()["error"]["type"] == "request_too_large"


def test_nothing_that_was_refused_was_asked(client: httpx2.Client, service: FakeService) -> None:
    client.post("/v1/messages", json={})
    assert service.asks == []


@pytest.mark.parametrize("headers", [WITH_KEY, {"x-api-key": KEY}])
def test_the_key_is_taken_as_either_api_sends_it(
    client: httpx2.Client, headers: dict[str, str]
) -> None:
    assert client.get("/v1/models", headers=headers).status_code == 200


def test_who_has_no_key_is_told_how_to_send_it(client: httpx2.Client) -> None:
    answer = client.get("/v1/models")
    assert answer.headers["www-authenticate"] == "Bearer"
    assert "x-api-key" in answer.json()["error"]["message"]


def test_a_link_from_elsewhere_leads_to_the_page_alone(client: httpx2.Client) -> None:
    link = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert client.get("/", headers=link).status_code == 200
    assert client.get("/v1/models", headers={**WITH_KEY, **link}).status_code == 403


def test_who_asks_from_the_page_is_of_our_origin(client: httpx2.Client) -> None:
    ours = {**WITH_KEY, "origin": str(client.base_url).rstrip("/"), "sec-fetch-site": "same-origin"}
    assert client.get("/v1/models", headers=ours).status_code == 200


def test_every_answer_tells_browsers_what_they_may_not(client: httpx2.Client) -> None:
    for answer in (client.get("/health/live"), client.get("/v1/models"), client.get("/nowhere")):
        assert "default-src 'self'" in answer.headers["content-security-policy"]
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert "server" not in answer.headers


def test_a_head_too_long_is_refused(client: httpx2.Client) -> None:
    headers = {**WITH_KEY, "x-long": "x" * MAX_HEAD_BYTES}
    assert client.get("/v1/models", headers=headers).status_code == 431
    assert client.get(f"/v1/models?{'x' * MAX_HEAD_BYTES}", headers=WITH_KEY).status_code == 431


@pytest.mark.parametrize(
    ("bound", "host", "allowed"),
    [
        ("127.0.0.1", "127.0.0.1:8080", True),
        ("127.0.0.1", "127.9.9.9", True),
        ("127.0.0.1", "LocalHost:1", True),
        ("127.0.0.1", "[::1]:8080", True),
        ("::1", "[::1]", True),
        ("127.0.0.1", "192.168.1.7", False),
        ("127.0.0.1", "[::2]", False),
        ("127.0.0.1", "localhost@elsewhere.example", False),
        ("127.0.0.1", "localhost:80:80", False),
        ("127.0.0.1", "localhost/", False),
        ("127.0.0.1", "localhost:port", False),
        ("192.168.1.7", "192.168.1.7:80", True),
        ("192.168.1.7", "192.168.1.8:80", False),
        ("0.0.0.0", "192.168.1.8:80", True),
        ("::", "[fe80::1]:80", True),
        ("0.0.0.0", "elsewhere.example", False),
        ("gpu-box", "GPU-box:80", True),
        ("127.0.0.1", "extra.example", True),
        ("127.0.0.1", "[::7]:1", True),
    ],
)
def test_names_that_are_ours_are_answered_to(bound: str, host: str, allowed: bool) -> None:
    assert Hosts(bound, ("Extra.example", "::7")).allow(host) is allowed


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "gpu-box", ""])
def test_other_machines_are_not_served_without_a_key(host: str) -> None:
    with pytest.raises(UsageError, match="Give one with --api-key"):
        create_app(FakeService(), ServerOptions(host=host))


@pytest.mark.parametrize("key", ["", " ", "two words", "schlüssel", "line\nbreak", "x" * 1025])
def test_a_key_that_no_header_carries_is_refused(key: str) -> None:
    with pytest.raises(UsageError, match="printable ASCII"):
        create_app(FakeService(), ServerOptions(api_key=key))


@pytest.mark.parametrize(
    "name", ["a.example:8443", "*", "*.example", "http://a.example", "", "a b"]
)
def test_a_name_that_no_host_header_is_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="but must be a name or an address alone"):
        create_app(FakeService(), ServerOptions(allow_hosts=("fine.example", "[::7]", "::7", name)))
