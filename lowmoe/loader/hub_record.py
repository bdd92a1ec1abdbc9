"""What a pull consists of: the hub's file list, checked, and its record in the work folder.

Knows:        names, lengths and hashes of files, which of them are wanted, pull.json.
Ignorant of:  the network, how a file gets here, which tensors a shard holds.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lowmoe.checkpoint.files import MAX_SMALL_BYTES
from lowmoe.errors import CheckpointError, DiskSpaceError, DownloadError
from lowmoe.families.tokenizer_files import SENTENCEPIECE, TIKTOKEN_FILES
from lowmoe.loader.gguf_choice import SUFFIX as GGUF_SUFFIX
from lowmoe.loader.gguf_choice import choose_gguf

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo, RepoSibling

RECORD_NAME = "pull.json"
RECORD_FORMAT = 1
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
        SENTENCEPIECE,
        *TIKTOKEN_FILES,
    }
)
# What a repository without safetensors may hold instead; only named in the message.
FOREIGN_WEIGHTS = frozenset({".bin", ".h5", ".msgpack", ".onnx", ".pt", ".pth"})
GO_ON = "Run the same command again: it goes on where it stopped."

_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,199}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHA1 = re.compile(r"[0-9a-f]{40}")  # a commit's name too
_JAX_PICKLE = re.compile(r"(?:.*/)?tensor\d{5}_\d{3}")  # as xai-org published Grok-1
_READ_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class HubFile:
    """A file as the hub lists it; at least one of the two hashes is there.

    sha256 is the content's, known for files in large-file storage. git_sha1 is git's name of the
    content (SHA-1 behind a short header), the only hash the hub gives for the others. folder: of
    the repository that it lies in, "" for none; it is one file by its name here.

    Raises DownloadError for a name that could reach outside the folder, an absurd length or hash.
    """

    name: str
    bytes: int
    sha256: str | None
    git_sha1: str | None
    folder: str = ""

    def __post_init__(self) -> None:
        name, folders = self.path, str(self.folder).split("/") if self.folder else []
        if not all(map(_is_plain, [self.name, *folders])):
            raise DownloadError(
                f"a file is named {name!r}, expected letters, digits and . _ + - only. "
                "Such a name could reach outside the folder; this repository is refused."
            )
        if type(self.bytes) is not int or self.bytes < 0:
            raise DownloadError(f"{name}: its length is {self.bytes!r}, expected a whole number.")
        for found, form in ((self.sha256, _SHA256), (self.git_sha1, _SHA1)):
            if found is not None and not (isinstance(found, str) and form.fullmatch(found)):
                raise DownloadError(f"{name}: its hash is {found!r}, expected hex digits.")
        if self.expected_hash is None:
            raise DownloadError(f"{name}: the hub gives no hash, nothing could verify a download.")

    @property
    def is_shard(self) -> bool:
        return self.name.endswith((SHARD_SUFFIX, GGUF_SUFFIX))

    @property
    def path(self) -> str:
        """In the repository."""
        return f"{self.folder}/{self.name}" if self.folder else self.name

    @property
    def hash_kind(self) -> str:
        return "git SHA-1" if self.sha256 is None else "SHA-256"

    @property
    def expected_hash(self) -> str | None:
        return self.sha256 or self.git_sha1

    def hash_of(self, path: Path) -> str:
        """The hash that `expected_hash` is of, taken of the file at path."""
        # Source: git's object format, "blob", a space, the decimal length, a zero byte, content.
        git = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
        digest = git if self.sha256 is None else hashlib.sha256()
        with path.open("rb") as handle:
            for block in iter(lambda: handle.read(_READ_BYTES), b""):
                digest.update(block)
        return digest.hexdigest()


def _is_plain(name: object) -> bool:
    return isinstance(name, str) and bool(_PLAIN_NAME.fullmatch(name)) and ".." not in name


@dataclass(frozen=True, slots=True, kw_only=True)
class PullRecord:
    """The content of pull.json: which commit, every file of it, the shards already released.

    choice: which GGUF file these are of, and why, for the user; None for safetensors.
    """

    repo_id: str
    commit: str
    files: tuple[HubFile, ...]
    released: frozenset[str]
    choice: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.repo_id, str):
            raise ValueError("repo_id must be text")
        if not _SHA1.fullmatch(self.commit):
            raise ValueError(f"commit {self.commit!r}, expected 40 hex digits")
        if not any(file.is_shard for file in self.files):
            raise ValueError("no shard in files")

    @classmethod
    def read(cls, folder: Path) -> PullRecord | None:
        """The record of an earlier run, None if there was none; DownloadError if it is damaged."""
        path = folder / RECORD_NAME
        try:
            raw = json.loads(path.read_bytes())
            if (found := raw.pop("format")) != RECORD_FORMAT:
                raise ValueError(f"format {found!r}, expected {RECORD_FORMAT}")
            files = tuple(HubFile(**file) for file in raw.pop("files"))
            return cls(files=files, released=frozenset(raw.pop("released")), **raw)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise DownloadError(f"cannot read {path}: {error.strerror}.") from None
        except (
            ValueError,
            LookupError,
            TypeError,
            AttributeError,
            RecursionError,
            DownloadError,
        ) as e:
            # Looking the commit up anew could mix two commits, so this is not repaired.
            raise DownloadError(
                f"{path} is damaged ({e}), so the commit begun is not known. "
                f"Delete {folder} and run the command again."
            ) from None

    def write(self, folder: Path) -> None:
        """Replace pull.json in one step: a killed writer leaves the old one or the new one."""
        raw = {"format": RECORD_FORMAT} | asdict(self) | {"released": sorted(self.released)}
        new = folder / f"{RECORD_NAME}.new"
        with disk_faults(new):
            with new.open("w", encoding="utf-8") as handle:
                json.dump(raw, handle, indent=1)
                handle.flush()
                os.fsync(handle.fileno())
            os.replace(new, folder / RECORD_NAME)

    def require_same_pull(self, repo_id: str, folder: Path) -> None:
        if self.repo_id != repo_id:
            raise DownloadError(
                f"{folder} holds an unfinished pull of {self.repo_id} (commit {self.commit[:12]}), "
                f"asked for is {repo_id}. Finish that one first, or delete the folder."
            )


def read_listing(
    info: ModelInfo, repo_id: str, kind: str | None
) -> tuple[str, tuple[HubFile, ...], str | None]:
    """The commit, the wanted files, each checked, and which GGUF file they are, if they are.

    kind: of that file, None for any and only where there are no safetensors.  Raises DownloadError,
    CheckpointError, UnknownModelError.
    """
    if not isinstance(info.sha, str) or not _SHA1.fullmatch(info.sha):
        raise DownloadError(
            f"{repo_id}: the hub names commit {info.sha!r}, expected 40 hex digits. "
            "Check HF_ENDPOINT."
        )
    siblings = info.siblings or []
    files = [_listed(sibling, "") for sibling in siblings if _is_wanted(sibling.rfilename)]
    said = None
    if kind is not None or not any(file.is_shard for file in files):
        files, said = _gguf_files(siblings, repo_id, kind)
    repeated = [name for name, n in Counter(file.name for file in files).items() if n > 1]
    if repeated:
        raise DownloadError(f"{repo_id}: the hub lists {repeated[0]} twice. Check HF_ENDPOINT.")
    for file in files:
        if not file.is_shard and file.bytes > MAX_SMALL_BYTES:  # it is read whole
            raise DownloadError(
                f"{repo_id}: {file.name} has {file.bytes:,} bytes, expected at most "
                f"{MAX_SMALL_BYTES:,} of a file that holds no weights. Name another repository."
            )
    return info.sha, tuple(files), said


def _gguf_files(
    siblings: Sequence[RepoSibling], repo_id: str, kind: str | None
) -> tuple[list[HubFile], str]:
    """One quantization's, which hold all that a model needs."""
    listed = {
        sibling.rfilename: sibling
        for sibling in siblings
        if isinstance(sibling.rfilename, str) and type(sibling.size) is int
    }
    sizes = {name: sibling.size or 0 for name, sibling in listed.items()}
    choice = choose_gguf(repo_id, sizes, kind)
    if choice is None:
        raise CheckpointError(_no_shards_message(repo_id, [s.rfilename for s in siblings]))
    files = [_listed(listed[name], name.rpartition("/")[0]) for name in choice.names]
    parts = f" and {len(files) - 1} more" if len(files) > 1 else ""
    return files, f"{choice.names[0]}{parts}: {choice.why}"


