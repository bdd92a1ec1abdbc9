"""GGUF files: one, or a model split over several, and their tensors as numbers.

Knows:        which file of a split holds which tensor, how blocks become numbers.
Ignorant of:  what any tensor is for, what a model's values mean.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from lowmoe.checkpoint import files
from lowmoe.checkpoint.gguf_header import GgufHeader, GgufValue, read_header
from lowmoe.checkpoint.gguf_split import split_paths
from lowmoe.errors import CheckpointError, UnsupportedModelError

_PLAIN: Final = {Type.F32: torch.float32, Type.F16: torch.float16, Type.BF16: torch.bfloat16}
# In float32 16 MB, and as much again while the gguf package makes them.
_WEIGHTS_AT_ONCE: Final = 2**22


@dataclass(frozen=True, slots=True)
class GgufFile:
    """An index of one file's tensors; nothing stays open."""

    path: Path
    header: GgufHeader

    def read_rows(self, name: str, shape: tuple[int, ...], first: int, count: int) -> Tensor:
        """Some of the first axis of a tensor that is taken as of `shape`, of as many elements.

        float32, or what the file has where that is a float.  Nothing else is read, but all of a
        vector whose blocks hold several elements.
        """
        entry = self.header.tensors[name]
        assert 0 <= first <= first + count <= shape[0], (name, shape, first, count)
        per_row = entry.n_bytes // shape[0]
        if gguf.GGML_QUANT_SIZES[entry.type][0] > 1 and len(shape) == 1:
            return self.read_rows(name, (1, *shape), 0, 1)[0, first : first + count]
        start, wanted = entry.offset + first * per_row, (count, *shape[1:])
        with files.opened(self.path) as descriptor:
            if entry.type not in _PLAIN:
                return self._numbers(name, descriptor, start, wanted)
            data = torch.empty(count * per_row, dtype=torch.uint8)
            files.read_at(descriptor, data.numpy().data, start, self.path)
            return data.view(_PLAIN[entry.type]).view(wanted)

    def _numbers(self, name: str, descriptor: int, start: int, shape: tuple[int, ...]) -> Tensor:
        """What blocks stand for, float32, some rows at a time.

        The gguf package holds all it makes twice, which of a large vocabulary is gigabytes.
        """
        kind, rows = self.header.tensors[name].type, math.prod(shape[:-1])
        size, n_bytes = gguf.GGML_QUANT_SIZES[kind]
        per_row = shape[-1] // size * n_bytes
        at_once = max(1, _WEIGHTS_AT_ONCE // shape[-1])
        numbers = np.empty((rows, shape[-1]), np.float32)
        for row in range(0, rows, at_once):
            blocks = np.empty((min(at_once, rows - row), per_row), np.uint8)
            files.read_at(descriptor, blocks.reshape(-1).data, start + row * per_row, self.path)
            try:
                # Scales of damaged blocks overflow; whoever reads weights refuses infinity.
                with np.errstate(all="ignore"):
                    numbers[row : row + len(blocks)] = gguf.dequantize(blocks, kind)
            except NotImplementedError as e:
                raise UnsupportedModelError(
                    f"{self.path}: {name} has type {kind.name}, which cannot be read. Look for a "
                    "file of another type, such as Q4_K_M or Q8_0."
                ) from e
        return torch.from_numpy(numbers).view(shape)

    def samples(self, n_bytes: int) -> Iterator[tuple[str, bytes]]:
        """The name of every tensor, sorted, and at most n_bytes from its middle."""
        with files.opened(self.path) as descriptor:
            for name, entry in sorted(self.header.tensors.items()):
                sample = bytearray(min(n_bytes, entry.n_bytes))
                offset = entry.offset + (entry.n_bytes - len(sample)) // 2
                files.read_at(descriptor, memoryview(sample), offset, self.path)
                yield name, bytes(sample)


@dataclass(frozen=True, slots=True)
class GgufFiles:
    """A model's file or files, the first of which holds its values."""

    parts: tuple[GgufFile, ...]
    part_of: Mapping[str, GgufFile]

    @classmethod
    def open(cls, path: Path) -> "GgufFiles":
        """path: the file, or the first of a split.  Raises CheckpointError for what is missing."""
        parts = tuple(GgufFile(p, read_header(p)) for p in split_paths(path))
        part_of: dict[str, GgufFile] = {}
        for number, part in enumerate(parts):
            _require_place(part, number, len(parts))
            for name in part.header.tensors:
                if name in part_of:
                    raise CheckpointError(
                        f"{part.path}: holds {name}, but so does {part_of[name].path.name}. They "
                        "are not parts of one model; download them again."
                    )
                part_of[name] = part
        wanted = parts[0].header.values.get("split.tensors.count", len(part_of))
        # An array would compare by element.
        if not isinstance(wanted, int) or wanted != len(part_of):
            raise CheckpointError(
                f"{path}: promises {str(wanted)[:40]} tensors, but the files hold {len(part_of)}. "
                "Download them again."
            )
        return cls(parts, part_of)

    @property
    def path(self) -> Path:
        return self.parts[0].path

    @property
    def values(self) -> Mapping[str, GgufValue]:
        """What the model's header says by key."""
        return self.parts[0].header.values

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every tensor, rows first."""
        return {name: part.header.tensors[name].shape for name, part in self.part_of.items()}

    def read_rows(self, name: str, shape: tuple[int, ...], first: int, count: int) -> Tensor:
        """What GgufFile.read_rows gives, from whichever file has it."""
        return self.part_of[name].read_rows(name, shape, first, count)

    def n_bytes(self, name: str) -> int:
        """A tensor's, as it lies in its file."""
        return self.part_of[name].header.tensors[name].n_bytes


def _require_place(part: GgufFile, number: int, count: int) -> None:
    """That a file is the part that its name says; one that was not split says nothing."""
    values = part.header.values
    for key, wanted in (("split.no", number), ("split.count", count)):
        found = values.get(key, wanted)
        whole = count == 1 and key == "split.count"
        if not isinstance(found, int) or (found != wanted and not (whole and found == 0)):
            raise CheckpointError(
                f"{part.path}: {key} is {str(found)[:40]}, but its name makes that {wanted}. The "
                "file was renamed; give it its name back, or download the model again."
            )
