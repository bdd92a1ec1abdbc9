"""What making and running models needs of a checkpoint, in whatever files it lies.

Knows:        that tensors have names and shapes and are read piece by piece.
Ignorant of:  formats of files.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from lowmoe.spec import Piece


class CheckpointFiles(Protocol):
    """Tensors by name.  All errors are CheckpointError."""

    @property
    def folder(self) -> Path:
        """Where it lies, a folder or a file, as errors name it."""

    @property
    def config(self) -> Mapping[str, Any]:
        """Its config.json, or what would be in one."""

    def names(self) -> set[str]:
        """Every tensor's name."""

    def read_piece(self, piece: Piece) -> Tensor:
        """A role's tensor, rows out and columns in, of finite numbers."""

    def stored_bytes(self, piece: Piece) -> int:
        """How many bytes of the files reading a piece takes."""

    def check_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Hold tensors against these shapes before work begins."""

    def sample_hash(self) -> str:
        """XXH3-128 of every tensor's name and a few bytes of each."""

    def forget(self, names: Iterable[str]) -> None:
        """Say that these tensors will not be read again."""
