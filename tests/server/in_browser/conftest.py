"""Headless Chromium, axe-core, and pages of servers that say what a test told them.

Needs the extra `browser`, `chromium` on the path, and for axe-core npm; the command is in
CONTRIBUTING.md.
"""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from lowmoe.server.app import ServerOptions
from tests.server.fake_service import FakeService, Script, saying
from tests.server.fake_watch import FakeWatch
from tests.server.in_browser.npm import file_of
from tests.server.in_browser.visit import DESKTOP, Open, Visit
from tests.server.serving import serving

AXE = "axe-core@4.14.1"


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    from playwright import sync_api

    program = shutil.which("chromium")
    assert program, "no chromium on the path. Install it, with apt-get install chromium."
    with sync_api.sync_playwright() as playwright:
        # Without a sandbox of its own, which root may not make: what runs here is the page alone.
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    return file_of(AXE, "package/axe.min.js", tmp_path_factory.mktemp("npm")).decode()


@pytest.fixture
def visit(chromium: Any) -> Iterator[Open]:
    """Opens the page of a server with these scripts."""
    with ExitStack() as closing:

        def opened(
            *scripts: Script,
            size: tuple[int, int] = DESKTOP,
            options: ServerOptions | None = None,
            watch: FakeWatch | None = None,
            **of_context: Any,
        ) -> Visit:
            service = FakeService(scripts or [saying("Hello", " world")])
            watch = watch or FakeWatch()
            address = closing.enter_context(serving(service, options, watch=watch))
            viewport = {"width": size[0], "height": size[1]}
            context = chromium.new_context(viewport=viewport, **of_context)
            closing.callback(context.close)
            context.set_default_timeout(10_000)
            visit = Visit(context.new_page(), service, address)
            visit.page.goto(address)
            return visit

        yield opened
