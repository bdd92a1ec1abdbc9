"""The safetensors container, read with pread and written at fixed places.

A file is an 8-byte little-endian length, a JSON header of that length, and the tensors' bytes back
to back. The safetensors library reads what we write; we read files ourselves because the library
maps them, and a mapped file that shrinks kills the process.

Source: https://github.com/huggingface/safetensors, "Format".

Knows:        headers, dtypes, offsets; checks every size against the file before using it.
Ignorant of:  what any tensor is for.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowmoe.checkpoint import files
from lowmoe.errors import CheckpointError

DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 100_000_000  # the library's own limit
MAX_DIMENSIONS = 16
MAX_ELEMENTS = 2**62  # torch counts in int64, also where another dimension is 0


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor lies: dtype by its safetensors name, offset from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class SafetensorsFile:
    """An index of one file's tensors; nothing stays open."""

    path: Path
    tensors: Mapping[str, TensorEntry]

    @classmethod
    def open(cls, path: Path) -> "SafetensorsFile":
        """Read and check the header.  Raises CheckpointError where file and header disagree."""
        with files.opened(path) as descriptor:
            size = files.size_of(descriptor)
            if size < 8:
                raise CheckpointError(f"{path}: {size} bytes, too short for a safetensors file.")
            prefix = bytearray(8)
            files.read_at(descriptor, memoryview(prefix), 0, path)
            length = int.from_bytes(prefix, "little")
            if length > min(size - 8, MAX_HEADER_BYTES):
                raise CheckpointError(
                    f"{path}: the header claims {length} bytes, but the file holds {size - 8} "
                    "after its length. The file is cut short or no safetensors file."
                )
            header = bytearray(length)
            files.read_at(descriptor, memoryview(header), 8, path)
        return cls(path, _parse(bytes(header), path, data_start=8 + length, size=size))

    def read(self, name: str) -> Tensor:
        """One tensor, in a buffer of its own."""
        shape = self.tensors[name].shape
        return self.read_rows(name, 0, shape[0]) if shape else self._read(name, 0, ())

    def read_rows(self, name: str, first: int, count: int) -> Tensor:
        """Some of a tensor's first axis, in a buffer of its own; nothing else is read."""
        entry = self.tensors[name]
        assert 0 <= first <= first + count <= entry.shape[0], (name, first, count, entry.shape)
        row_bytes = entry.n_bytes // max(entry.shape[0], 1)
        return self._read(name, first * row_bytes, (count, *entry.shape[1:]))

    def _read(self, name: str, offset: int, shape: tuple[int, ...]) -> Tensor:
        entry = self.tensors[name]
        if entry.dtype not in DTYPES:
            raise CheckpointError(
                f"{self.path}: {name} has dtype {entry.dtype}, but {', '.join(DTYPES)} are "
                "implemented. Look for a checkpoint in bfloat16."
            )
        tensor = torch.empty(shape, dtype=DTYPES[entry.dtype])
        if tensor.numel():
            buffer = tensor.flatten().view(torch.uint8).numpy().data
            with files.opened(self.path) as descriptor:
                files.read_at(descriptor, buffer, entry.offset + offset, self.path)
        return tensor

    def samples(self, n_bytes: int) -> Iterator[tuple[str, bytes]]:
        """The name of every tensor, sorted, and at most n_bytes from its middle."""
        with files.opened(self.path) as descriptor:
            for name, entry in sorted(self.tensors.items()):
                sample = bytearray(min(n_bytes, entry.n_bytes))
                offset = entry.offset + (entry.n_bytes - len(sample)) // 2
                files.read_at(descriptor, memoryview(sample), offset, self.path)
                yield name, bytes(sample)


def _parse(header: bytes, path: Path, *, data_start: int, size: int) -> dict[str, TensorEntry]:
    try:
        values = json.loads(header, object_pairs_hook=_without_duplicates)
    except ValueError as e:  # bad UTF-8, bad JSON, a name that comes twice
        raise CheckpointError(f"{path}: the header is not JSON ({e}). Download it again.") from e
    except RecursionError as e:
        raise CheckpointError(f"{path}: the header is nested too deeply.") from e
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: the header is not a table of tensors.")
    values.pop("__metadata__", None)
    entries = {name: _entry(name, value, path, data_start) for name, value in values.items()}
    _check_offsets(entries, path, data_start, size)
    return entries


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"{name!r} comes twice")
        values[name] = value
    return values


def _entry(name: str, value: Any, path: Path, data_start: int) -> TensorEntry:
    try:
        dtype, shape, (begin, end) = value["dtype"], value["shape"], value["data_offsets"]
    except (TypeError, KeyError, ValueError) as e:
        raise CheckpointError(f"{path}: the header's entry for {name} is malformed.") from e
    # Checked before they are multiplied: a product of a million numbers would take minutes.
    well_formed = (
        isinstance(dtype, str) and isinstance(shape, list) and len(shape) <= MAX_DIMENSIONS
    )
    numbers = [begin, end, *shape] if well_formed else [None]
    if not all(type(n) is int and 0 <= n <= MAX_ELEMENTS for n in numbers):
        raise CheckpointError(f"{path}: the header's entry for {name} is malformed.")
    if math.prod(n or 1 for n in shape) > MAX_ELEMENTS:
        raise CheckpointError(f"{path}: {name} is {shape}, more than any file can hold.")
    if dtype in DTYPES and math.prod(shape) * DTYPES[dtype].itemsize != end - begin:
        raise CheckpointError(
            f"{path}: {name} is {dtype} {shape}, but the header gives it {end - begin} bytes."
        )
    return TensorEntry(dtype, tuple(shape), data_start + begin, end - begin)


def _check_offsets(
    entries: Mapping[str, TensorEntry], path: Path, data_start: int, size: int
) -> None:
    position = data_start
    # An empty tensor lies where another begins, on either side of it in the header.
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].n_bytes)):
        if entry.offset != position or entry.n_bytes < 0:
            raise CheckpointError(
                f"{path}: {name} begins at byte {entry.offset}, but the one before it ends at "
                f"{position}. The header is damaged; download the file again."
            )
        position += entry.n_bytes
    if position != size:
        raise CheckpointError(
            f"{path}: the header describes {position} bytes, but the file holds {size}. "
            "Download it again."
        )


def build_header(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], *, alignment: int
) -> tuple[bytes, dict[str, TensorEntry]]:
    """The length and header of a file with these tensors in this order, and where each will lie.

    The header is padded with spaces, as the format allows, so that data begins at a multiple of
    `alignment`; the tensors' own sizes must keep it.
    """
    places, position = {}, 0
    for name, (dtype, shape) in tensors.items():
        n_bytes = math.prod(shape) * dtype.itemsize
        places[name] = TensorEntry(DTYPE_NAMES[dtype], shape, position, n_bytes)
        position += n_bytes
    values = {
        name: {"dtype": e.dtype, "shape": e.shape, "data_offsets": [e.offset, e.offset + e.n_bytes]}
        for name, e in places.items()
    }
    text = json.dumps(values, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % alignment)
    start = 8 + len(text)
    header = len(text).to_bytes(8, "little") + text
    return header, {n: replace(e, offset=start + e.offset) for n, e in places.items()}
