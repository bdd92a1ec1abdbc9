"""A Hugging Face checkpoint: config.json, an index, shards of tensors.

Knows:        which shard holds which tensor, which are packed, when a shard is no longer needed.
Ignorant of:  what the tensors mean; how they are packed; where shards come from (a folder, a hub).
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import xxhash
from torch import Tensor

from lowmoe.checkpoint import files
from lowmoe.checkpoint.file_names import CONFIG, INDEX, SINGLE
from lowmoe.checkpoint.packings.packing import Weight
from lowmoe.checkpoint.packings.quantization_config import read_packings
from lowmoe.checkpoint.pieces import cut_out, require_finite
from lowmoe.checkpoint.safetensors_file import SafetensorsFile, TensorEntry
from lowmoe.errors import CheckpointError, FolderError
from lowmoe.spec import Piece

MAX_JSON_BYTES = 64 * 2**20
PLAIN_DTYPES = ("BF16", "F16", "F32")


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

        Raises CheckpointError for files that are missing, malformed or point elsewhere;
        UnsupportedModelError for weights packed in a way that is not implemented.
        """
        self.folder = folder
        self.config = read_json(folder / CONFIG)
        self._packings = read_packings(self.config)
        self._shards = LocalShards(folder) if shards is None else shards
        self._open: dict[str, SafetensorsFile] = {}
        self._zeros: dict[str, list[str]] = {}
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
            self._require_zeros(shard)
        return self._open[shard]

    def _require_zeros(self, shard: str) -> None:
        """Hold what was ignored as zeros of an open shard to being zeros."""
        for name in self._zeros.pop(shard, ()):
            if name in self._open[shard].tensors and self._open[shard].read(name).any():
                raise CheckpointError(
                    f"{shard}: {name} is not zero, but the model that config.json describes has no "
                    "such bias. The weights and config.json look like different models; download "
                    "both again."
                )

    def names(self) -> set[str]:
        """Every tensor's name."""
        return set(self._shard_of)

    @property
    def quant_method(self) -> str | None:
        """What config.json calls the way weights are packed; None for plain ones."""
        return self._packings.method

    def stored(self, name: str) -> tuple[str, ...]:
        """The tensors in the files that a weight is made of: itself, or what it is packed into."""
        return self._packings.stored(name, self._shard_of) or (name,)

    def ignores(self, name: str) -> bool:
        """Whether a tensor beside packed weights is of no use to them.

        Biases that are zeros are; they are held to that when their shard is read, or now.
        """
        if self._packings.of_activations(name):
            return True
        if not (name.endswith(".bias") and self._packings.zero_bias(name, self._shard_of)):
            return False
        shard = self._shard_of[name]
        self._zeros.setdefault(shard, []).append(name)
        if shard in self._open:
            self._require_zeros(shard)
        return True

    def read_piece(self, piece: Piece) -> Tensor:
        """A role's tensor, rows out and columns in, float32 where it was packed; only as much of
        the files is read as holds it.

        Raises CheckpointError if it is missing, not of this shape or not finite.
        """
        packed = self._packings.open(Weight(name=piece.name, shape=piece.shape, files=self))
        if packed is None:
            self._require_plain(piece.name, piece.shape)
            rows = self.read_stored(piece.name, piece.first, piece.count)
        else:
            rows = packed.rows(piece.first, piece.count)
        shard = self._shard_of[self.stored(piece.name)[0]]
        return cut_out(require_finite(rows, piece.name, shard), piece)

    def stored_bytes(self, piece: Piece) -> int:
        """How many bytes of the files reading a piece takes."""
        n_bytes = sum(self.entry(name).n_bytes for name in self.stored(piece.name))
        return n_bytes * piece.count // piece.shape[0]

    def check_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Hold tensors against these shapes before work begins, as far as their files are here.

        Shards that are still to be fetched are checked when they are read.
        """
        if isinstance(self._shards, LocalShards):
            for name, shape in shapes.items():
                if self._packings.open(Weight(name=name, shape=shape, files=self)) is None:
                    self._require_plain(name, shape)

    def _require_plain(self, name: str, shape: tuple[int, ...]) -> None:
        entry, file = self.entry(name), self._shard_of[name]
        if entry.shape != shape:
            raise CheckpointError(
                f"{file}: {name} is {list(entry.shape)}, but config.json needs {list(shape)}. "
                "The weights and config.json look like different models; download both again."
            )
        if entry.dtype not in PLAIN_DTYPES:
            raise CheckpointError(
                f"{file}: {name} has dtype {entry.dtype} and nothing beside it that config.json "
                f"says it is packed with, but {', '.join(PLAIN_DTYPES)} are implemented for plain "
                "weights. Look for a checkpoint in bfloat16."
            )

    # --- stored tensors, see StoredTensors

    def __contains__(self, name: object) -> bool:
        """Whether any file holds a tensor of this name."""
        return name in self._shard_of

    def entry(self, name: str) -> TensorEntry:
        """Dtype and shape of a stored tensor.  Raises CheckpointError if it is missing."""
        return self._file_of(name).tensors[name]

    def read_stored(self, name: str, first: int, count: int) -> Tensor:
        """Some of a stored tensor's first axis, in the dtype of the file."""
        return self._file_of(name).read_rows(name, first, count)

    def read_whole(self, name: str) -> Tensor:
        """A stored tensor, in the dtype of the file."""
        return self._file_of(name).read(name)

    def _file_of(self, name: str) -> SafetensorsFile:
        if name not in self._shard_of:
            raise CheckpointError(
                f"{self.folder}: has no tensor {name}, which config.json promises. The weights and "
                "config.json look like different models; download both again."
            )
        file = self._file(self._shard_of[name])
        if name not in file.tensors:
            raise CheckpointError(f"{file.path}: has no tensor {name}, but {INDEX} says so.")
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
        """Say that these weights will not be read again; a shard without others is released."""
        for name in (stored for weight in names for stored in self.stored(weight)):
            shard = self._shard_of.get(name)
            if shard is None or name not in self._needed[shard]:
                continue
            self._needed[shard].discard(name)
            if not self._needed[shard]:
                self._open.pop(shard, None)
                self._shards.release(shard)


def _require_weights(folder: Path) -> None:
    if (folder / SINGLE).is_file():
        return
    others = sorted(
        p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".gguf")
    )
    found = "found none. Is this the folder of a checkpoint?"
    if others:
        found = (
            f"found {', '.join(others[:3])}, which cannot be read, as pickles can run code. Look "
            "for the model as safetensors or GGUF."
        )
    if gguf := [name for name in others if name.endswith(".gguf")]:
        found = f"found {gguf[0]}; to read that, give the file itself: {folder / gguf[0]}"
    raise CheckpointError(f"{folder}: needs {SINGLE} or {INDEX}, {found}")


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
