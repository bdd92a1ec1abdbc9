"""What tests of pulls share: a small checkpoint's names, and pulling it from a fake hub."""

from pathlib import Path
from typing import Any

from lowmoe.loader.hub import HubRepository, RetryPolicy
from tests.loader.fake_hub import (
    FakeHub,
)

SHARD = "model-00001-of-00002.safetensors"
OTHER_SHARD = "model-00002-of-00002.safetensors"
MEGABYTE = 1_000_000
# In place of the library's 10 MiB, which a test's whole shard fits in: what a cut may lose.
CHUNK_BYTES = 250_000


class Sleeps(list[float]):
    """A clock nobody has to wait for: the waits it was asked for."""

    def policy(self, **changes: Any) -> RetryPolicy:
        return RetryPolicy(sleep=self.append, **changes)


def pull(hub: FakeHub, folder: Path, **options: Any) -> HubRepository:
    options.setdefault("retry", Sleeps().policy())
    return HubRepository(hub.repo_id, folder=folder, endpoint=hub.endpoint, **options)


def content(hub: FakeHub, name: str, branch: str = "main") -> bytes:
    return hub.commits[hub.branches[branch]][name]
