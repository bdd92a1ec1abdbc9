"""A Hugging Face checkpoint: config.json, an index, shards of tensors.

Knows:        which shard holds which tensor, and when a shard is no longer needed.
Ignorant of:  what the tensors mean; where shards come from (a folder, a hub).
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
import xxhash
from torch import Tensor

from lowmoe.checkpoint import files
from lowmoe.checkpoint.safetensors_file import SafetensorsFile
from lowmoe.errors import CheckpointError, FolderError
from lowmoe.spec import Piece

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CONFIG = "config.json"
MAX_JSON_BYTES = 64 * 2**20


class Shards(Protocol):
    """Where a checkpoint's weight files come from."""

    def fetch(self, name: str) -> Path:
        """The path of a shard, whole and in place."""

    def release(self, name: str) -> None:
        """No tensor of this shard is needed any more."""


class LocalShards:
    """Shards that lie in a folder and stay there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def fetch(self, name: str) -> Path:
        """The path of a shard of the folder.  Raises CheckpointError if it is not there."""
        path = self.folder / name
        if not path.is_file():
            raise CheckpointError(f"{path}: missing, but {INDEX} lists it. Download it again.")
        return path

    def release(self, name: str) -> None:
        """Nothing: the files are the user's."""


class Checkpoint:
    """Tensors by name, whatever shard they lie in."""

    def __init__(self, folder: Path, shards: Shards | None = None) -> None:
        """folder: holds config.json and, beside several shards, the index.

        Raises CheckpointError for files that are missing, malformed or point elsewhere.
        """
        self.folder = folder
        self.config = read_json(folder / CONFIG)
        self._shards = LocalShards(folder) if shards is None else shards
        self._open: dict[str, SafetensorsFile] = {}
        self._shard_of = self._read_index()
        self._needed: dict[str, set[str]] = {}
        for name, shard in self._shard_of.items():
            self._needed.setdefault(shard, set()).add(name)

    def _read_index(self) -> dict[str, str]:
        if not (self.folder / INDEX).is_file():
            return dict.fromkeys(self._file(SINGLE).tensors, SINGLE)
        table = read_json(self.folder / INDEX).get("weight_map")
        if not isinstance(table, dict) or not all(isinstance(s, str) for s in table.values()):
            raise CheckpointError(f"{self.folder / INDEX}: has no table weight_map of file names.")
        for shard in set(table.values()):
            if Path(shard).name != shard or not shard or shard.startswith("."):
                raise CheckpointError(f"{self.folder / INDEX}: {shard!r} is not a plain file name.")
        return table

    def _file(self, shard: str) -> SafetensorsFile:
        if shard not in self._open:
            if shard == SINGLE and isinstance(self._shards, LocalShards):
                _require_weights(self.folder)
            self._open[shard] = SafetensorsFile.open(self._shards.fetch(shard))
        return self._open[shard]

    def names(self) -> set[str]:
        """Every tensor's name."""
        return set(self._shard_of)

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """One tensor.  Raises CheckpointError if it is missing, not of this shape or not finite."""
        return _require_finite(self._holding(name, shape).read(name), name, self._shard_of[name])

    def read_piece(self, piece: Piece) -> Tensor:
        """A role's tensor, rows out and columns in; only as much of the file is read as holds it.

        Raises CheckpointError as `read` does.
        """
        file = self._holding(piece.name, piece.shape)
        rows = file.read_rows(piece.name, piece.first, piece.count)
        return _cut_out(_require_finite(rows, piece.name, self._shard_of[piece.name]), piece)

    def check_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Hold tensors against these shapes before work begins, as far as their files are here.

        Shards that are still to be fetched are checked when they are read.
        """
        if isinstance(self._shards, LocalShards):
            for name, shape in shapes.items():
                self._holding(name, shape)

    def _holding(self, name: str, shape: tuple[int, ...]) -> SafetensorsFile:
        if name not in self._shard_of:
            raise CheckpointError(
                f"{self.folder}: has no tensor {name}, which config.json promises. The weights and "
                "config.json look like different models; download both again."
            )
        shard = self._shard_of[name]
        file = self._file(shard)
        if name not in file.tensors:
            raise CheckpointError(f"{file.path}: has no tensor {name}, but {INDEX} says so.")
        found = file.tensors[name].shape
        if found != shape:
            raise CheckpointError(
                f"{file.path.name}: {name} is {list(found)}, but config.json needs {list(shape)}. "
                "The weights and config.json look like different models; download both again."
            )
        return file

    def sample_hash(self) -> str:
        """XXH3-128 of every tensor's name and 64 bytes of each: tells a fine-tune from its base.

        Fetches every shard, which costs nothing where they lie in a folder.
        """
        digest = xxhash.xxh3_128()
        for shard in sorted(self._needed):
            for name, sample in self._file(shard).samples(64):
                digest.update(name.encode("utf-8", "surrogatepass"))
                digest.update(sample)
        return digest.hexdigest()

    def forget(self, names: Iterable[str]) -> None:
        """Say that these tensors will not be read again; a shard without others is released."""
        for name in names:
            shard = self._shard_of.get(name)
            if shard is None or name not in self._needed[shard]:
                continue
            self._needed[shard].discard(name)
            if not self._needed[shard]:
                self._open.pop(shard, None)
                self._shards.release(shard)


def _cut_out(tensor: Tensor, piece: Piece) -> Tensor:
    """What was read of a file as the role's tensor."""
    if tensor.dim() > len(piece.wanted):
        tensor = tensor[0] if tensor.shape[0] == 1 else tensor.squeeze(1)
    if piece.transposed:
        tensor = tensor.T
    if piece.n_heads > 1:
        tensor = tensor.unflatten(0, (piece.n_heads, -1))[:, piece.rows].flatten(0, 1)
    else:
        tensor = tensor[piece.rows]
    if piece.less_one:
        tensor = tensor.float() + 1
    assert tensor.shape == piece.wanted, (piece, tensor.shape)
    if piece.pairs is not None:
        tensor = _halves_of_pairs(tensor, *piece.pairs)
    return tensor.contiguous()


