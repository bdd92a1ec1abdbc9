"""`lowmoe serve` as people start it: a process, the demo model, a free port."""

from collections.abc import Iterator

import pytest

from benchmarks.server.process import Served, served


@pytest.fixture(scope="session")
def server() -> Iterator[Served]:
    """The demo model's."""
    with served("demo", "--threads", "1", "--sequences", "4") as server:
        yield server
