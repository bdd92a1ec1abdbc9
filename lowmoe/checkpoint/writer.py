"""Makes a model folder so that a kill at any moment loses at most one commit.

The files are reserved whole at the start. Spans are written at their places and synced, then one
line of the journal names them with their hashes; a line that is not whole does not count. The
manifest comes last, written aside and renamed; a folder without it is unfinished. Whoever goes on
skips what the journal holds, and the result is the same to the byte.

Knows:        order of writes and syncs, the journal.
Ignorant of:  what the spans mean or how they were computed.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowmoe.checkpoint import files
from lowmoe.checkpoint.file_names import MANIFEST
from lowmoe.checkpoint.layout import FolderLayout, Place
from lowmoe.checkpoint.manifest import Manifest, SmallFile, Span, content_hash, read_manifest
from lowmoe.errors import DiskSpaceError, FolderError, LowMoeError

JOURNAL = "journal.jsonl"
STATE = "state-{:05}.bin"
MAX_JOURNAL_BYTES = 2**30
# What the file system itself, the manifest and the small files may take beside the spans.
SPARE_BYTES = 64 * 2**20
_ABSENT = object()  # a value that JSON has not


class FolderWriter:
    """Writes spans in any order; use with `with`, which closes the files but finishes nothing."""

    def __init__(
        self,
        folder: Path,
        layout: FolderLayout,
        identity: Mapping[str, Any],
        *,
        state_bytes: int = 0,
    ) -> None:
        """identity: everything that decides the bytes; going on with another is refused.

        state_bytes: the most that save_state will be given.
        """
        self.folder, self.layout = folder, layout
        self.finished = (folder / MANIFEST).is_file()
        self._descriptors: dict[str, int] = {}
        self.hashes: dict[str, str] = {}
        self._state: tuple[int, str] | None = None
        self.notes: dict[int, Any] = {}
        if self.finished:
            self._clean()
            return
        self._check_space(state_bytes)
        files.make_folder(folder)
        files.remove_leftovers(folder)
        self._replay(identity)
        try:
            self._reserve()
        except LowMoeError:
            self.__exit__()
            raise

    def __enter__(self) -> "FolderWriter":
        return self

    def __exit__(self, *exc: object) -> None:
        for descriptor in self._descriptors.values():
            files.close(descriptor)
        self._descriptors.clear()

    def require_same_model(self, wanted: Mapping[str, Any]) -> None:
        """Refuse a finished folder that holds something else.  wanted: Manifest.identity()."""
        found = json.loads(json.dumps(read_manifest(self.folder).identity()))
        self._require_same(found, wanted, "the model")

    def _require_same(self, found: object, wanted: object, what: str) -> None:
        if difference := _difference(found, json.loads(json.dumps(wanted))):
            raise FolderError(
                f"{self.folder}: holds {what} of another checkpoint or with other options: "
                f"{difference} is asked for. Give the same ones again, choose another folder, or "
                "remove this one."
            )

    def _check_space(self, state_bytes: int) -> None:
        present = sum(
            (self.folder / name).stat().st_size
            for name in self.layout.sizes
            if (self.folder / name).is_file()
        )
        # A state is whole on the disk before the one before it goes.
        needed = self.layout.total_bytes - present + 2 * state_bytes + SPARE_BYTES
        free = files.free_bytes(self.folder)
        if free < needed:
            raise DiskSpaceError(
                f"{self.folder}: needs {needed} bytes of free disk, but {free} are free. "
                f"Free {needed - free} bytes more, or choose a folder on another disk."
            )

    def _reserve(self) -> None:
        """Make every file in its full length, with its header."""
        for name, size in self.layout.sizes.items():
            self._descriptors[name] = files.reserve(self.folder / name, size)
        for name, header in self.layout.headers.items():
            files.write_at(self._descriptors[name], memoryview(header), 0, self.folder / name)
            files.sync(self._descriptors[name], self.folder / name)
        files.sync_folder(self.folder)

    # --- the journal

    def _replay(self, identity: Mapping[str, Any]) -> None:
        path = self.folder / JOURNAL
        lines, whole_bytes = _whole_lines(path)
        if path.is_file() and whole_bytes < path.stat().st_size:
            files.truncate(path, whole_bytes)
        if not lines:
            self._journal({"identity": identity})
            return
        self._require_same(lines[0].get("identity"), identity, "an unfinished conversion")
        for line in lines[1:]:
            self.hashes |= line.get("spans", {})
            self._state = tuple(line["state"]) if "state" in line else self._state
            if "note" in line:
                self.notes[line["state"][0]] = line["note"]
        self._check_present()

    def _check_present(self) -> None:
        """Refuse to go on over files that somebody removed or cut: they would be filled with 0."""
        for name in sorted({self.layout.places[span].file for span in self.hashes}):
            path = self.folder / name
            size = path.stat().st_size if path.is_file() else 0
            if size != self.layout.sizes[name]:
                raise FolderError(
                    f"{path}: {size} bytes, but the journal tells of {self.layout.sizes[name]}. "
                    "The file was removed or cut short; remove the folder and start over."
                )

    def _journal(self, line: Mapping[str, Any]) -> None:
        text = json.dumps(line, separators=(",", ":")).encode()
        files.append(self.folder / JOURNAL, content_hash(text).encode() + b" " + text + b"\n")

    # --- spans

    def has(self, *names: str) -> bool:
        """Whether all these spans are on the disk and in the journal."""
        return all(name in self.hashes for name in names)

    def commit(self, spans: Mapping[str, Tensor]) -> None:
        """Write these spans, padded to their places, and record them once they are on the disk."""
        hashes, touched = {}, set()
        for name, tensor in spans.items():
            place = self.layout.places[name]
            data = _padded(tensor, place)
            files.write_at(
                self._descriptors[place.file], data, place.offset, self.folder / place.file
            )
            hashes[name] = content_hash(data)
            touched.add(place.file)
        for file in sorted(touched):
            files.sync(self._descriptors[file], self.folder / file)
        self._journal({"spans": hashes})
        self.hashes |= hashes

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """A committed span, flat; what a resumed run must not compute again."""
        place = self.layout.places[name]
        buffer = torch.empty(place.n_bytes, dtype=torch.uint8)
        data = buffer.numpy().data
        path = self.folder / place.file
        files.read_at(self._descriptors[place.file], data, place.offset, path)
        if content_hash(data) != self.hashes[name]:
            raise FolderError(f"{path}: {name} is not what was written. Remove the folder.")
        return buffer.view(dtype)

    # --- state of a long conversion

    def save_state(self, step: int, data: bytes, note: Any = None) -> None:
        """Keep what is needed to go on from `step`; the state before it is dropped.

        note: JSON of this step, in `notes` until the end, by whichever run it was written.
        """
        files.write_whole(self.folder / STATE.format(step), data)
        self._journal({"state": [step, content_hash(data)], "note": note})
        self.notes[step] = note
        if self._state is not None:
            files.remove(self.folder / STATE.format(self._state[0]))
        self._state = (step, content_hash(data))

    def load_state(self) -> tuple[int, bytes] | None:
        """The last state saved, or None."""
        if self._state is None:
            return None
        step, digest = self._state
        path = self.folder / STATE.format(step)
        data = files.read_all(path, limit=2**40)
        if content_hash(data) != digest:
            raise FolderError(f"{path}: is not what was written. Remove the folder and start over.")
        return step, data

    # --- the end

    def finish(self, manifest: Manifest, small_files: Mapping[str, bytes]) -> None:
        """Write the small files, the manifest last, and drop journal and state."""
        for name, data in small_files.items():
            files.write_whole(self.folder / name, data)
        files.write_whole(self.folder / MANIFEST, manifest.to_json())
        self.finished = True
        self._clean()

    def _clean(self) -> None:
        """Remove what only an unfinished folder needs; a kill may have left any of it."""
        files.remove_leftovers(self.folder)
        for path in self.folder.glob(STATE.format(0).replace("00000", "*")):
            files.remove(path)
        files.remove(self.folder / JOURNAL)
        files.sync_folder(self.folder)

    def spans(self) -> dict[str, Span]:
        """Every span, in the order of the layout.  All must have been committed."""
        return {n: Span(place, self.hashes[n]) for n, place in self.layout.places.items()}


def _difference(found: object, wanted: object, key: str = "") -> str | None:
    """The first key of an identity that differs and both values, as JSON has them; None if none."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for name in [*found, *(n for n in wanted if n not in found)]:
            values = found.get(name, _ABSENT), wanted.get(name, _ABSENT)
            if difference := _difference(*values, f"{key}.{name}" if key else name):
                return difference
        return None
    # By their text: to Python 1, 1.0 and True are equal, and NaN is not equal to itself.
    found_text, wanted_text = _text(found), _text(wanted)
    if found_text == wanted_text:
        return None
    return f"{key or 'it'} is {_in_short(found_text)}, but {_in_short(wanted_text)}"


def _text(value: object) -> str:
    return "absent" if value is _ABSENT else json.dumps(value, sort_keys=True)


def _in_short(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."


def small_file_table(small_files: Mapping[str, bytes]) -> dict[str, SmallFile]:
    """What the manifest says of files that are copied as they are."""
    return {name: SmallFile(len(data), content_hash(data)) for name, data in small_files.items()}


def _padded(tensor: Tensor, place: Place) -> memoryview:
    data = tensor.contiguous().flatten().view(torch.uint8)
    if data.numel() != place.n_bytes:
        assert data.numel() < place.n_bytes, (data.numel(), place)
        data = torch.nn.functional.pad(data, (0, place.n_bytes - data.numel()))
    return data.numpy().data


def _whole_lines(path: Path) -> tuple[list[Any], int]:
    """The journal's lines up to the first that is torn, and how many bytes they take."""
    if not path.is_file():
        return [], 0
    lines, position = [], 0
    for line in files.read_all(path, limit=MAX_JOURNAL_BYTES).splitlines(keepends=True):
        digest, _, text = line.partition(b" ")
        if not line.endswith(b"\n") or content_hash(text[:-1]).encode() != digest:
            break
        lines.append(json.loads(text))
        position += len(line)
    return lines, position
