"""Every call to the operating system that touches a model's files.

Tests put faults under it (short reads, EIO, a full disk, a kill at every write) by replacing this
module's `os`. Reads are pread into buffers of ours, never mmap: a file cut short while we run must
be an error, not a SIGBUS.

Knows:        descriptors, offsets, fsync, O_DIRECT.
Ignorant of:  what is in the files.
"""

import contextlib
import errno
import mmap
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from lowmoe.errors import DiskSpaceError, FolderError

ALIGNMENT = 4096  # bytes; what O_DIRECT asks of offsets, lengths and addresses on every common disk
MAX_SMALL_BYTES = 256 * 2**20  # of a checkpoint's files without weights, which are read whole
# Of files on their way to their names; what a kill leaves is removed by this ending, so no file of
# anyone else's may bear it.
_ASIDE = ".lowmoe-aside"


def read_at(descriptor: int, buffer: memoryview, offset: int, path: Path) -> None:
    """Fill buffer from offset on.  Raises FolderError where the file ends too early."""
    done = 0
    while done < len(buffer):
        try:
            count = os.preadv(descriptor, [buffer[done:]], offset + done)
        except OSError as e:
            raise FolderError(
                f"{path}: reading {len(buffer)} bytes at {offset} gave {e.strerror or e}. "
                "The disk may be failing; copy the model elsewhere or make it again."
            ) from e
        if count == 0:
            raise FolderError(
                f"{path}: {size_of(descriptor)} bytes, but {offset + len(buffer)} are needed. "
                "The file was cut short; make or download it again."
            )
        done += count


def read_all(path: Path, *, limit: int) -> bytes:
    """A small file's content.  Raises FolderError above `limit` bytes."""
    with opened(path) as descriptor:
        size = size_of(descriptor)
        if size > limit:
            raise FolderError(f"{path}: {size} bytes, but at most {limit} are expected there.")
        buffer = bytearray(size)
        read_at(descriptor, memoryview(buffer), 0, path)
        return bytes(buffer)


def take_into_page_cache(path: Path, offset: int, n_bytes: int) -> None:
    """Have the kernel read some of a file, so that reading it soon costs no time of the disk.

    Linux only; elsewhere nothing happens. Whatever is wrong is left to whoever reads it then.
    """
    if sys.platform != "linux":
        return
    end = offset + n_bytes
    with (
        contextlib.suppress(OSError, FolderError),
        opened(path) as descriptor,
        open(os.devnull, "wb") as nothing,
    ):
        # To /dev/null the kernel copies nothing. (posix_fadvise reads no more than one window of
        # its read-ahead.)
        while offset < end and (
            count := os.sendfile(nothing.fileno(), descriptor, offset, end - offset)
        ):
            offset += count


def size_of(descriptor: int) -> int:
    """The length of an open file in bytes."""
    return os.fstat(descriptor).st_size


@contextlib.contextmanager
def opened(path: Path) -> Iterator[int]:
    """A descriptor for reading.  Raises FolderError for a file that cannot be opened."""
    descriptor = _open_to_read(path, 0)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _open_to_read(path: Path, flags: int) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)
    except FileNotFoundError as e:
        raise FolderError(f"{path}: missing. Something removed it; make it again.") from e
    except OSError as e:
        raise FolderError(f"{path}: opening it gave {e.strerror or e}.") from e


def open_direct(path: Path) -> tuple[int, bool]:
    """A descriptor for reading, past the page cache where the file system allows it.

    Returns (descriptor, whether it is direct); a direct one takes only aligned reads.
    """
    direct = getattr(os, "O_DIRECT", 0)  # Linux only
    if direct and _can_be_read(path, direct):
        return _open_to_read(path, direct), True
    return _open_to_read(path, 0), False


def _can_be_read(path: Path, direct: int) -> bool:
    """Whether O_DIRECT works there: some file systems refuse it at open, some at the first read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | direct)
        try:
            os.preadv(descriptor, [mmap.mmap(-1, ALIGNMENT)], 0)
        finally:
            os.close(descriptor)
    except OSError as e:
        return e.errno != errno.EINVAL  # whoever reads next hears of any other fault
    return True


def close(descriptor: int) -> None:
    """Give a descriptor back."""
    os.close(descriptor)


def reserve(path: Path, size: int) -> int:
    """A descriptor for reading and writing a file of exactly `size` bytes, disk space taken.

    A file of that size that is there already keeps its content.
    """
    with _faults(path, f"reserving {size} bytes"):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            if os.fstat(descriptor).st_size > size:
                os.ftruncate(descriptor, size)
            if size:
                _allocate(descriptor, size)
        except OSError:
            os.close(descriptor)
            raise
    return descriptor


def _allocate(descriptor: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:  # macOS, Windows
        os.ftruncate(descriptor, size)


def write_at(descriptor: int, data: memoryview, offset: int, path: Path) -> None:
    """Write all of data at offset."""
    done = 0
    with _faults(path, f"writing {len(data)} bytes"):
        while done < len(data):
            done += os.pwrite(descriptor, data[done:], offset + done)


def append(path: Path, data: bytes) -> None:
    """Add data at the end of a file, and have it on the disk before returning."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    with _faults(path, f"writing {len(data)} bytes"), _opened_to_write(path, flags) as descriptor:
        done = 0
        while done < len(data):
            done += os.write(descriptor, data[done:])
        os.fsync(descriptor)


def truncate(path: Path, size: int) -> None:
    """Cut a file down to its first `size` bytes, on the disk before returning."""
    with (
        _faults(path, f"cutting it to {size} bytes"),
        _opened_to_write(path, os.O_WRONLY) as descriptor,
    ):
        os.ftruncate(descriptor, size)
        os.fsync(descriptor)


@contextlib.contextmanager
def _opened_to_write(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o644)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def sync(descriptor: int, path: Path) -> None:
    """Have a file's content on the disk before returning."""
    with _faults(path, "syncing"):
        os.fsync(descriptor)


def sync_folder(path: Path) -> None:
    """Have a folder's names on the disk before returning."""
    with opened(path) as descriptor, _faults(path, "syncing"):
        os.fsync(descriptor)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that after any crash it is there whole, or as it was before."""
    aside = path.with_name(path.name + _ASIDE)
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    with _faults(path, f"writing {len(data)} bytes"):
        with _opened_to_write(aside, flags) as descriptor:
            write_at(descriptor, memoryview(data), 0, path)
            os.fsync(descriptor)
        os.replace(aside, path)
    sync_folder(path.parent)


def remove(path: Path) -> None:
    """Remove a file if it is there."""
    with _faults(path, "removing it"), contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed write_whole left beside its files."""
    for path in folder.glob("*" + _ASIDE):
        remove(path)


def make_folder(path: Path) -> None:
    """Make a folder and its parents, on the disk before returning."""
    new = [folder for folder in (path, *path.parents) if not folder.exists()]
    with _faults(path, "making the folder"):
        os.makedirs(path, exist_ok=True)
    for folder in new:
        sync_folder(folder.parent)


def free_bytes(path: Path) -> int:
    """Bytes free for us on the disk that holds path or its nearest parent that exists."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


@contextlib.contextmanager
def _faults(path: Path, doing: str) -> Iterator[None]:
    """Turn what the operating system says about writing into errors of ours."""
    try:
        yield
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskSpaceError(
                f"{path}: {doing} found the disk full. Free some space and run the same command "
                "again: it goes on where it stopped."
            ) from e
        raise FolderError(
            f"{path}: {doing} gave {e.strerror or e}. Choose a folder that can be written to, or "
            "run the same command again: it goes on where it stopped."
        ) from e
