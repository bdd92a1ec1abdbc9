"""Are faults of the disk errors of ours, and what is no fault none?"""

import errno
import mmap
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lowmoe.checkpoint import files
from lowmoe.checkpoint.folder import ModelFolder
from lowmoe.errors import DiskSpaceError, FolderError
from tests.checkpoint.faulty_os import FaultyOs
from tests.checkpoint.tiny_mixtral import contents, convert

EXPERT = "experts-plane0-00001.safetensors"


def page_aligned(n_bytes: int) -> Tensor:
    return torch.frombuffer(mmap.mmap(-1, n_bytes), dtype=torch.uint8)


def read_everything(folder: Path) -> dict[str, bytes]:
    """Every span, experts as the store reads them."""
    read = {}
    with ModelFolder(folder) as model:
        for name, span in model.manifest.spans.items():
            parts = name.split(".")
            if span.place.file.startswith("experts-"):
                buffer = page_aligned(span.place.n_bytes)
                model.read_expert(int(parts[1]), int(parts[3]), [parts[4]], [buffer])
            else:
                buffer = model.read(name)
            read[name] = buffer.numpy().tobytes()
    return read


def failing_after(n_reads: int, code: int) -> Callable[[int], int]:
    remaining = [n_reads]

    def at_most(wanted: int) -> int:
        remaining[0] -= 1
        if remaining[0] < 0:
            raise OSError(code, os.strerror(code))
        return wanted

    return at_most


# Reading


@pytest.mark.parametrize("n_bytes", [1, 7, 512])
def test_short_reads_change_nothing(
    model: Path, monkeypatch: pytest.MonkeyPatch, n_bytes: int
) -> None:
    wanted = read_everything(model)
    # A read past the page cache is short by whole sectors at most.
    is_direct = getattr(os, "O_DIRECT", 0) if n_bytes == 512 else 0
    system = FaultyOs(at_most=lambda wanted: min(n_bytes, wanted))
    monkeypatch.setattr(system, "O_DIRECT", is_direct, raising=False)
    monkeypatch.setattr(files, "os", system)
    assert read_everything(model) == wanted


def test_a_read_error_names_the_file_the_place_and_the_cause(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ModelFolder(model) as folder:
        monkeypatch.setattr(files, "os", FaultyOs(at_most=failing_after(0, errno.EIO)))
        with pytest.raises(FolderError, match=r"dense\.safetensors: reading 256 bytes at \d+ gave"):
            folder.read("final_norm")


@pytest.mark.parametrize("n_reads", range(0, 50, 7))
def test_any_read_may_fail_and_the_error_is_ours(
    model: Path, monkeypatch: pytest.MonkeyPatch, n_reads: int
) -> None:
    monkeypatch.setattr(files, "os", FaultyOs(at_most=failing_after(n_reads, errno.EIO)))
    with pytest.raises(FolderError, match=r"reading .* gave Input/output error"):
        read_everything(model)


def test_a_file_that_is_cut_while_it_is_read_is_an_error(model: Path) -> None:
    with ModelFolder(model) as folder:
        os.truncate(model / EXPERT, 8192)
        with pytest.raises(FolderError, match=rf"{EXPERT}: 8192 bytes, but \d+ are needed"):
            folder.read_expert(1, 3, ["plane0"], [page_aligned(8192)])


def test_a_file_that_is_removed_while_it_is_in_use_is_an_error(model: Path) -> None:
    with ModelFolder(model) as folder:
        (model / EXPERT).unlink()
        (model / "dense.safetensors").unlink()
        with pytest.raises(FolderError, match=rf"{EXPERT}: missing"):
            folder.read_expert(0, 0, ["plane0"], [page_aligned(8192)])
        with pytest.raises(FolderError, match=r"dense\.safetensors: missing"):
            folder.read("final_norm")


def test_a_file_that_may_not_be_read_is_an_error(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: Path, flags: int, mode: int = 0) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(FaultyOs, "open", lambda self, *args: refused(*args))
    with ModelFolder(model) as folder:
        monkeypatch.setattr(files, "os", FaultyOs())
        with pytest.raises(FolderError, match=r"dense\.safetensors: opening it gave Permission"):
            folder.read("final_norm")


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="no O_DIRECT on this system")
@pytest.mark.parametrize("refused_at", ["open", "read"])
def test_a_disk_without_direct_reads_is_read_through_the_cache(
    model: Path, monkeypatch: pytest.MonkeyPatch, refused_at: str
) -> None:
    wanted, direct, refusals = read_everything(model), set(), []

    def refuse() -> None:
        refusals.append(refused_at)
        raise OSError(errno.EINVAL, "Invalid argument")

    class NoDirect(FaultyOs):
        def open(self, path: Path, flags: int, mode: int = 0o777) -> int:
            if flags & os.O_DIRECT and refused_at == "open":
                refuse()
            descriptor = os.open(path, flags & ~os.O_DIRECT, mode)
            if flags & os.O_DIRECT:
                direct.add(descriptor)
            return descriptor

        def preadv(self, descriptor: int, buffers: list[memoryview], offset: int) -> int:
            if descriptor in direct:
                refuse()
            return os.preadv(descriptor, buffers, offset)

        def close(self, descriptor: int) -> None:
            direct.discard(descriptor)
            os.close(descriptor)

    monkeypatch.setattr(files, "os", NoDirect())
    assert read_everything(model) == wanted
    assert len(refusals) == 2  # once for each file of experts
    with ModelFolder(model) as folder:
        folder.read_expert(0, 0, ["plane0"], [page_aligned(8192)])
        assert folder.direct() is False


