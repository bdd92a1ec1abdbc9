"""Fetches one commit of a Hugging Face repository, file by file, each verified.

Knows:        the hub's file list and downloads, hashes, resuming, when another try is worthwhile.
Ignorant of:  which tensors a shard holds, quantization, how progress is shown.

The work folder while a pull is under way:

    pull.json          repository, commit, every file with its length and hash, the shards released
    config.json, ...   small files and shards, whole and verified: no other file bears its own name
    pull.lock          held while a file is being written
    NAME.part          a file on its way, growing at its end; the next run goes on behind that end

`huggingface_hub` supplies the address, the token, the proxy and the HTTP client. Its own download
loop is not used: it loses up to 10 MiB at every cut, sleeps where a test cannot reach, checks no
hash and only warns when the disk is too small.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from lowmoe.errors import (
    CheckpointError,
    DiskSpaceError,
    DownloadError,
    LowMoeError,
    UnknownModelError,
)

if TYPE_CHECKING:
    import httpx2
    from huggingface_hub.hf_api import ModelInfo

RECORD_NAME = "pull.json"
RECORD_FORMAT = 1
LOCK_NAME = "pull.lock"
INDEX_NAME = "model.safetensors.index.json"
SHARD_SUFFIX = ".safetensors"
SMALL_NAMES = frozenset(
    {
        INDEX_NAME,
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
)
# What a repository without safetensors may hold instead; only named in the message.
FOREIGN_WEIGHTS = frozenset({".bin", ".gguf", ".h5", ".msgpack", ".onnx", ".pt", ".pth"})
DEFAULT_REVISION = "main"
GO_ON = "Run the same command again: it goes on where it stopped."

_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,199}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHA1 = re.compile(r"[0-9a-f]{40}")
_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-\d{1,18}/(\d{1,18}|\*)")
_RATE_LIMIT = re.compile(r";\s*r=0\s*;\s*t=(\d{1,9})")
_SECONDS = re.compile(r"\d{1,9}")
_READ_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class HubFile:
    """A file as the hub lists it; at least one of the two hashes is there.

    sha256 is the content's, known for files in large-file storage. git_sha1 is git's name of the
    content (SHA-1 behind a short header), the only hash the hub gives for the others.
    """

    name: str
    bytes: int
    sha256: str | None
    git_sha1: str | None

    @property
    def is_shard(self) -> bool:
        return self.name.endswith(SHARD_SUFFIX)

    @property
    def expected_hash(self) -> str:
        return self.sha256 or self.git_sha1 or ""

    def new_hash(self) -> hashlib._Hash:
        """An empty hash, to be fed the content; its hexdigest is then `expected_hash`."""
        if self.sha256 is not None:
            return hashlib.sha256()
        # Source: git's object format, "blob", a space, the decimal length, a zero byte, content.
        return hashlib.sha1(b"blob %d\0" % self.bytes, usedforsecurity=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class DownloadProgress:
    """How far one file is, and how far the whole pull; a released shard counts as done."""

    file: str
    file_bytes_done: int
    file_bytes: int
    bytes_done: int
    bytes_total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How often a fault that may pass is met with another try, and how long to wait before it.

    The count starts anew whenever a file has grown. With these defaults a silent line is given up
    after 1 + 2 + 4 + ... + 60 = 123 s: a home router restarts in about two minutes.
    """

    tries: int = 8
    first_wait_s: float = 1.0
    longest_wait_s: float = 60.0
    longest_retry_after_s: float = 600.0  # a hub that asks for more is taken at its word: give up
    sleep: Callable[[float], None] = time.sleep

    def outwait(self, fault: _PassingFault, *, n_faults: int) -> bool:
        """Wait before the next try, or say False at once: the tries are used up.

        n_faults: faults in a row, this one included.
        """
        if n_faults >= self.tries or fault.retry_after_s > self.longest_retry_after_s:
            return False
        doubled_s = min(self.first_wait_s * 2 ** (n_faults - 1), self.longest_wait_s)
        self.sleep(max(doubled_s, fault.retry_after_s))
        return True


