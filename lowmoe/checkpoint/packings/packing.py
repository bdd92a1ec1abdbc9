"""What every packing of weights can do, and the checks all of them make.

Which weights are packed, the files say: beside a packed weight lie tensors that no plain one has.
Lists of modules to leave alone, which are names, parts of names or regular expressions depending on
who wrote them, are not needed for that and never run.

Knows:        names, dtypes and shapes of stored tensors.
Ignorant of:  how codes become numbers, where files are.
"""

import math
from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from lowmoe.checkpoint.safetensors_file import TensorEntry
from lowmoe.errors import CheckpointError

SCALE_DTYPES = ("F32", "BF16", "F16")
# Rows are decoded about so many weights at a time, so that what lies between codes and numbers
# stays in the processor's cache and is small beside the result.
CHUNK_WEIGHTS = 2**18


class StoredTensors(Protocol):
    """A checkpoint's tensors as they lie in its files."""

    def __contains__(self, name: object) -> bool:
        """Whether there is a tensor of this name."""

    def entry(self, name: str) -> TensorEntry:
        """Its dtype and shape.  Raises CheckpointError if it is missing."""

    def read_stored(self, name: str, first: int, count: int) -> Tensor:
        """Some of its first axis, in the dtype of the file."""

    def read_whole(self, name: str) -> Tensor:
        """All of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """A tensor that a model wants, and the files that hold what it is made of."""

    name: str
    shape: tuple[int, ...]
    files: StoredTensors

    def require(self, name: str, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> TensorEntry:
        """Raises CheckpointError unless a stored tensor has one of these dtypes and this shape."""
        entry = self.files.entry(name)
        if entry.dtype not in dtypes or entry.shape != shape:
            raise CheckpointError(
                f"{name} is {entry.dtype} {list(entry.shape)}, but a packed {self.name} of "
                f"{list(self.shape)} needs {' or '.join(dtypes)} {list(shape)}. The weights and "
                "config.json look like different models; download both again."
            )
        return entry

    def require_matrix(self) -> tuple[int, int]:
        """Rows and columns.  Raises CheckpointError where no matrix is wanted."""
        if len(self.shape) != 2:
            raise CheckpointError(
                f"{self.name}: is packed as a matrix, but config.json needs {list(self.shape)}. "
                "The weights and config.json look like different models; download both again."
            )
        return self.shape[0], self.shape[1]

    def damaged(self, found: str, expected: str) -> CheckpointError:
        """An error about what is in a stored tensor."""
        return CheckpointError(
            f"{self.name}: {found}, but {expected}. The file is damaged; download it again."
        )


class PackedWeight(Protocol):
    """One weight whose stored tensors have the dtypes and shapes they must."""

    def rows(self, first: int, count: int) -> Tensor:
        """Some of its first axis, float32.  Raises CheckpointError for codes that mean nothing."""


class Packing(Protocol):
    """A way to store weights in fewer bits."""

    def stored(self, name: str, names: Container[str]) -> tuple[str, ...]:
        """The tensors that a weight is packed into; () where it is not packed like this."""

    def open(self, weight: Weight) -> PackedWeight:
        """Check everything that can be without reading weights.  Raises CheckpointError."""


def groups(count: int, size: int | None) -> int:
    """How many groups of a size cover so many channels; None: one for all."""
    return 1 if size is None else math.ceil(count / size)


def chunks(first: int, count: int, n_columns: int, *, step: int = 1) -> Iterator[tuple[int, int]]:
    """(first, end) of runs of rows, each a multiple of `step` but for the last."""
    n_rows = max(1, CHUNK_WEIGHTS // max(1, n_columns) // step) * step
    for start in range(first, first + count, n_rows):
        yield start, min(start + n_rows, first + count)