# Writing


def failing_call(number: int, code: int) -> Callable[[int, str], None]:
    def before_call(call: int, name: str) -> None:
        if call >= number:
            raise OSError(code, os.strerror(code))

    return before_call


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_disk_that_fails_at_any_call_is_an_error_and_can_be_gone_on_with(
    tiny_checkpoint: Path,
    converted: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
) -> None:
    is_full = code in (errno.ENOSPC, errno.EDQUOT)
    wanted = (
        (DiskSpaceError, "found the disk full") if is_full else (FolderError, "gave Input/output")
    )
    counting = FaultyOs()
    monkeypatch.setattr(files, "os", counting)
    convert(tiny_checkpoint, tmp_path / "counted")
    # Steps of 5 and 11 meet every kind of call.
    for call in range(1, len(counting.calls) + 1, 5 if code == errno.ENOSPC else 11):
        folder = tmp_path / str(call)
        monkeypatch.setattr(files, "os", FaultyOs(before_call=failing_call(call, code)))
        with pytest.raises(wanted[0], match=f"{tmp_path}.*{wanted[1]}.*run the same command again"):
            convert(tiny_checkpoint, folder)
        monkeypatch.setattr(files, "os", FaultyOs())
        convert(tiny_checkpoint, folder)
        assert contents(folder) == converted, call


def test_writes_that_take_only_a_part_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow(FaultyOs):
        def _changing(self, name: str, *args: object) -> object:
            if name in ("pwrite", "write"):
                descriptor, data, *offset = args
                return getattr(os, name)(descriptor, data[:3], *offset)  # type: ignore[index]
            return super()._changing(name, *args)

    monkeypatch.setattr(files, "os", Slow())
    files.append(tmp_path / "journal", b"a line of text\n")
    files.append(tmp_path / "journal", b"and another\n")
    files.write_whole(tmp_path / "whole", bytes(range(100)))
    assert (tmp_path / "journal").read_bytes() == b"a line of text\nand another\n"
    assert (tmp_path / "whole").read_bytes() == bytes(range(100))


def test_a_disk_too_small_is_said_before_anything_is_written(
    tiny_checkpoint: Path,
    converted: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(files, "free_bytes", lambda path: 1_000_000)
    spans = sum(len(data) for name, data in converted.items() if name.endswith(".safetensors"))
    # Two states of 48 tokens x 64 float32, and 64 MiB for all that is small.
    needed = spans + 2 * 48 * 64 * 4 + 64 * 2**20
    lacking = needed - 1_000_000
    with pytest.raises(
        DiskSpaceError,
        match=rf"needs {needed} bytes of free disk, but 1000000 are free. Free {lacking} bytes",
    ):
        convert(tiny_checkpoint, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_going_on_needs_no_room_for_what_is_there(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "os", FaultyOs(before_call=failing_call(40, errno.EIO)))
    with pytest.raises(FolderError, match="gave"):
        convert(tiny_checkpoint, tmp_path / "model")
    monkeypatch.setattr(files, "os", os)
    # All files were reserved by then.
    monkeypatch.setattr(files, "free_bytes", lambda path: 2 * 48 * 64 * 4 + 64 * 2**20)
    convert(tiny_checkpoint, tmp_path / "model")


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(FolderError, match="file/model: making the folder gave"):
        files.make_folder(tmp_path / "file" / "model")
