"""The header of a GGUF file: values by key, and where each tensor lies.

A file is a magic word, a version, two counts, keys with typed values, tensors with their names,
sizes, types and places, and then, from a multiple of the alignment on, the tensors' bytes. The gguf
package reads it too, but through a map of the file, and a mapped file that shrinks kills the
process; and it trusts counts and sizes that the file claims.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3.

Knows:        how values and tensors are written; holds every count and size against the file.
Ignorant of:  what any key or tensor is for; what is in the blocks of a type.
"""

import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias, overload

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from lowmoe.checkpoint import files
from lowmoe.errors import CheckpointError, UnsupportedModelError

MAGIC, VERSIONS = b"GGUF", (2, 3)
ALIGNMENT_KEY = "general.alignment"
MAX_ALIGNMENT = 2**16
MAX_HEADER_BYTES = 2**28  # the largest vocabularies take a tenth of it
MAX_KEY_BYTES = 2**16 - 1  # the format's own limit
MAX_NAME_BYTES = 64  # ggml's own limit, of tensors' names
MAX_DIMENSIONS = 4  # ggml's own limit
MAX_ELEMENTS = 2**62
# Far above any model's. What stands for each takes many times the bytes that claim it.
MAX_VALUES, MAX_TENSORS = 2**16, 2**18
_BLOCK_BYTES = 2**16  # read at once where less is asked for
_STRING, _ARRAY = 8, 9
_NUMBERS: Final[Mapping[int, np.dtype[np.generic]]] = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("?"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}


class Strings(Sequence[str]):
    """Many strings in the bytes they have in a file; a list of them would take many times as much.

    What is not UTF-8 reads as U+FFFD.
    """

    def __init__(self, text: bytearray, ends: "array[int]") -> None:
        self._text, self._ends = text, ends

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        start = self._ends[index - 1] if index else 0
        return self._text[start : self._ends[index]].decode("utf-8", "replace")


GgufValue: TypeAlias = bool | int | float | str | Strings | NDArray[np.generic]


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where a tensor lies: rows first, offset from the start of the file."""

    type: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """All of a file but the tensors' bytes."""

    values: Mapping[str, GgufValue]
    tensors: Mapping[str, GgufTensor]


def read_header(path: Path, n_bytes: int | None = None) -> GgufHeader:
    """Read and check a header.  Raises CheckpointError where it and the file disagree.

    n_bytes: of the whole file, where only a beginning of it is here; FolderError if that ends
    within the header.
    """
    with files.opened(path) as descriptor:
        cursor = _Cursor(descriptor, path, n_bytes)
        if bytes(cursor.take(4)) != MAGIC:
            raise CheckpointError(f"{path}: does not begin with {MAGIC.decode()}: no GGUF file.")
        version = cursor.integer(4)
        if version not in VERSIONS:
            raise UnsupportedModelError(
                f"{path}: GGUF version {version & 0xFFFF or version}, but read are little-endian "
                f"files of version {' and '.join(map(str, VERSIONS))}. Look for a newer file."
            )
        n_tensors, n_values = cursor.integer(8), cursor.integer(8)
        values = dict(_values(cursor, n_values))
        tensors = dict(_tensors(cursor, n_tensors))
        start = _data_start(cursor, values)
        return GgufHeader(values, _placed(tensors, start, cursor))


class _Cursor:
    """A file's bytes in order, each asked of what is left before there is memory for it."""

    def __init__(self, descriptor: int, path: Path, n_bytes: int | None) -> None:
        whole = files.size_of(descriptor) if n_bytes is None else n_bytes
        self.path, self.size, self.position = path, whole, 0
        self._descriptor, self._limit = descriptor, min(self.size, MAX_HEADER_BYTES)
        self._block, self._start = memoryview(b""), 0

    def take(self, n_bytes: int) -> memoryview:
        """The next bytes."""
        self.require(n_bytes)
        begin = self.position - self._start
        if begin + n_bytes > len(self._block):
            self._block = memoryview(
                bytearray(min(max(n_bytes, _BLOCK_BYTES), self._limit - self.position))
            )
            files.read_at(self._descriptor, self._block, self.position, self.path)
            self._start, begin = self.position, 0
        self.position += n_bytes
        return self._block[begin : begin + n_bytes]

    def require(self, n_bytes: int) -> None:
        """Refuse what the file does not hold any more."""
        if n_bytes > self._limit - self.position:
            raise CheckpointError(
                f"{self.path}: the header claims {n_bytes} more bytes at {self.position}, but the "
                f"file has {self.size} and a header at most {MAX_HEADER_BYTES}. The file is cut "
                "short or damaged; download it again."
            )

    def integer(self, n_bytes: int) -> int:
        """An unsigned number."""
        return int.from_bytes(self.take(n_bytes), "little")

    def name(self, longest: int) -> str:
        """A key or the name of a tensor."""
        length = self.integer(8)
        if length > longest:
            raise self.malformed(f"a name of {length} bytes, but at most {longest} are allowed")
        try:
            return bytes(self.take(length)).decode()
        except UnicodeDecodeError as e:
            raise self.malformed(f"a name that is not UTF-8 ({e.reason})") from e

    def malformed(self, what: str) -> CheckpointError:
        """What is wrong at this place."""
        return CheckpointError(
            f"{self.path}: the header has {what}, before byte {self.position}. The file is "
            "damaged; download it again."
        )


