from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.checkpoint.tiny_mixtral import contents, convert, write_tiny_mixtral


@pytest.fixture(scope="package", autouse=True)
def one_torch_thread() -> Iterator[None]:
    """Tiny operations split between threads wait longer for each other than they compute."""
    found = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(found)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder that nobody writes to."""
    folder = tmp_path_factory.mktemp("checkpoint")
    write_tiny_mixtral(folder)
    return folder


@pytest.fixture(scope="session")
def converted(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Names and bytes of the model folder it becomes."""
    folder = tmp_path_factory.mktemp("converted") / "model"
    convert(tiny_checkpoint, folder)
    return contents(folder)


@pytest.fixture
def model(converted: dict[str, bytes], tmp_path: Path) -> Path:
    """A finished model folder of the test's own."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name, data in converted.items():
        (folder / name).write_bytes(data)
    return folder
