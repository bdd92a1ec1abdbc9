"""The page of a real server with the demo model, and what it is vendored from."""

import base64
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from lowmoe.server.page_routes import PAGE
from tests.server.fake_service import FakeService
from tests.server.in_browser.npm import packed_by_npm
from tests.server.in_browser.visit import Visit

pytestmark = pytest.mark.browser


def test_the_demo_model_answers_in_a_browser(chromium: Any, tmp_path: Path) -> None:
    environment = {**os.environ, "LOWMOE_HOME": str(tmp_path)}
    command = [
        sys.executable,
        "-c",
        "from lowmoe.cli.app import main; main()",
        "serve",
        "--port",
        "0",
        "--gpu",
        "none",
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as server:
        try:
            assert server.stdout is not None
            address = next(w for w in server.stdout.readline().split() if w.startswith("http://"))
            context = chromium.new_context()
            context.set_default_timeout(20_000)
            v = Visit(context.new_page(), FakeService(), address.rstrip(":,"))
            v.page.goto(v.address)
            v.say("Once upon a time")
            v.wait_for_end()
            assert len(v.answers()[0]) > 20
            v.page.locator(".headline strong", has_text=re.compile("[0-9]")).wait_for()
            assert "64" in v.page.locator(".legend").inner_text()
            assert not v.complaints
            context.close()
        finally:
            server.send_signal(signal.SIGINT)
            assert server.wait(20) in (0, 130)


def test_vendored_files_are_in_the_tarballs_that_were_published(tmp_path: Path) -> None:
    for library in json.loads((PAGE / "vendor/vendored.json").read_text("utf-8")):
        tarball = packed_by_npm(f"{library['name']}@{library['version']}", tmp_path)
        digest = base64.b64encode(hashlib.sha512(tarball.read_bytes()).digest()).decode()
        assert f"sha512-{digest}" == library["integrity"]
        with tarfile.open(tarball) as packed:
            for name, told in library["files"].items():
                member = packed.extractfile(told["in_tarball"])
                assert member is not None
                assert member.read() == (PAGE / "vendor" / name).read_bytes()
