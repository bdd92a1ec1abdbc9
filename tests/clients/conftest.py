"""`lowmoe serve` as people start it: a process, the demo model, a free port."""

import contextlib
import re
import signal
import subprocess
import tempfile
import urllib.request
from collections.abc import Iterator

import pytest

from tests.clients.driven import LOWMOE

_ADDRESS = re.compile(r"answers at (http://[\d.]+:\d+)")


@contextlib.contextmanager
def served(model: str, *options: str) -> Iterator[str]:
    """The address.  It ends as it does for Ctrl-C, and well."""
    command = [*LOWMOE, "serve", model, "--port", "0", "--gpu", "none", "--threads", "1", *options]
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as server,
    ):
        assert server.stdout is not None
        found = next(filter(None, map(_ADDRESS.search, server.stdout)), None)
        if found is None:
            errors.seek(0)
            raise AssertionError(f"it did not start: {errors.read()}")
        try:
            yield found[1]
        finally:
            server.send_signal(signal.SIGINT)
        assert server.wait(30) in (0, 130)


def metric(server: str, name: str) -> float:
    with urllib.request.urlopen(f"{server}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    (found,) = (line for line in lines if line.startswith(f"{name} "))
    return float(found.split()[1])


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """Where the demo model answers."""
    with served("demo", "--sequences", "4") as url:
        yield url
