"""Is what every run begins with read before it is asked for, and nothing said of what is wrong?"""

import errno
import os
import sys
from pathlib import Path

import pytest

from benchmarks.peers.turns import drop_from_page_cache
from lowmoe.checkpoint import files
from lowmoe.checkpoint.file_names import DENSE_FILE
from lowmoe.library import early_reads as module
from lowmoe.library.early_reads import begin_early_reads
from lowmoe.library.names import models_home
from lowmoe.settings import Settings
from tests.talking_mixtral import copy_of

BYTES = 3 * 2**20 + 5


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(BYTES))
    return path


def is_cached(path: Path, offset: int) -> bool:
    """Whether a byte can be read without waiting for the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
    except BlockingIOError:
        return False
    except OSError as e:
        if e.errno != errno.EOPNOTSUPP:
            raise
        pytest.skip("this file system does not say whether it waits")
    finally:
        os.close(descriptor)


def finish(model: object, settings: Settings) -> int:
    """Read to the end; how many threads there were."""
    threads = begin_early_reads(str(model), settings)
    for thread in threads:
        thread.join()
    return len(threads)


@pytest.mark.skipif(sys.platform != "linux", reason="nowhere else is anything read ahead")
def test_the_kernel_has_what_was_taken_into_its_cache(file: Path) -> None:
    drop_from_page_cache([file])
    if is_cached(file, BYTES - 1):
        pytest.skip("this file system keeps files in memory anyway")

    files.take_into_page_cache(file, 0, BYTES)

    assert is_cached(file, 0)
    assert is_cached(file, BYTES // 2)
    assert is_cached(file, BYTES - 1)


def test_a_file_that_ends_early_or_is_missing_is_nobodys_fault_yet(
    file: Path, tmp_path: Path
) -> None:
    files.take_into_page_cache(file, 2**20, 2**30)
    files.take_into_page_cache(tmp_path / "missing", 0, 1)


def test_every_byte_of_the_dense_weights_is_read_once(
    model_folder: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[tuple[Path, int, int]] = []
    monkeypatch.setattr(module, "take_into_page_cache", lambda *piece: taken.append(piece))
    monkeypatch.setattr(module, "PIECE_BYTES", 1000)

    assert finish(model_folder, settings) == module.N_READERS

    path, end = model_folder / DENSE_FILE, 0
    for of, offset, n_bytes in sorted(taken):
        assert (of, offset) == (path, end)
        end += n_bytes
    assert end == path.stat().st_size


def test_no_more_is_read_than_half_of_the_free_memory_holds(
    model_folder: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    monkeypatch.setattr(module, "take_into_page_cache", lambda _, __, n: taken.append(n))
    monkeypatch.setattr(module, "available_ram_bytes", lambda: 3000)

    finish(model_folder, settings)

    assert sum(taken) == 1500


def test_a_model_of_the_home_is_read_by_its_name(settings: Settings, model_folder: Path) -> None:
    copy_of(model_folder, models_home(settings) / "owner--model")
    assert finish("owner/model", settings) > 0


@pytest.mark.parametrize("model", ["owner/not-pulled", "no such name", "/no/such/folder", "x.gguf"])
def test_what_there_is_no_folder_of_is_left_to_whoever_loads_it(
    model: str, settings: Settings
) -> None:
    assert finish(model, settings) == 0


def test_a_folder_without_dense_weights_is_left_to_whoever_loads_it(
    model_folder: Path, settings: Settings, tmp_path: Path
) -> None:
    folder = copy_of(model_folder, tmp_path / "damaged")
    (folder / DENSE_FILE).unlink()
    assert finish(folder, settings) == 0
