"""An operating system that fails, or dies, at a call of one's choice.

Put in place of the `os` of lowmoe.checkpoint.files. It counts the calls that change a disk; a Death
names one of them and the moment:

    before, after   the process is killed there, and everything it did is on the disk
    half            the call's first half is on the disk (writes only; others die before they begin)
    lost            nothing that no fsync covers ever reached the disk, neither bytes nor names
    named           likewise for bytes, but every name is there: the classic file of length 0
    mixed           each of those is there or not, by a coin that is seeded with the call's number

The last three are a power cut. Bytes are covered by an fsync of their file, names by one of their
folder. A real fsync would wait for the disk and is left out: what a killed process wrote is in the
kernel, which outlives it.

Knows:        system calls, what each changes, how to take it back.
Ignorant of:  who calls and why.
"""

import os
import random
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MOMENTS = ("before", "after", "half", "lost", "named", "mixed")
POWER_CUTS = ("lost", "named", "mixed")
CHANGING = ("pwrite", "write", "fsync", "replace", "unlink", "ftruncate", "posix_fallocate")


@dataclass(frozen=True, slots=True)
class Death:
    """Where a process dies: at its call-th changing call, counted from 1."""

    call: int
    moment: str


@dataclass(frozen=True, slots=True)
class _Change:
    """Something no fsync covers yet.  cover: (device, inode) of the file or folder to sync."""

    cover: tuple[int, int]
    of_name: bool
    take_back: Callable[[], object]


@dataclass
class FaultyOs:
    """os, but for the calls in CHANGING.

    death: where to die, if anywhere; before_call: told every changing call's number and name before
    it happens, and may raise; at_most: given the bytes that a preadv asks for, says how many it
    shall read, or raises.
    """

    death: Death | None = None
    before_call: Callable[[int, str], None] | None = None
    at_most: Callable[[int], int] | None = None
    calls: list[str] = field(default_factory=list)
    _unsynced: list[_Change] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        if name in CHANGING:
            return lambda *args: self._changing(name, *args)
        return getattr(os, name)

    def open(self, path: Path, flags: int, mode: int = 0o777) -> int:
        """Making a name is a change, but no point to die at: the next call's `before` is."""
        is_new = flags & os.O_CREAT and not os.path.lexists(path)
        descriptor = os.open(path, flags, mode)
        if is_new and self._may_cut_power():
            self._record_name(Path(path), lambda: _unlink(path))
        return descriptor

    def preadv(self, descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if self.at_most is None:
            return os.preadv(descriptor, buffers, offset)
        count = self.at_most(len(buffers[0]))
        return os.preadv(descriptor, [memoryview(buffers[0])[:count]], offset)

    # --- counting and dying

    def _changing(self, name: str, *args: Any) -> Any:
        self.calls.append(name)
        if self.before_call is not None:
            self.before_call(len(self.calls), name)
        moment = self._moment()
        if moment == "half" and name in ("pwrite", "write"):
            descriptor, data, *offset = args
            getattr(os, name)(descriptor, data[: len(data) // 2], *offset)
        if moment not in (None, "after"):
            self._die(moment)
        if self._may_cut_power():
            getattr(self, f"_record_{name}")(*args)
        result = None if name == "fsync" else getattr(os, name)(*args)
        if moment == "after":
            self._die(moment)
        return result

    def _moment(self) -> str | None:
        dies = self.death is not None and self.death.call == len(self.calls)
        return self.death.moment if dies and self.death is not None else None

    def _may_cut_power(self) -> bool:
        return self.death is not None and self.death.moment in POWER_CUTS

    def _die(self, moment: str) -> None:
        coin = random.Random(len(self.calls))
        for change in reversed(self._unsynced):
            is_lost = {
                "lost": True,
                "named": not change.of_name,
                "mixed": coin.random() < 0.5,
            }
            if is_lost[moment]:
                change.take_back()
        os.kill(os.getpid(), signal.SIGKILL)

    # --- what each call changes

    def _record_name(self, path: Path, take_back: Callable[[], object]) -> None:
        self._unsynced.append(_Change(_identity(os.stat(path.parent)), True, take_back))

    def _record_content(self, descriptor: int, take_back: Callable[[int], object]) -> None:
        own = os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR)
        change = _Change(_identity(os.fstat(descriptor)), False, lambda: take_back(own))
        self._unsynced.append(change)

    def _record_pwrite(self, descriptor: int, data: memoryview, offset: int) -> None:
        size = os.fstat(descriptor).st_size
        with open(f"/proc/self/fd/{descriptor}", "rb") as file:
            file.seek(offset)
            old = file.read(len(data))

        def take_back(own: int) -> None:
            os.pwrite(own, old, offset)
            os.ftruncate(own, size)

        self._record_content(descriptor, take_back)

    def _record_write(self, descriptor: int, data: bytes) -> None:
        size = os.fstat(descriptor).st_size  # files are only ever appended to by it
        self._record_content(descriptor, lambda own: os.ftruncate(own, size))

    def _record_ftruncate(self, descriptor: int, size: int) -> None:
        with open(f"/proc/self/fd/{descriptor}", "rb") as file:
            file.seek(size)
            tail = file.read()
        self._record_content(descriptor, lambda own: os.pwrite(own, tail, size))

    def _record_posix_fallocate(self, descriptor: int, offset: int, length: int) -> None:
        size = os.fstat(descriptor).st_size
        self._record_content(descriptor, lambda own: os.ftruncate(own, size))

    def _record_fsync(self, descriptor: int) -> None:
        synced = _identity(os.fstat(descriptor))
        self._unsynced = [change for change in self._unsynced if change.cover != synced]

    def _record_replace(self, source: Path, target: Path) -> None:
        before = Path(target).read_bytes() if os.path.lexists(target) else None

        def take_back() -> None:
            os.rename(target, source)
            if before is not None:
                Path(target).write_bytes(before)

        self._record_name(Path(target), take_back)

    def _record_unlink(self, path: Path) -> None:
        content = Path(path).read_bytes()
        self._record_name(Path(path), lambda: Path(path).write_bytes(content))


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _unlink(path: Path) -> None:
    if os.path.lexists(path):
        os.unlink(path)