def _values(cursor: _Cursor, count: int) -> Iterator[tuple[str, GgufValue]]:
    cursor.require(count * 13)  # a length, a type and a byte at the least
    if count > MAX_VALUES:
        raise cursor.malformed(f"{count} keys, but at most {MAX_VALUES} are allowed")
    seen = set()
    for _ in range(count):
        key = cursor.name(MAX_KEY_BYTES)
        if key in seen:
            raise cursor.malformed(f"the key {key!r} twice")
        seen.add(key)
        yield key, _value(cursor, cursor.integer(4))


def _value(cursor: _Cursor, kind: int) -> GgufValue:
    if kind == _STRING:
        return bytes(cursor.take(cursor.integer(8))).decode("utf-8", "replace")
    if kind == _ARRAY:
        return _array(cursor)
    found = _numbers(cursor, kind, 1)[0]
    if isinstance(found, np.float32):
        return float(str(found))  # the shortest number that is this one: 1e-05, not .00000999999974
    value: bool | int | float = found.item()
    return value


def _array(cursor: _Cursor) -> GgufValue:
    kind, count = cursor.integer(4), cursor.integer(8)
    if kind != _STRING:
        return _numbers(cursor, kind, count)
    cursor.require(count * 8)
    text, ends = bytearray(), array("Q")
    for _ in range(count):
        text += cursor.take(cursor.integer(8))
        ends.append(len(text))
    return Strings(text, ends)


def _numbers(cursor: _Cursor, kind: int, count: int) -> NDArray[np.generic]:
    dtype = _NUMBERS.get(kind)
    if dtype is None:
        raise cursor.malformed(f"a value of type {kind}, but types go to 12 and none is nested")
    data = cursor.take(count * dtype.itemsize)
    if dtype == np.bool_ and count and np.frombuffer(data, np.uint8).max() > 1:
        raise cursor.malformed("a truth value that is neither 0 nor 1")
    return np.frombuffer(data, dtype)


def _tensors(cursor: _Cursor, count: int) -> Iterator[tuple[str, GgufTensor]]:
    """Offsets still from the start of the data."""
    cursor.require(count * 32)  # a length, one dimension and its count, type and offset
    if count > MAX_TENSORS:
        raise cursor.malformed(f"{count} tensors, but at most {MAX_TENSORS} are allowed")
    seen = set()
    for _ in range(count):
        name = cursor.name(MAX_NAME_BYTES)
        if name in seen:
            raise cursor.malformed(f"the tensor {name!r} twice")
        seen.add(name)
        n_dimensions = cursor.integer(4)
        if not 1 <= n_dimensions <= MAX_DIMENSIONS:
            raise cursor.malformed(f"{n_dimensions} dimensions of {name!r}, not 1 to 4")
        # Written with rows last.
        shape = tuple(cursor.integer(8) for _ in range(n_dimensions))[::-1]
        kind, offset = cursor.integer(4), cursor.integer(8)
        yield name, _tensor(cursor, name, shape, kind, offset)


def _tensor(
    cursor: _Cursor, name: str, shape: tuple[int, ...], kind: int, offset: int
) -> GgufTensor:
    try:
        type = GGMLQuantizationType(kind)
    except ValueError as e:
        raise UnsupportedModelError(
            f"{cursor.path}: {name} has type {kind}, which this version of the gguf package does "
            "not know. Update gguf, or look for a file of another type."
        ) from e
    n_elements, (block, block_bytes) = math.prod(shape), GGML_QUANT_SIZES[type]
    if not 1 <= n_elements <= MAX_ELEMENTS or shape[-1] % block:
        raise cursor.malformed(f"{name!r} of {list(shape)} in {type.name}, which has no such size")
    return GgufTensor(type, shape, offset, n_elements // block * block_bytes)


def _data_start(cursor: _Cursor, values: Mapping[str, GgufValue]) -> tuple[int, int]:
    """Where the data begins, and of what all offsets are multiples."""
    found = values.get(ALIGNMENT_KEY, 32)
    if type(found) is not int or not 1 <= found <= MAX_ALIGNMENT or found & (found - 1):
        raise cursor.malformed(f"{ALIGNMENT_KEY} {str(found)[:20]!r}, not a power of two")
    return -(-cursor.position // found) * found, found


def _placed(
    tensors: Mapping[str, GgufTensor], data: tuple[int, int], cursor: _Cursor
) -> dict[str, GgufTensor]:
    """The same with offsets from the start of the file.  Raises CheckpointError where two overlap
    or one is not in the file."""
    start, alignment = data
    end = start
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
        first = start + tensor.offset
        if tensor.offset % alignment or first < end or first + tensor.n_bytes > cursor.size:
            raise CheckpointError(
                f"{cursor.path}: {name} should have {tensor.n_bytes} bytes from {first} on, but "
                f"the file has {cursor.size} and the tensor before it ends at {end}. The file is "
                "cut short or damaged; download it again."
            )
        end = first + tensor.n_bytes
    return {
        name: GgufTensor(t.type, t.shape, start + t.offset, t.n_bytes)
        for name, t in tensors.items()
    }
