"""A checkpoint on this disk, whatever files it lies in, with the family that knows its names.

Knows:        a folder of config.json and safetensors, a GGUF file.
Ignorant of:  what is done with the tensors.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lowmoe.checkpoint import files
from lowmoe.checkpoint.gguf_split import SUFFIX
from lowmoe.checkpoint.reader import Checkpoint
from lowmoe.checkpoint.tensors import CheckpointFiles
from lowmoe.families import Family, read_config

TOKENIZER = "tokenizer.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenCheckpoint:
    """form: how weights lie in it, for people; small_file: what the tokenizer's or another small
    file of a name holds, None without one.
    """

    files: CheckpointFiles
    family: Family
    form: str
    small_file: Callable[[str], bytes | None]


def open_checkpoint(path: Path) -> OpenCheckpoint:
    """path: a folder, or a GGUF file.  Raises CheckpointError, before any weight is read."""
    if path.suffix == SUFFIX:
        return _open_gguf(path)
    return in_folder(Checkpoint(path), path)


def in_folder(checkpoint: Checkpoint, folder: Path) -> OpenCheckpoint:
    """folder: of its small files."""
    packed = checkpoint.quant_method
    family = read_config(checkpoint.config).as_found(checkpoint.names())

    def small_file(name: str) -> bytes | None:
        found = small_file_in(folder, name)
        if found is None and name == TOKENIZER:
            return _made_tokenizer(family.spec.model_type, folder)
        return found

    return OpenCheckpoint(
        files=checkpoint,
        family=family,
        form=f"checkpoint, {'unquantized' if packed is None else f'packed as {packed}'}",
        small_file=small_file,
    )


def _open_gguf(path: Path) -> OpenCheckpoint:
    # Those who never open such a file do not wait for the gguf package.
    from lowmoe.checkpoint.gguf_checkpoint import GgufCheckpoint
    from lowmoe.checkpoint.gguf_file import GgufFiles
    from lowmoe.families.gguf import gguf_config, gguf_family, gguf_small_file

    found = GgufFiles.open(path)
    shapes = found.shapes()

    def vector(name: str) -> Sequence[float]:
        numbers: list[float] = found.read_rows(name, shapes[name], 0, shapes[name][0]).tolist()
        return numbers

    checkpoint = GgufCheckpoint(found, gguf_config(found.values, shapes, vector))
    return OpenCheckpoint(
        files=checkpoint,
        family=gguf_family(checkpoint.config, found.values, checkpoint.names()),
        form="GGUF",
        small_file=lambda name: gguf_small_file(found.values, name),
    )


def _made_tokenizer(model_type: str, folder: Path) -> bytes | None:
    from lowmoe.families.tokenizer_files import made_tokenizer

    return made_tokenizer(model_type, lambda name: small_file_in(folder, name))


def small_file_in(folder: Path, name: str) -> bytes | None:
    """A small file's content, None where the folder has none of that name."""
    path = folder / name
    return files.read_all(path, limit=files.MAX_SMALL_BYTES) if path.is_file() else None
