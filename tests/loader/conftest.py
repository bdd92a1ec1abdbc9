from collections.abc import Iterator

import huggingface_hub
import pytest
import torch

from tests.loader.fake_hub import FakeHub, tiny_checkpoint
from tests.loader.hub_pulls import CHUNK_BYTES, MEGABYTE


@pytest.fixture(scope="package", autouse=True)
def one_torch_thread() -> Iterator[None]:
    """Tiny operations split between threads wait longer for each other than they compute."""
    found = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(found)


@pytest.fixture
def library_sleeps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits the library's own loop asked for; nobody has to sit through them."""
    waits: list[float] = []
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", waits.append)
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", CHUNK_BYTES)
    return waits


@pytest.fixture
def fresh_client(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # The library keeps one client per process, with its connections and its view of the proxy.
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    huggingface_hub.close_session()
    yield
    huggingface_hub.close_session()


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub() as hub:
        hub.add_commit(tiny_checkpoint())
        yield hub


@pytest.fixture
def big_hub() -> Iterator[FakeHub]:
    with FakeHub() as hub:
        hub.add_commit(tiny_checkpoint(shard_bytes=6 * MEGABYTE))
        yield hub
