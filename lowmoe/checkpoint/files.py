"""Every call to the operating system that touches a model's files.

Tests put faults under it (short reads, EIO, a full disk, a kill at every write) by replacing this
module's `os`. Reads are pread into buffers of ours, never mmap: a file cut short while we run must
be an error, not a SIGBUS.

Knows:        descriptors, offsets, fsync, O_DIRECT.
Ignorant of:  what is in the files.
"""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from lowmoe.errors import DiskSpaceError, FolderError

ALIGNMENT = 4096  # bytes; what O_DIRECT asks of offsets, lengths and addresses on every common disk
_ASIDE = ".tmp"


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
                f"{path}: ends at byte {offset + done}, but {offset + len(buffer)} are needed. "
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


def size_of(descriptor: int) -> int:
    """The length of an open file in bytes."""
    return os.fstat(descriptor).st_size


@contextlib.contextmanager
def opened(path: Path) -> Iterator[int]:
    """A descriptor for reading."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def open_direct(path: Path) -> tuple[int, bool]:
    """A descriptor for reading, past the page cache where the file system allows it.

    Returns (descriptor, whether it is direct); a direct one takes only aligned reads.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC
    direct = getattr(os, "O_DIRECT", 0)  # Linux only
    if direct:
        try:
            return os.open(path, flags | direct), True
        except OSError as e:
            if e.errno != errno.EINVAL:
                raise
    return os.open(path, flags), False


def close(descriptor: int) -> None:
    """Give a descriptor back."""
    os.close(descriptor)


def reserve(path: Path, size: int) -> int:
    """A descriptor for reading and writing a file of exactly `size` bytes, disk space taken.

    A file of that size that is there already keeps its content.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        if os.fstat(descriptor).st_size > size:
            os.ftruncate(descriptor, size)
        if size:
            _allocate(descriptor, size)
    except OSError as e:
        os.close(descriptor)
        raise _write_error(e, path, size) from e
    return descriptor


def _allocate(descriptor: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:  # macOS, Windows
        os.ftruncate(descriptor, size)


def write_at(descriptor: int, data: memoryview, offset: int, path: Path) -> None:
    """Write all of data at offset."""
    done = 0
    while done < len(data):
        try:
            done += os.pwrite(descriptor, data[done:], offset + done)
        except OSError as e:
            raise _write_error(e, path, len(data)) from e


def append(path: Path, data: bytes) -> None:
    """Add data at the end of a file, and have it on the disk before returning."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    try:
        done = 0
        while done < len(data):
            done += os.write(descriptor, data[done:])
        os.fsync(descriptor)
    except OSError as e:
        raise _write_error(e, path, len(data)) from e
    finally:
        os.close(descriptor)


def truncate(path: Path, size: int) -> None:
    """Cut a file down to its first `size` bytes, on the disk before returning."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.ftruncate(descriptor, size)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync(descriptor: int) -> None:
    """Have a file's content on the disk before returning."""
    os.fsync(descriptor)


def sync_folder(path: Path) -> None:
    """Have a folder's names on the disk before returning."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that after any crash it is there whole, or as it was before."""
    aside = path.with_name(path.name + _ASIDE)
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        write_at(descriptor, memoryview(data), 0, aside)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(aside, path)
    sync_folder(path.parent)


def remove(path: Path) -> None:
    """Remove a file if it is there."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed write_whole left beside its files."""
    for path in folder.glob("*" + _ASIDE):
        remove(path)


def make_folder(path: Path) -> None:
    """Make a folder and its parents."""
    os.makedirs(path, exist_ok=True)


def free_bytes(path: Path) -> int:
    """Bytes free for us on the disk that holds path or its nearest parent that exists."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def _write_error(e: OSError, path: Path, size: int) -> DiskSpaceError | FolderError:
    if e.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskSpaceError(
            f"{path}: the disk is full ({size} bytes to write). Free some space and run the same "
            "command again: it goes on where it stopped."
        )
    return FolderError(f"{path}: writing {size} bytes gave {e.strerror or e}.")