def _halves_of_pairs(rows: Tensor, head_size: int, first: int, count: int) -> Tensor:
    """Rows of heads whose channels first..first+count turn in pairs, so that halves turn instead.

    Queries and keys change alike, so their products do not.
    """
    order = torch.arange(head_size)
    turned = order[first : first + count]
    order[first : first + count] = torch.cat([turned[0::2], turned[1::2]])
    heads = rows.view(-1, head_size, *rows.shape[1:])
    return heads[:, order].reshape(rows.shape)


def _require_finite(tensor: Tensor, name: str, shard: str) -> Tensor:
    if not _is_finite(tensor):
        raise CheckpointError(
            f"{shard}: {name} holds NaN or infinity, but weights are finite numbers. "
            "The file is damaged or the model was trained to pieces; download it again or "
            "choose another."
        )
    return tensor


def _is_finite(tensor: Tensor) -> bool:
    # NaN is the least and the greatest of whatever it is among. At tens of GB/s on one core and
    # without a copy this is no cost beside the disk; isfinite would be twenty times slower.
    return tensor.numel() == 0 or all(bool(t.isfinite()) for t in tensor.aminmax())


def _require_weights(folder: Path) -> None:
    if (folder / SINGLE).is_file():
        return
    others = sorted(
        p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".gguf")
    )
    found = f"found {', '.join(others[:3])}, which cannot be read" if others else "found none"
    raise CheckpointError(f"{folder}: needs {SINGLE} or {INDEX}, {found}.")


def read_json(path: Path) -> Mapping[str, Any]:
    """A JSON object from a file.  Raises CheckpointError if it is missing or no JSON object."""
    if not path.is_file():
        raise CheckpointError(f"{path}: missing. A checkpoint folder needs it; download it again.")
    try:
        values = json.loads(files.read_all(path, limit=MAX_JSON_BYTES))
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{path}: not JSON ({e}). Download it again.") from e
    except FolderError as e:
        raise CheckpointError(str(e)) from e
    if not isinstance(values, dict):
        raise CheckpointError(
            f"{path}: holds {type(values).__name__}, but a JSON object is needed."
        )
    return values
