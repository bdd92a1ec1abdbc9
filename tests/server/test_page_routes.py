"""The page's files are what they are, and come from the package alone; its data needs the key."""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import httpx2
import numpy as np
import pytest

from lowmoe.server.app import ServerOptions
from lowmoe.server.page_routes import PAGE, files
from tests.server.fake_service import FakeService
from tests.server.fake_watch import ABOUT, RATES, FakeWatch
from tests.server.serving import serving

KEY = "a-key"
OWN = sorted(path for path in PAGE.iterdir() if path.suffix in (".js", ".css", ".html", ".svg"))


@pytest.fixture(scope="module")
def client() -> Iterator[httpx2.Client]:
    options = ServerOptions(api_key=KEY)
    with (
        serving(FakeService(), options, watch=FakeWatch()) as address,
        httpx2.Client(base_url=address, timeout=10) as client,
    ):
        yield client


def test_every_file_is_served_as_it_is_with_its_type(client: httpx2.Client) -> None:
    for path, file in files().items():
        answer = client.get(path)
        assert answer.status_code == 200
        assert answer.content == file.read_bytes()
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert client.get("/").headers["content-type"] == "text/html; charset=utf-8"
    assert client.get("/page/main.js").headers["content-type"] == "text/javascript; charset=utf-8"
    assert client.head("/").content == b""


def test_a_file_that_is_known_is_not_sent_again(client: httpx2.Client) -> None:
    tag = client.get("/page/style.css").headers["etag"]
    again = client.get("/page/style.css", headers={"if-none-match": tag})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize(
    "path",
    [
        "/page/../app.py",
        "/page/%2e%2e/app.py",
        "/page/..%2fapp.py",
        "/page//etc/passwd",
        "/page/vendor/",
        "/page/",
        "/page/vendor/..%5c..%5capp.py",
        "/app.py",
    ],
)
def test_nothing_else_of_the_disk_is_served(client: httpx2.Client, path: str) -> None:
    # As it stands: httpx would take ".." out of a path.
    answer = client.send(client.build_request("GET", "/", extensions={"target": path.encode()}))
    assert answer.status_code in (401, 404)


def test_everything_that_the_page_names_is_there() -> None:
    named = {
        name for path in OWN for name in re.findall(r'"(/page/[\w./-]+)"', path.read_text("utf-8"))
    }
    assert "/page/vendor/marked.mjs" in named
    assert named <= files().keys()


@pytest.mark.parametrize("path", OWN, ids=lambda path: path.name)
def test_nothing_comes_from_elsewhere_and_no_string_becomes_code(path: Path) -> None:
    source = path.read_text("utf-8").replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"\b(?:https?|wss?)://", source)
    assert not re.search(r"(?:from|import)\s*\(?\s*\"(?!/page/)", source)
    forbidden = r"(?i)innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function"
    assert not re.search(forbidden, source)
    if path.suffix == ".html":
        assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]* src=\"/page/)", source)


def test_the_page_may_load_nothing_from_elsewhere_and_no_markup_but_through_the_cleaner(
    client: httpx2.Client,
) -> None:
    policy = client.get("/").headers["content-security-policy"].split("; ")
    assert "default-src 'self'" in policy
    assert "require-trusted-types-for 'script'" in policy
    assert "trusted-types dompurify" in policy
    assert not [rule for rule in policy if "unsafe" in rule or rule.startswith("script-src")]


@pytest.mark.parametrize("path", ["/lowmoe/machine", "/lowmoe/live"])
def test_what_the_machine_does_is_told_to_who_has_the_key(client: httpx2.Client, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 401
    assert "key" in answer.json()["error"]["message"]


def test_a_machine_is_told_as_it_is(client: httpx2.Client) -> None:
    answer = client.get("/lowmoe/machine", headers={"x-api-key": KEY})
    told = answer.json()
    assert told["layers"] == list(ABOUT.layers)
    assert told["model"] == ABOUT.model
    assert told["tiers"] == ["gpu", "ram", "disk"]


def test_frames_begin_with_the_whole_and_go_on_with_what_changed(client: httpx2.Client) -> None:
    frames = []
    with client.stream("GET", "/lowmoe/live", headers={"x-api-key": KEY}) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        for line in stream.iter_lines():
            if line.startswith("data: "):
                frames.append(json.loads(line.removeprefix("data: ")))
            if len(frames) == 3:
                break
    first, *others = frames
    assert first["whole"]
    np.testing.assert_array_equal(_unpacked(first["moved"]["at"], "<u4"), np.arange(12))
    np.testing.assert_array_equal(_unpacked(first["moved"]["to"], "u1"), np.arange(12) % 3)
    assert first["rates"]["tokens_per_s"] == RATES.tokens_per_s
    for frame in others:
        assert not frame["whole"]
        assert _unpacked(frame["moved"]["at"], "<u4").size == 0
        # Two experts of each of the three layers that have some, once each.
        assert _unpacked(frame["used"]["at"], "<u4").size == 6
        np.testing.assert_array_equal(_unpacked(frame["used"]["times"], "<u4"), np.ones(6))


def _unpacked(text: str, kind: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), kind)


# --- what others wrote


def test_vendored_files_are_the_ones_that_were_published() -> None:
    vendor = PAGE / "vendor"
    libraries = json.loads((vendor / "vendored.json").read_text("utf-8"))
    known = {"vendored.json"}
    for library in libraries:
        for name, told in library["files"].items():
            assert hashlib.sha256((vendor / name).read_bytes()).hexdigest() == told["sha256"]
            known.add(name)
        assert f"{library['name']}.LICENSE" in library["files"]
        assert library["license"] in ("MIT", "Apache-2.0", "(MPL-2.0 OR Apache-2.0)")
    assert {path.name for path in vendor.iterdir()} == known
