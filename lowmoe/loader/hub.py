"""Fetches one commit of a Hugging Face repository, file by file, each verified.

Knows:        which file is needed next, free disk, verifying, resuming, tidying up.
Ignorant of:  HTTP, which tensors a shard holds, quantization, how progress is shown.

The work folder while a pull is under way:

    pull.json          repository, commit, every file with its length and hash, the shards released
    config.json, ...   small files and shards, whole and verified: no other file bears its own name
    pull.lock          held while a file is being written
    NAME.part          a file on its way, growing at its end; the next run goes on behind that end
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from lowmoe.errors import DiskSpaceError, DownloadError
from lowmoe.loader.hub_client import HubClient, RetryPolicy
from lowmoe.loader.hub_record import (
    GO_ON,
    INDEX_NAME,
    RECORD_NAME,
    HubFile,
    PullRecord,
    disk_faults,
    keep_indexed,
    read_listing,
)

__all__ = ["DownloadProgress", "HubFile", "HubRepository", "RetryPolicy"]

LOCK_NAME = "pull.lock"
PATIENT = RetryPolicy()


@dataclass(frozen=True, slots=True, kw_only=True)
class DownloadProgress:
    """How far one file is, and how far the whole pull; a released shard counts as done.

    Up to one chunk of the library's (10 MiB) may be counted that is not on the disk yet.
    """

    file: str
    file_bytes_done: int
    file_bytes: int
    bytes_done: int
    bytes_total: int


class HubRepository:
    """One commit of a hub repository, its files fetched one by one into a work folder.

    The commit is looked up once and written to `pull.json`; a later pull into the same folder
    keeps it, so a branch that moves in between cannot mix two models. `files` holds the small
    files and exactly the shards that the repository's index names (all, if there is no index); of a
    repository without safetensors one GGUF file, or all its parts, which `choice` names.

    Raises UnknownModelError (no such repository), CheckpointError (neither safetensors nor GGUF, or
    an index that contradicts the file list), DownloadError (everything else the hub or the line
    did; also a folder that belongs to another pull), DiskSpaceError.
    """

    repo_id: str
    commit: str
    files: tuple[HubFile, ...]
    choice: str | None

    def __init__(
        self,
        repo_id: str,
        *,
        folder: Path,
        kind: str | None = None,
        endpoint: str | None = None,
        progress: Callable[[DownloadProgress], None] | None = None,
        retry: RetryPolicy = PATIENT,
    ) -> None:
        """kind: of GGUF file, even where there are safetensors; endpoint: the hub's address,
        HF_ENDPOINT if None.
        """
        self._folder = folder
        self._progress = progress
        self._verified: set[str] = set()
        self._client = HubClient(repo_id, endpoint=endpoint, retry=retry)
        record = PullRecord.read(folder)
        if record is None:
            record = _begin(self._client, folder, kind)
        else:
            record.require_same_pull(repo_id, folder)
        self._record = record
        self.repo_id, self.commit, self.files = repo_id, record.commit, record.files
        self.choice = record.choice

    def total_bytes(self) -> int:
        """Bytes of all weight files together."""
        return sum(self.shard_bytes().values())

    def shard_bytes(self) -> dict[str, int]:
        """Bytes of each weight file by its name."""
        return {file.name: file.bytes for file in self.files if file.is_shard}

    def shard_bytes_here(self) -> int:
        """Bytes of weight files, whole or begun, that lie in the work folder."""
        shards = [file for file in self.files if file.is_shard]
        paths = [path for file in shards for path in self._paths(file)]
        return sum(path.stat().st_size for path in paths if path.is_file())

    def fetch_small(self) -> Path:
        """Fetch everything but the weights; returns the folder that holds it."""
        for file in self.files:
            if not file.is_shard:
                self.fetch(file.name)
        return self._folder

    def fetch(self, name: str) -> Path:
        """Return the file whole and verified, downloading or resuming as needed.

        Raises DownloadError for a name the repository does not list, for a hub that cannot be
        reached or refuses, for content that is not what the hub's list promises; DiskSpaceError.
        """
        file = self._file(name)
        path = self._folder / name
        on_bytes = self._reporter(file)
        if name not in self._verified or not path.is_file():
            with disk_faults(path):
                if not path.is_file() or file.hash_of(path) != file.expected_hash:
                    _download(self._client, self.commit, file, self._folder, on_bytes)
            self._verified.add(name)
        on_bytes(file.bytes)
        return path

    def fetch_beginning(self, name: str, n_bytes: int) -> Path:
        """Return where a file's first bytes lie, at least so many; nothing has verified them yet.

        The fetch of the whole file goes on behind them.  Raises as `fetch`.
        """
        file = self._file(name)
        part, wanted = _part_path(self._folder, file), min(n_bytes, file.bytes)
        if (self._folder / name).is_file():
            return self._folder / name

        written = 0

        def until_enough(n_came: int) -> None:
            nonlocal written
            if written >= wanted:  # the chunk that just came is not on the disk yet
                raise _Enough
            written = n_came

        with disk_faults(part), _sole_writer(self._folder):
            part.touch()
            if part.stat().st_size < wanted:
                _require_room(self._folder, file, n_bytes=wanted)
                with suppress(_Enough):
                    self._client.fetch_rest(part, file, commit=self.commit, on_bytes=until_enough)
        return part

    def release(self, name: str) -> None:
        """Delete a shard, whole or begun; once more does no harm."""
        self._delete(self._file(name))
        self._verified.discard(name)
        if name not in self._record.released:
            self._record = replace(self._record, released=self._record.released | {name})
            self._record.write(self._folder)

    def forget(self) -> None:
        """Delete all that this pull put into the folder, and the folder if it is empty then.

        For the end of a pull: a later one looks the commit up anew.
        """
        for file in self.files:
            self._delete(file)
        with disk_faults(self._folder):
            (self._folder / LOCK_NAME).unlink(missing_ok=True)
            # Last, so that a run killed in between still knows which files were the pull's.
            (self._folder / RECORD_NAME).unlink(missing_ok=True)
        with suppress(OSError):  # it holds something of the caller's
            self._folder.rmdir()

    def _delete(self, file: HubFile) -> None:
        for path in self._paths(file):
            with disk_faults(path):
                path.unlink(missing_ok=True)

    def _paths(self, file: HubFile) -> tuple[Path, Path]:
        return _part_path(self._folder, file), self._folder / file.name

    def _file(self, name: str) -> HubFile:
        for file in self.files:
            if file.name == name:
                return file
        raise DownloadError(
            f"{self.repo_id} at commit {self.commit[:12]} lists no file {name!r} to fetch; "
            f"it lists {len(self.files)} that can be. The repository may be incomplete."
        )

    def _reporter(self, file: HubFile) -> Callable[[int], None]:
        done = (self._record.released | self._verified) - {file.name}
        done_bytes = sum(other.bytes for other in self.files if other.name in done)
        total_bytes = sum(other.bytes for other in self.files)

        def report(n_bytes: int) -> None:
            if self._progress is not None:
                self._progress(
                    DownloadProgress(
                        file=file.name,
                        file_bytes_done=n_bytes,
                        file_bytes=file.bytes,
                        bytes_done=done_bytes + n_bytes,
                        bytes_total=total_bytes,
                    )
                )

        return report


class _Enough(Exception):
    """As much of a file is here as was wanted."""


def _begin(client: HubClient, folder: Path, kind: str | None) -> PullRecord:
    """Pin the commit and write down what the pull consists of."""
    commit, files, choice = read_listing(client.describe(), client.repo_id, kind)
    with disk_faults(folder):
        folder.mkdir(parents=True, exist_ok=True)
    index = next((file for file in files if file.name == INDEX_NAME), None)
    if index is not None:
        with disk_faults(folder / INDEX_NAME):
            path = _download(client, commit, index, folder, lambda _n_bytes: None)
        files = keep_indexed(files, path, client.repo_id)
    client.require_short_enough(files)  # only now: shards beside the index may be of any length
    record = PullRecord(
        repo_id=client.repo_id, commit=commit, files=files, released=frozenset(), choice=choice
    )
    record.write(folder)
    return record


def _download(
    client: HubClient, commit: str, file: HubFile, folder: Path, on_bytes: Callable[[int], None]
) -> Path:
    """Fetch what is missing of one file, verify all of it, and only then give it its name."""
    part, found = _part_path(folder, file), ""
    # A wrong hash may stem from a damaged beginning of an earlier run, so once more from byte 0.
    for _ in range(2):
        with _sole_writer(folder):
            part.touch()
            if part.stat().st_size > file.bytes:
                part.write_bytes(b"")
            _require_room(folder, file, n_bytes=file.bytes - part.stat().st_size)
            client.fetch_rest(part, file, commit=commit, on_bytes=on_bytes)
            found = file.hash_of(part)
            if found == file.expected_hash:
                os.replace(part, folder / file.name)
                return folder / file.name
            part.unlink()
    raise DownloadError(
        f"{file.name}: all {file.bytes:,} bytes arrived, but their {file.hash_kind} is {found}, "
        f"expected {file.expected_hash}, twice in a row. The file was deleted; a proxy, the disk "
        "or the memory may be at fault. Run the same command again."
    )


def _part_path(folder: Path, file: HubFile) -> Path:
    return folder / f"{file.name}.part"


def _require_room(folder: Path, file: HubFile, *, n_bytes: int) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < n_bytes:
        raise DiskSpaceError(
            f"{file.name} needs {n_bytes:,} more bytes in {folder}, free are {free_bytes:,}. "
            f"Make room. {GO_ON}"
        )


@contextmanager
def _sole_writer(folder: Path) -> Iterator[None]:
    """Two processes that append to one file would leave a mixture of both."""
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

    with ExitStack() as stack:
        try:
            # Who holds it does so for minutes; the tenth outlasts one that is just leaving.
            stack.enter_context(WeakFileLock(folder / LOCK_NAME, timeout=0.1))
        except TimeoutError:
            raise DownloadError(
                f"another process is downloading into {folder} ({LOCK_NAME} is held), one at a "
                "time can. Wait for it or end it."
            ) from None
        yield