def _listed(sibling: RepoSibling, folder: str) -> HubFile:
    name = sibling.rfilename
    return HubFile(
        name=name[len(folder) + 1 :] if folder else name,
        folder=folder,
        bytes=sibling.size,  # type: ignore[arg-type]  # HubFile refuses None
        sha256=sibling.lfs.sha256 if sibling.lfs else None,
        # For a file in large-file storage git only names the pointer to it.
        git_sha1=None if sibling.lfs else sibling.blob_id,
    )


def _is_wanted(name: str) -> bool:
    last = re.split(r"[/\\]", str(name))[-1]
    if last not in SMALL_NAMES and not last.endswith(SHARD_SUFFIX) and isinstance(name, str):
        return False
    # A proper sub-folder holds the same model in another format (gpt-oss: original/). A name
    # that climbs out of the folder is no sub-folder: it stays wanted, and is refused by name.
    folders = str(name).split("/")[:-1]
    return not folders or "\\" in name or any(part in ("", ".", "..") for part in folders)


def _no_shards_message(repo_id: str, names: list[str]) -> str:
    suffixes = Counter(Path(name).suffix.lower() for name in names)
    found = [f"{n} {suffix}" for suffix, n in sorted(suffixes.items()) if suffix in FOREIGN_WEIGHTS]
    if n_pickles := sum(_JAX_PICKLE.fullmatch(name) is not None for name in names):
        found.append(f"{n_pickles} pickles of JAX")
    return (
        f"{repo_id} holds no {SHARD_SUFFIX} and no {GGUF_SUFFIX} files (weights found: "
        f"{', '.join(found) or 'none'}). Only these are read, as pickles can run code. Name a "
        "repository that holds this model in one of them."
    )