PATIENT = RetryPolicy()


class HubRepository:
    """One commit of a hub repository, its files fetched one by one into a work folder.

    The commit is looked up once and written to `pull.json`; a later pull into the same folder
    keeps it, so a branch that moves in between cannot mix two models. `files` holds the small
    files and exactly the shards that the repository's index names (all, if there is no index).

    Raises UnknownModelError (no such repository or revision), CheckpointError (no safetensors, or
    an index that contradicts the file list), DownloadError (everything else the hub or the line
    did; also a folder that belongs to another pull), DiskSpaceError.
    """

    repo_id: str
    commit: str
    files: tuple[HubFile, ...]

    def __init__(
        self,
        repo_id: str,
        *,
        folder: Path,
        revision: str | None = None,
        endpoint: str | None = None,
        progress: Callable[[DownloadProgress], None] | None = None,
        retry: RetryPolicy = PATIENT,
    ) -> None:
        """endpoint: the hub's address, HF_ENDPOINT if None."""
        self._folder = folder
        self._progress = progress
        self._verified: set[str] = set()
        self._hub = _Hub(repo_id, endpoint=endpoint, retry=retry)
        record = _PullRecord.read(folder)
        if record is None:
            record = self._begin(revision or DEFAULT_REVISION)
        else:
            record.require_same_pull(repo_id, revision, folder)
        self._record = record
        self.repo_id, self.commit, self.files = repo_id, record.commit, record.files

    def total_bytes(self) -> int:
        """Bytes of all weight files together."""
        return sum(file.bytes for file in self.files if file.is_shard)

    def largest_shard_bytes(self) -> int:
        """Bytes of the largest weight file."""
        return max(file.bytes for file in self.files if file.is_shard)

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
            if not _is_intact(path, file):
                _download(self._hub, self.commit, file, self._folder, on_bytes)
            self._verified.add(name)
        on_bytes(file.bytes)
        return path

    def release(self, name: str) -> None:
        """Delete a shard, whole or begun; once more does no harm."""
        file = self._file(name)
        path = self._folder / name
        with _disk_faults(path):
            _part_path(self._folder, file).unlink(missing_ok=True)
            path.unlink(missing_ok=True)
        self._verified.discard(name)
        if name not in self._record.released:
            self._record = replace(self._record, released=self._record.released | {name})
            self._record.write(self._folder)

    def _begin(self, revision: str) -> _PullRecord:
        commit, files = _read_listing(self._hub.describe(revision), self._hub.repo_id)
        with _disk_faults(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
        index = next((file for file in files if file.name == INDEX_NAME), None)
        if index is not None:
            path = _download(self._hub, commit, index, self._folder, lambda _n_bytes: None)
            files = _keep_indexed(files, path, self._hub.repo_id)
        record = _PullRecord(
            repo_id=self._hub.repo_id,
            revision=revision,
            commit=commit,
            files=files,
            released=frozenset(),
        )
        record.write(self._folder)
        return record

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


# What the hub lists, and what of it is wanted.


def _read_listing(info: ModelInfo, repo_id: str) -> tuple[str, tuple[HubFile, ...]]:
    """The commit and the wanted files, each checked; raises DownloadError, CheckpointError."""
    if not isinstance(info.sha, str) or not _COMMIT.fullmatch(info.sha):
        raise DownloadError(
            f"{repo_id}: the hub names commit {info.sha!r}, expected 40 hex digits. "
            "Check HF_ENDPOINT."
        )
    siblings = [sibling for sibling in info.siblings or () if _is_wanted(sibling.rfilename)]
    files = tuple(
        _checked_file(
            name=sibling.rfilename,
            n_bytes=sibling.size,
            sha256=sibling.lfs.sha256 if sibling.lfs else None,
            # For a file in large-file storage git only names the pointer to it.
            git_sha1=None if sibling.lfs else sibling.blob_id,
        )
        for sibling in siblings
    )
    repeated = [name for name, n in Counter(file.name for file in files).items() if n > 1]
    if repeated:
        raise DownloadError(f"{repo_id}: the hub lists {repeated[0]} twice. Check HF_ENDPOINT.")
    if not any(file.is_shard for file in files):
        names = [sibling.rfilename for sibling in info.siblings or ()]
        raise CheckpointError(_no_shards_message(repo_id, names))
    return info.sha, files


def _is_wanted(name: str) -> bool:
    if not isinstance(name, str):
        raise DownloadError(
            f"the hub lists a file named {name!r}, expected text. Check HF_ENDPOINT."
        )
    last = re.split(r"[/\\]", name)[-1]
    if last not in SMALL_NAMES and not last.endswith(SHARD_SUFFIX):
        return False
    # A proper sub-folder holds the same model in another format (gpt-oss: original/). A name
    # that climbs out of the folder is no sub-folder: it stays wanted, and is refused by name.
    folders = name.split("/")[:-1]
    return not folders or "\\" in name or any(part in ("", ".", "..") for part in folders)


def _checked_file(*, name: object, n_bytes: object, sha256: object, git_sha1: object) -> HubFile:
    if not isinstance(name, str) or not _PLAIN_NAME.fullmatch(name) or ".." in name:
        raise DownloadError(
            f"a file is named {name!r}, expected letters, digits and . _ + - only. "
            "Such a name could reach outside the folder; this repository is refused."
        )
    if type(n_bytes) is not int or n_bytes < 0:
        raise DownloadError(f"{name}: its length is {n_bytes!r}, expected a number of bytes.")
    for found, form in ((sha256, _SHA256), (git_sha1, _SHA1)):
        if found is not None and not (isinstance(found, str) and form.fullmatch(found)):
            raise DownloadError(f"{name}: its hash is {found!r}, expected hex digits.")
    if sha256 is None and git_sha1 is None:
        raise DownloadError(f"{name}: the hub gives no hash, so nothing could verify a download.")
    assert sha256 is None or isinstance(sha256, str)
    assert git_sha1 is None or isinstance(git_sha1, str)
    return HubFile(name=name, bytes=n_bytes, sha256=sha256, git_sha1=git_sha1)


def _no_shards_message(repo_id: str, names: list[str]) -> str:
    suffixes = Counter(Path(name).suffix.lower() for name in names)
    found = [f"{n} {suffix}" for suffix, n in sorted(suffixes.items()) if suffix in FOREIGN_WEIGHTS]
    return (
        f"{repo_id} holds no {SHARD_SUFFIX} files (weights found: {', '.join(found) or 'none'}). "
        "Only safetensors are read: pickles can run code, GGUF is already quantized. "
        "Name the repository of the original model."
    )


def _keep_indexed(files: tuple[HubFile, ...], index: Path, repo_id: str) -> tuple[HubFile, ...]:
    """Drop the shards that the index does not name (Mistral's consolidated.safetensors)."""
    named = _shards_in_index(index, repo_id)
    missing = sorted(named - {file.name for file in files})
    if missing:
        raise CheckpointError(
            f"{repo_id}: {INDEX_NAME} needs {missing[0]!r}, which the repository does not hold "
            f"({len(missing)} of {len(named)} shards missing). The upload is incomplete."
        )
    return tuple(file for file in files if not file.is_shard or file.name in named)


def _shards_in_index(index: Path, repo_id: str) -> set[str]:
    try:
        raw = json.loads(index.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{repo_id}: {INDEX_NAME} is not JSON ({error}).") from None
    weight_map = raw.get("weight_map") if isinstance(raw, dict) else None
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names or not all(isinstance(n, str) and n.endswith(SHARD_SUFFIX) for n in names):
        raise CheckpointError(
            f"{repo_id}: {INDEX_NAME} has no usable weight_map, expected tensor names with the "
            f"{SHARD_SUFFIX} file of each."
        )
    return set(names)


# What the folder remembers.


@dataclass(frozen=True, slots=True, kw_only=True)
class _PullRecord:
    """The content of pull.json."""

    repo_id: str
    revision: str
    commit: str
    files: tuple[HubFile, ...]
    released: frozenset[str]

    @classmethod
    def read(cls, folder: Path) -> _PullRecord | None:
        """The record of an earlier run, None if there was none; DownloadError if it is damaged."""
        path = folder / RECORD_NAME
        try:
            return cls._parse(json.loads(path.read_bytes()))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise DownloadError(f"cannot read {path}: {error.strerror}.") from None
        except (ValueError, KeyError, TypeError, RecursionError, DownloadError) as error:
            # Looking the commit up anew could mix two commits, so this is not repaired.
            raise DownloadError(
                f"{path} is damaged ({error}), so the commit begun is not known. "
                f"Delete {folder} and run the command again."
            ) from None

    @classmethod
    def _parse(cls, raw: dict[str, object]) -> _PullRecord:
        if raw["format"] != RECORD_FORMAT:
            raise ValueError(f"format {raw['format']!r}, expected {RECORD_FORMAT}")
        files, released = raw["files"], raw["released"]
        if not isinstance(files, list) or not isinstance(released, list):
            raise ValueError("files and released must be lists")
        commit = _text(raw, "commit")
        if not _COMMIT.fullmatch(commit):
            raise ValueError(f"commit {commit!r}, expected 40 hex digits")
        checked = tuple(
            _checked_file(
                name=file["name"],
                n_bytes=file["bytes"],
                sha256=file["sha256"],
                git_sha1=file["git_sha1"],
            )
            for file in files
        )
        if not any(file.is_shard for file in checked):
            raise ValueError("no shard in files")
        return cls(
            repo_id=_text(raw, "repo"),
            revision=_text(raw, "revision"),
            commit=commit,
            files=checked,
            released=frozenset(released),
        )

    def write(self, folder: Path) -> None:
        """Replace pull.json in one step: a killed writer leaves the old one or the new one."""
        raw = {
            "format": RECORD_FORMAT,
            "repo": self.repo_id,
            "revision": self.revision,
            "commit": self.commit,
            "files": [asdict(file) for file in self.files],
            "released": sorted(self.released),
        }
        new = folder / f"{RECORD_NAME}.new"
        with _disk_faults(new):
            with new.open("w", encoding="utf-8") as handle:
                json.dump(raw, handle, indent=1)
                handle.flush()
                os.fsync(handle.fileno())
            os.replace(new, folder / RECORD_NAME)

    def require_same_pull(self, repo_id: str, revision: str | None, folder: Path) -> None:
        if self.repo_id != repo_id or revision not in (None, self.revision, self.commit):
            raise DownloadError(
                f"{folder} holds an unfinished pull of {self.repo_id} {self.revision} "
                f"(commit {self.commit[:12]}), asked for is {repo_id} {revision or ''}".rstrip()
                + ". Finish that one first, or delete the folder."
            )


def _text(raw: dict[str, object], key: str) -> str:
    value = raw[key]
    if not isinstance(value, str):
        raise ValueError(f"{key} is {value!r}, expected text")
    return value


# One file, from the first byte to its own name.


def _download(
    hub: _Hub, commit: str, file: HubFile, folder: Path, on_bytes: Callable[[int], None]
) -> Path:
    found = ""
    # A wrong hash may stem from a damaged beginning of an earlier run, so once more from byte 0.
    for _ in range(2):
        with _sole_writer(folder), _Part(file, folder) as part:
            _require_room(folder, file, n_bytes=file.bytes - part.n_bytes)
            hub.fill(part, commit, on_bytes)
            found = part.hexdigest()
            if found == file.expected_hash:
                return part.keep()
            part.discard()
    kind = "SHA-256" if file.sha256 is not None else "git SHA-1"
    raise DownloadError(
        f"{file.name}: all {file.bytes:,} bytes arrived, but their {kind} is {found}, expected "
        f"{file.expected_hash}, twice in a row. The file was deleted; a proxy, the disk or the "
        "memory may be at fault. Run the same command again."
    )


@contextmanager
def _sole_writer(folder: Path) -> Iterator[None]:
    """Two processes that append to one file would each hash their own half of the mixture."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder / LOCK_NAME)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise DownloadError(
            f"another process is downloading into {folder} ({LOCK_NAME} is held), one at a time "
            "can. Wait for it or end it."
        ) from None
    try:
        yield
    finally:
        lock.release()


def _require_room(folder: Path, file: HubFile, *, n_bytes: int) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < n_bytes:
        raise DiskSpaceError(
            f"{file.name} needs {n_bytes:,} more bytes in {folder}, free are {free_bytes:,}. "
            f"Make room. {GO_ON}"
        )


def _is_intact(path: Path, file: HubFile) -> bool:
    if not path.is_file() or path.stat().st_size != file.bytes:
        return False
    digest = file.new_hash()
    with path.open("rb") as handle:
        for block in _blocks(handle.read):
            digest.update(block)
    return digest.hexdigest() == file.expected_hash


def _blocks(read: Callable[[int], bytes]) -> Iterator[bytes]:
    return iter(lambda: read(_READ_BYTES), b"")


def _part_path(folder: Path, file: HubFile) -> Path:
    return folder / f"{file.name}.part"


class _Part:
    """NAME.part and the hash of what it holds so far; it grows only at its end."""

    def __init__(self, file: HubFile, folder: Path) -> None:
        self.file = file
        self.n_bytes = 0
        self._path = _part_path(folder, file)
        self._own_name = folder / file.name
        self._hash = file.new_hash()

    def __enter__(self) -> _Part:
        with _disk_faults(self._path):
            self._handle = self._path.open("a+b")
            self._handle.seek(0)
            for block in _blocks(self._handle.read):
                self._hash.update(block)
                self.n_bytes += len(block)
                if self.n_bytes > self.file.bytes:
                    break
        if self.n_bytes > self.file.bytes:
            self.restart()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._handle.close()

    def append(self, chunk: bytes) -> None:
        if self.n_bytes + len(chunk) > self.file.bytes:
            self.restart()
            raise _PassingFault(f"more than the {self.file.bytes:,} bytes of the hub's list came")
        with _disk_faults(self._path):
            self._handle.write(chunk)
            # Out of this process with it: what a killed run had received, the next one has.
            self._handle.flush()
        self._hash.update(chunk)
        self.n_bytes += len(chunk)

    def restart(self) -> None:
        self._handle.truncate(0)
        self._hash = self.file.new_hash()
        self.n_bytes = 0

    def hexdigest(self) -> str:
        return self._hash.hexdigest()

    def keep(self) -> Path:
        """Give the file its own name; on the disk first, so that no power cut leaves it hollow."""
        with _disk_faults(self._path):
            os.fsync(self._handle.fileno())
            self._handle.close()
            os.replace(self._path, self._own_name)
        return self._own_name

    def discard(self) -> None:
        self._handle.close()
        self._path.unlink()


@contextmanager
def _disk_faults(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskSpaceError(
                f"the disk ran full while {path} was written. Make room. {GO_ON}"
            ) from None
        raise DownloadError(f"cannot write or delete {path}: {error.strerror}.") from None


# The line to the hub.


class _PassingFault(Exception):
    """Something that another try may not meet again; never leaves this module."""

    def __init__(
        self, reason: str, *, retry_after_s: float = 0.0, no_network: bool = False
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.retry_after_s = retry_after_s
        self.no_network = no_network


class _Hub:
    """The two questions asked: what does the repository hold, and the bytes of a file from N on."""

    def __init__(self, repo_id: str, *, endpoint: str | None, retry: RetryPolicy) -> None:
        # huggingface_hub reads this when it is first imported.
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
        from huggingface_hub import __version__, constants

        self.repo_id = repo_id
        self._endpoint = (endpoint or constants.ENDPOINT).rstrip("/")
        self._timeout_s = constants.HF_HUB_DOWNLOAD_TIMEOUT
        self._user_agent = f"lowmoe; hf_hub/{__version__}"
        self._retry = retry

    def describe(self, revision: str) -> ModelInfo:
        """The repository's commit and file list. No network at all is not waited for."""
        from huggingface_hub import HfApi

        api = HfApi(endpoint=self._endpoint, headers={"user-agent": self._user_agent})
        n_faults = 0
        while True:
            try:
                with self._translated():
                    return api.model_info(
                        self.repo_id,
                        revision=revision,
                        files_metadata=True,
                        timeout=self._timeout_s,
                    )
            except _PassingFault as fault:
                n_faults += 1
                if fault.no_network or not self._retry.outwait(fault, n_faults=n_faults):
                    raise DownloadError(
                        f"{self.repo_id}: {fault.reason}, expected its file list. "
                        "Run the same command again later."
                    ) from None
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                # What the library lets through when the answer is not JSON, or not a model's.
                raise DownloadError(
                    f"{self.repo_id}: {self._endpoint} answered with something that describes no "
                    f"model ({type(error).__name__}: {error}). Check HF_ENDPOINT and the proxy."
                ) from None

    def fill(self, part: _Part, commit: str, on_bytes: Callable[[int], None]) -> None:
        """Append the rest of the file, however often the line breaks, while some of it arrives."""
        furthest, n_faults = part.n_bytes, 0
        while part.n_bytes < part.file.bytes:
            try:
                self._stream(part, commit, on_bytes)
            except _PassingFault as fault:
                n_faults = 1 if part.n_bytes > furthest else n_faults + 1
                furthest = max(furthest, part.n_bytes)
                if not self._retry.outwait(fault, n_faults=n_faults):
                    raise DownloadError(
                        f"{part.file.name}: {part.n_bytes:,} of {part.file.bytes:,} bytes are "
                        f"here, then {fault.reason}. {GO_ON}"
                    ) from None

    def _stream(self, part: _Part, commit: str, on_bytes: Callable[[int], None]) -> None:
        from huggingface_hub import get_session, hf_hub_url

        url = hf_hub_url(self.repo_id, part.file.name, revision=commit, endpoint=self._endpoint)
        headers = self._headers(first_byte=part.n_bytes)
        with (
            self._translated(),
            get_session().stream("GET", url, headers=headers, timeout=self._timeout_s) as response,
        ):
            self._require_rest_of(part, response)
            for chunk in response.iter_raw():
                part.append(chunk)
                on_bytes(part.n_bytes)
        if part.n_bytes < part.file.bytes:
            raise _PassingFault("the answer ended")

    def _headers(self, *, first_byte: int) -> dict[str, str]:
        from huggingface_hub import constants, get_token

        # Compressed on the way, the lengths of body and file would differ.
        headers = {"user-agent": self._user_agent, "accept-encoding": "identity"}
        if first_byte:
            headers["range"] = f"bytes={first_byte}-"
        token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
        return headers if token is None else headers | {"authorization": f"Bearer {token}"}

    def _require_rest_of(self, part: _Part, response: httpx2.Response) -> None:
        """Check, before a byte is kept, that the body is what follows the part's end."""
        total = response.headers.get("content-length", "*")
        if response.status_code == 206:
            found = response.headers.get("content-range", "")
            match = _CONTENT_RANGE.fullmatch(found)
            if match is None or int(match[1]) != part.n_bytes:
                raise _PassingFault(f"{found!r} came where bytes {part.n_bytes}- were asked for")
            total = match[2]
        elif response.status_code != 200:
            raise self._refusal(response)
        if total != "*" and int(total) != part.file.bytes:
            raise _PassingFault(
                f"the hub announced {total} bytes where its list says {part.file.bytes}"
            )
        if response.status_code == 200:
            part.restart()

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Turn what the libraries raise into a _PassingFault or, if it will not pass, our error."""
        import httpx2
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

        try:
            yield
        except HFValidationError:
            raise UnknownModelError(
                f"{self.repo_id!r} cannot be a hub repository, expected a name like owner/model."
            ) from None
        except OfflineModeIsEnabled:
            raise DownloadError(
                f"{self.repo_id}: HF_HUB_OFFLINE forbids the network, and not everything is here "
                "yet. Unset it and run the same command again."
            ) from None
        except HfHubHTTPError as error:
            raise self._refusal(error.response) from None
        except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ProxyError) as error:
            reason = f"no network: {self._endpoint} cannot be reached ({error})"
            raise _PassingFault(reason, no_network=True) from None
        except (
            httpx2.TimeoutException,
            httpx2.NetworkError,
            httpx2.RemoteProtocolError,
        ) as error:
            raise _PassingFault(f"the line broke ({str(error) or type(error).__name__})") from None
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise DownloadError(
                f"{self.repo_id}: {self._endpoint} cannot be used ({error}). Check HF_ENDPOINT, "
                "HF_TOKEN and the proxy settings."
            ) from None

    def _refusal(self, response: httpx2.Response) -> _PassingFault | LowMoeError:
        status = response.status_code
        code = response.headers.get("x-error-code", "")
        if status in (408, 416, 429) or status >= 500 or _is_storage(response):
            wait_s = _retry_after_s(response)
            asked = f" and asked to wait {wait_s:.0f} s" if wait_s else ""
            return _PassingFault(f"the hub answered {status}{asked}", retry_after_s=wait_s)
        if code == "EntryNotFound":
            return DownloadError(
                f"{self.repo_id}: the hub answered {status} for {response.url.path}, a file of its "
                "own list. The repository may have been changed or withdrawn."
            )
        if code == "RevisionNotFound":
            return UnknownModelError(f"{self.repo_id}: the hub knows no such revision ({status}).")
        if code == "RepoNotFound" or status == 404:
            return UnknownModelError(
                f"no repository {self.repo_id} on {self._endpoint} ({status}). Check the spelling; "
                "if it is private, set HF_TOKEN."
            )
        return self._denial(status, response.headers.get("x-error-message", ""))

    def _denial(self, status: int, hub_says: str) -> DownloadError:
        if "Invalid credentials" in hub_says:
            return DownloadError(
                f"{self.repo_id}: the hub does not accept the token ({status}). Make a new one at "
                f"{self._endpoint}/settings/tokens and set HF_TOKEN."
            )
        if status in (401, 403):
            return DownloadError(
                f"{self.repo_id} is gated or private ({status}). Accept its licence at "
                f"{self._endpoint}/{self.repo_id} and set HF_TOKEN to a token that may read it."
            )
        return DownloadError(f"{self.repo_id}: the hub answered {status}, expected 200 or 206.")


def _is_storage(response: httpx2.Response) -> bool:
    """Did a storage server answer? Its signed addresses expire; the next try gets new ones."""
    return any(step.url.netloc != response.url.netloc for step in response.history)


def _retry_after_s(response: httpx2.Response) -> float:
    """The wait that a refusal asks for; 0 if it asks for none, or for a date."""
    # Source: draft-ietf-httpapi-ratelimit-headers: r requests are left, more come in t seconds.
    limit = _RATE_LIMIT.search(response.headers.get("ratelimit", ""))
    found = limit[1] if limit else response.headers.get("retry-after", "").strip()
    return float(found) if _SECONDS.fullmatch(found) else 0.0
