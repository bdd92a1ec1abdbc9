"""Two hundred thousand mutations of a safetensors file, the same in every run: read or refused, as
the safetensors library does, within the file's own memory.
"""

import random
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from lowmoe.checkpoint.safetensors_file import SafetensorsFile
from lowmoe.errors import LowMoeError
from tests.checkpoint.mutations import mutated_bytes
from tests.live_bytes import LiveBytes

VALID = save(
    {
        "a": torch.arange(6, dtype=torch.float32).view(2, 3),
        "b": torch.ones(3).bfloat16(),
        "c.weight": torch.arange(40, dtype=torch.uint8),
    },
    metadata={"format": "pt"},
)
# 8 s of one core, of which asking the library and watching memory are the smaller half.
N_MUTATIONS = 200_000
ASKED_EVERY, WATCHED_EVERY = 20, 100
# What Python itself keeps of a file this small: names, tables, the text of an error.
OVERHEAD = 2**16


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.safetensors"


def read(path: Path) -> dict[str, Tensor] | None:
    """None for what is refused; anything but an error of ours is a crash."""
    try:
        file = SafetensorsFile.open(path)
        return {name: file.read(name) for name in file.tensors}
    except LowMoeError:
        return None


def in_library(data: bytes) -> dict[str, Tensor] | None:
    try:
        return load(data)
    except (SafetensorError, ValueError, KeyError, AttributeError):
        return None


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def peak_bytes(path: Path) -> int:
    """The most memory that reading took at once, Python's, and torch's beside it."""
    tracemalloc.start()
    try:
        with LiveBytes() as live:
            read(path)
        return tracemalloc.get_traced_memory()[1] + live.peak
    finally:
        tracemalloc.stop()


def test_no_mutation_crashes_hangs_or_takes_memory_the_file_does_not_have(path: Path) -> None:
    choose, n_read = random.Random(7), 0
    path.write_bytes(VALID)
    peak_bytes(path)  # what watching itself imports
    with path.open("wb") as file:
        for number in range(N_MUTATIONS):
            data = mutated_bytes(VALID, choose)
            # Not a new file each time: some file systems put those on the disk at once.
            file.seek(0)
            file.write(data)
            file.truncate()
            file.flush()
            found = read(path)
            n_read += found is not None
            if found is not None and number % ASKED_EVERY == 0:
                wanted = in_library(data)
                assert wanted is not None
                assert {n: raw(t) for n, t in found.items()} == {
                    n: raw(t) for n, t in wanted.items()
                }
            if number % WATCHED_EVERY == 0:
                assert peak_bytes(path) < 2 * len(data) + OVERHEAD
    # Both happen often, so that both are tested.
    assert N_MUTATIONS / 20 < n_read < N_MUTATIONS * 19 / 20, n_read
