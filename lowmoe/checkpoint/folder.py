"""A finished model folder, read with every byte checked.

Knows:        spans, their hashes, descriptors past the page cache.
Ignorant of:  what the bits of a span mean; which experts are wanted when.
"""

import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from lowmoe.checkpoint import files
from lowmoe.checkpoint.buffers import Arena
from lowmoe.checkpoint.layout import Recipe, expert_span
from lowmoe.checkpoint.manifest import Manifest, Span, content_hash, read_manifest
from lowmoe.errors import FolderError

# Spans of a few megabytes: one reader waits for the disk between two of them.
N_AT_ONCE = 4


class ModelFolder:
    """Reads spans of one folder; any thread may read.  Use with `with` or close()."""

    def __init__(self, path: Path) -> None:
        """Raises FolderError for a manifest or a file that is missing, damaged or cut short."""
        self.path = path
        self.manifest: Manifest = read_manifest(path)
        self._check_files()
        self._descriptors: dict[str, tuple[int, bool]] = {}
        self._verified: set[str] = set()
        self._lock = threading.Lock()

    def __enter__(self) -> "ModelFolder":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def recipe(self) -> Recipe:
        """Which formats the weights have."""
        return self.manifest.recipe

    def require_bytes(self, name: str, n_bytes: int) -> None:
        """Raises FolderError unless a span has this size."""
        found = self._span(name).place.n_bytes
        if found != n_bytes:
            raise FolderError(
                f"{self.path}: {name} has {found} bytes, but its config promises {n_bytes}. The "
                "manifest and the config look like different models; make it again."
            )

    def _check_files(self) -> None:
        ends: dict[str, int] = {}
        for span in self.manifest.spans.values():
            place = span.place
            ends[place.file] = max(ends.get(place.file, 0), place.offset + place.n_bytes)
        ends |= {name: f.n_bytes for name, f in self.manifest.small_files.items()}
        for name, end in ends.items():
            path = self.path / name
            if not path.is_file():
                raise FolderError(f"{path}: missing, but the manifest lists it. Make it again.")
            if path.stat().st_size < end:
                raise FolderError(
                    f"{path}: {path.stat().st_size} bytes, but the manifest needs {end}. The file "
                    "was cut short; make the model again."
                )

    def small_file(self, name: str) -> bytes | None:
        """A file that was copied as it came, checked; None if the folder has none of that name."""
        entry = self.manifest.small_files.get(name)
        if entry is None:
            return None
        data = files.read_all(self.path / name, limit=entry.n_bytes)
        self._check(name, data, entry.hash)
        return data

    def read(self, name: str) -> Tensor:
        """One span, [n_bytes] uint8, checked, in memory of its own."""
        n_bytes = self._span(name).place.n_bytes
        buffer = Arena(n_bytes).take(n_bytes)
        self._fill(name, buffer)
        return buffer

    def read_all(self, names: Iterable[str], arena: Arena) -> dict[str, Tensor]:
        """Spans, [n_bytes] uint8 each, checked, in memory cut from the arena in this order; several
        are read at once.
        """
        buffers = {name: arena.take(self._span(name).place.n_bytes) for name in names}
        with ThreadPoolExecutor(N_AT_ONCE, thread_name_prefix="lowmoe-dense") as readers:
            for _ in readers.map(self._fill, buffers.keys(), buffers.values()):
                pass  # raises what a read raised
        return buffers

    def _fill(self, name: str, buffer: Tensor) -> None:
        span, data = self._span(name), buffer.numpy().data
        path = self.path / span.place.file
        with files.opened(path) as descriptor:
            files.read_at(descriptor, data, span.place.offset, path)
        self._check(name, data, span.hash)

    def read_expert(
        self,
        layer_id: int,
        expert_id: int,
        parts: Iterable[str],
        buffers: list[Tensor],
        *,
        check: bool = True,
    ) -> int:
        """Read these parts of an expert into page-aligned buffers, [padded bytes] uint8 each.

        With check, a part is held against its hash the first time it is read.  Returns the bytes
        read.
        """
        total = 0
        for part, buffer in zip(parts, buffers, strict=True):
            name = expert_span(layer_id, expert_id, part)
            span = self._span(name)
            data = buffer.numpy().data
            files.read_at(
                self._descriptor(span), data, span.place.offset, self.path / span.place.file
            )
            if check and name not in self._verified:
                self._check(name, data, span.hash)
                self._verified.add(name)
            total += len(data)
        return total

    def _span(self, name: str) -> Span:
        if name not in self.manifest.spans:
            raise FolderError(f"{self.path}: has no {name}, which its config promises.")
        return self.manifest.spans[name]

    def _descriptor(self, span: Span) -> int:
        with self._lock:
            if span.place.file not in self._descriptors:
                self._descriptors[span.place.file] = files.open_direct(self.path / span.place.file)
            return self._descriptors[span.place.file][0]

    def _check(self, name: str, data: bytes | memoryview, wanted: str) -> None:
        found = content_hash(data)
        if found == wanted:
            return
        owner = next((n for n, s in self.manifest.spans.items() if s.hash == found), None)
        what = f"holds the bytes of {owner}" if owner else f"has hash {found}"
        file = self.manifest.spans[name].place.file if name in self.manifest.spans else name
        raise FolderError(
            f"{self.path / file}: {name} {what}, but the manifest expects {wanted}. "
            "The file was damaged; make the model again."
        )

    def direct(self) -> bool | None:
        """Whether expert files are read past the page cache; None before the first read."""
        return all(d for _, d in self._descriptors.values()) if self._descriptors else None

    def close(self) -> None:
        """Give all descriptors back."""
        for descriptor, _ in self._descriptors.values():
            files.close(descriptor)
        self._descriptors.clear()
