"""A checkpoint in GGUF files, by the names that tensors have there.

Knows:        how llama.cpp's converter keeps tensors that it took apart.
Ignorant of:  which model wants which tensor.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from lowmoe.checkpoint.gguf_file import GgufFiles
from lowmoe.checkpoint.pieces import cut_out, require_finite
from lowmoe.errors import CheckpointError
from lowmoe.spec import Piece

# The map from latents up to keys and values, and the halves of it that newer files have instead:
# of keys transposed, [heads, rank, size], of values [heads, size, rank].
_WHOLE, _KEYS, _VALUES = (f".attn_{part}.weight" for part in ("kv_b", "k_b", "v_b"))


class GgufCheckpoint:
    """Tensors by name, whatever file they lie in.  config: what would be in a config.json."""

    def __init__(self, files: GgufFiles, config: Mapping[str, Any]) -> None:
        self.config = config
        self._files, self._shapes = files, files.shapes()
        self._halved = {
            name.removesuffix(_KEYS)
            for name in self._shapes
            if name.endswith(_KEYS) and name.removesuffix(_KEYS) + _VALUES in self._shapes
        }
        for layer in self._halved:
            self._shapes[layer + _WHOLE] = self._whole_shape(layer)

    def _whole_shape(self, layer: str) -> tuple[int, ...]:
        keys, values = (self._shapes.pop(layer + half) for half in (_KEYS, _VALUES))
        if len(keys) != 3 or len(values) != 3 or keys[:2] != (values[0], values[2]):
            raise CheckpointError(
                f"{self.folder}: {layer}{_KEYS} is {list(keys)} and {layer}{_VALUES} "
                f"{list(values)}, but [heads, rank, size] and [heads, size, rank] are needed. "
                "The file is damaged; download it again."
            )
        return keys[0] * (keys[2] + values[1]), keys[1]

    @property
    def folder(self) -> Path:
        """The first file."""
        return self._files.path

    def names(self) -> set[str]:
        """Every tensor's name; one that is in halves has that of the whole."""
        return set(self._shapes)

    def read_piece(self, piece: Piece) -> Tensor:
        """A role's tensor, rows out and columns in; only as much of the file is read as holds it.

        Raises CheckpointError if it is missing, not of this shape or not finite.
        """
        self._require_shape(piece.name, piece.shape)
        layer = piece.name.removesuffix(_WHOLE)
        if layer in self._halved:
            rows = self._put_together(layer)[piece.first : piece.first + piece.count]
        else:
            rows = self._files.read_rows(piece.name, piece.shape, piece.first, piece.count)
        return cut_out(require_finite(rows, piece.name, self.folder.name), piece)

    def stored(self, name: str) -> tuple[str, ...]:
        """Itself: what is in halves is read as a whole."""
        return (name,)

    def ignores(self, name: str) -> bool:
        """None: a tensor that nobody asks for may change what a model computes."""
        return False

    def _put_together(self, layer: str) -> Tensor:
        shapes = self._files.shapes()
        keys, values = (
            self._files.read_rows(layer + half, shapes[layer + half], 0, shapes[layer + half][0])
            for half in (_KEYS, _VALUES)
        )
        whole = torch.cat([keys.float().transpose(1, 2), values.float()], dim=1)
        return whole.flatten(0, 1)  # [heads * (key size + value size), rank]

    def stored_bytes(self, piece: Piece) -> int:
        """How many bytes of the files reading a piece takes."""
        layer = piece.name.removesuffix(_WHOLE)
        if layer in self._halved:
            return sum(self._files.n_bytes(layer + half) for half in (_KEYS, _VALUES))
        return self._files.n_bytes(piece.name) * piece.count // piece.shape[0]

    def check_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Hold tensors against these shapes before work begins."""
        for name, shape in shapes.items():
            self._require_shape(name, shape)

    def _require_shape(self, name: str, shape: tuple[int, ...]) -> None:
        found = self._shapes.get(name)
        if found is None:
            raise CheckpointError(
                f"{self.folder}: has no tensor {name}, which such a model needs. The file is "
                "incomplete or of a variant that is not implemented."
            )
        if _without_ones(found) != _without_ones(shape):
            raise CheckpointError(
                f"{self.folder.name}: {name} is {list(found)}, but the file's own values need "
                f"{list(shape)}. The file is damaged or of a variant that is not implemented."
            )

    def sample_hash(self) -> str:
        """XXH3-128 of every tensor's name and 64 bytes of each: tells a fine-tune from its base."""
        digest = xxhash.xxh3_128()
        for part in self._files.parts:
            for name, sample in part.samples(64):
                digest.update(name.encode())
                digest.update(sample)
        return digest.hexdigest()

    def forget(self, names: Iterable[str]) -> None:
        """Nothing: the files are the user's."""


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without axes of 1 in front, which GGUF keeps or drops as it happens."""
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return shape
