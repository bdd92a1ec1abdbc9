"""manifest.json: what a model folder holds, and the hash of every byte that will be used.

Knows:        the manifest's fields, their JSON, its own checksum.
Ignorant of:  how spans are read or made.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from lowmoe.checkpoint import files
from lowmoe.checkpoint.file_names import MANIFEST
from lowmoe.checkpoint.layout import Place, Recipe
from lowmoe.checkpoint.popularity import POPULARITY
from lowmoe.errors import FolderError
from quant.trellis import TrellisCode

KIND = "lowmoe model folder"
VERSION = 1
MAX_MANIFEST_BYTES = 256 * 2**20


def content_hash(data: bytes | memoryview) -> str:
    """XXH3-128 in hexadecimal: outruns any disk, catches damage, no defence against forgery."""
    return xxhash.xxh3_128_hexdigest(data)


@dataclass(frozen=True, slots=True)
class Span:
    """A run of bytes that is read at once, and their hash."""

    place: Place
    hash: str


@dataclass(frozen=True, slots=True)
class SmallFile:
    """A file copied as it came."""

    n_bytes: int
    hash: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What was run through the model to set every d.  text_hash: of the text file."""

    n_tokens: int
    text_hash: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where the weights came from: a hub repository and commit, or a folder's name.

    sample: Checkpoint.sample_hash() of a folder, which has no commit to tell it from another; the
    conversion takes it.
    """

    name: str
    commit: str | None
    sample: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Everything a reader needs to know before it touches the other files."""

    config: Mapping[str, Any]
    source: Source
    recipe: Recipe
    calibration: Calibration | None
    small_files: Mapping[str, SmallFile]
    spans: Mapping[str, Span]

    def identity(self) -> dict[str, Any]:
        """Everything that decides the bytes of the spans, as it stands in the file."""
        return {
            "kind": KIND,
            "version": VERSION,
            "source": asdict(self.source),
            "config": self.config,
            "recipe": asdict(self.recipe),
            "calibration": None if self.calibration is None else asdict(self.calibration),
            # What is found out on the way decides nothing.
            "small_files": self._files(but=POPULARITY),
        }

    def _files(self, *, but: str = "") -> dict[str, Any]:
        files = sorted(self.small_files.items())
        return {name: asdict(f) for name, f in files if name != but}

    def to_json(self) -> bytes:
        """The file's content; the same manifest always gives the same bytes."""
        spans = {
            name: [s.place.file, s.place.offset, s.place.n_bytes, s.hash]
            for name, s in self.spans.items()
        }
        values = {**self.identity(), "small_files": self._files(), "spans": spans}
        values["checksum"] = _checksum(values)
        return json.dumps(values, indent=1).encode() + b"\n"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder.  Raises FolderError if it is missing, damaged or too new."""
    path = folder / MANIFEST
    if not path.is_file():
        raise FolderError(
            f"{folder}: has no {MANIFEST}, so it is no finished model folder. If a conversion was "
            "interrupted, run the same command again: it goes on where it stopped."
        )
    try:
        values = json.loads(files.read_all(path, limit=MAX_MANIFEST_BYTES))
    except (ValueError, RecursionError) as e:
        raise FolderError(f"{path}: not JSON ({e}). The file is damaged; make it again.") from e
    if not isinstance(values, dict) or values.get("kind") != KIND:
        raise FolderError(f"{path}: not the manifest of a {KIND}.")
    if values.get("version") != VERSION:
        raise FolderError(
            f"{path}: format version {values.get('version')!r}, but this lowmoe reads version "
            f"{VERSION}. A newer lowmoe made it: pip install --upgrade lowmoe."
        )
    if values.pop("checksum", None) != _checksum(values):
        raise FolderError(f"{path}: its checksum does not match. The file was damaged or edited.")
    return _from_values(values, path)


def _from_values(values: Mapping[str, Any], path: Path) -> Manifest:
    try:
        _check_places(values)
        recipe = dict(values["recipe"])
        recipe.pop("code")
        calibration = values["calibration"]
        return Manifest(
            config=values["config"],
            source=Source(**values["source"]),
            recipe=Recipe(**recipe, code=_code(values["recipe"]["code"])),
            calibration=None if calibration is None else Calibration(**calibration),
            small_files={n: SmallFile(**f) for n, f in values["small_files"].items()},
            spans={
                name: Span(Place(file, offset, n_bytes), digest)
                for name, (file, offset, n_bytes, digest) in values["spans"].items()
            },
        )
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise FolderError(
            f"{path}: a field is missing or malformed ({e}). Make the model again."
        ) from e


def _code(values: Mapping[str, Any]) -> TrellisCode:
    """A code from JSON, which knows no tuples."""
    fields: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in values.items()}
    return TrellisCode(**fields)


def _check_places(values: Mapping[str, Any]) -> None:
    """Nothing outside the folder is ever opened, nothing read at a place that cannot be."""
    for name in [*values["small_files"], *{span[0] for span in values["spans"].values()}]:
        if Path(name).name != name or not name:
            raise ValueError(f"{name!r} is not a plain file name")
    for name, (_, offset, n_bytes, _) in values["spans"].items():
        if not all(type(n) is int and n >= 0 for n in (offset, n_bytes)):
            raise ValueError(f"{name} is {n_bytes!r} bytes at {offset!r}")


def _checksum(values: Mapping[str, Any]) -> str:
    return content_hash(json.dumps(values, sort_keys=True, separators=(",", ":")).encode())