def keep_indexed(files: tuple[HubFile, ...], index: Path, repo_id: str) -> tuple[HubFile, ...]:
    """Drop the shards that the index does not name (Mistral's consolidated.safetensors)."""
    try:
        raw = json.loads(index.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{repo_id}: {INDEX_NAME} is not JSON ({error}).") from None
    weight_map = raw.get("weight_map") if isinstance(raw, dict) else None
    named = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not named or not all(isinstance(n, str) and n.endswith(SHARD_SUFFIX) for n in named):
        raise CheckpointError(
            f"{repo_id}: {INDEX_NAME} has no usable weight_map, expected tensor names with the "
            f"{SHARD_SUFFIX} file of each."
        )
    missing = sorted(set(named) - {file.name for file in files})
    if missing:
        raise CheckpointError(
            f"{repo_id}: {INDEX_NAME} needs {missing[0]!r}, which the repository does not hold "
            f"({len(missing)} of {len(set(named))} shards missing). The upload is incomplete."
        )
    return tuple(file for file in files if not file.is_shard or file.name in named)


@contextmanager
def disk_faults(path: Path) -> Iterator[None]:
    """Turn what the disk did into DiskSpaceError or DownloadError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskSpaceError(
                f"the disk ran full while {path} was written. Make room. {GO_ON}"
            ) from None
        raise DownloadError(f"cannot write or delete {path}: {error.strerror}.") from None
