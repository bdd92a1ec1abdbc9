"""A hub repository's GGUF file: what model it holds, told by its beginning, and the file itself.

Knows:        that a header comes first, in every part of a split one.
Ignorant of:  which file is taken and why, what is made of it.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lowmoe.decoder.open_checkpoint import OpenCheckpoint, open_checkpoint
from lowmoe.errors import CheckpointError, FolderError
from lowmoe.families import Family, read_config
from lowmoe.loader.hub import HubRepository

if TYPE_CHECKING:
    from lowmoe.checkpoint.gguf_header import GgufHeader

# Large vocabularies take 15 MB of the first part, names of tensors less than one of the others.
BEGINNING_BYTES = 2**24


def family_of(repository: HubRepository) -> Family:
    """The family of the chosen file, its tensors by config.json's names.

    Only beginnings are fetched, and the fetch of the whole goes on behind them.
    Raises CheckpointError, UnsupportedModelError, DownloadError, DiskSpaceError.
    """
    from lowmoe.families.gguf import gguf_config

    headers = [_header(repository, name) for name in repository.shard_bytes()]
    shapes = {name: t.shape for header in headers for name, t in header.tensors.items()}

    def ones(name: str) -> Sequence[float]:
        """In place of factors of rope, which may lie further on and change no size."""
        return [1.0] * shapes[name][0]

    values: Mapping[str, Any] = headers[0].values
    return read_config(gguf_config(values, shapes, ones))


def _header(repository: HubRepository, name: str) -> "GgufHeader":
    # Those who never pull such a file do not wait for the gguf package.
    from lowmoe.checkpoint.gguf_header import MAX_HEADER_BYTES, read_header

    n_bytes, whole = BEGINNING_BYTES, repository.shard_bytes()[name]
    while True:
        path = repository.fetch_beginning(name, n_bytes)
        try:
            return read_header(path, whole)
        except FolderError:
            # It goes on; a header has an end, whatever it says.
            if n_bytes >= min(whole, 2 * MAX_HEADER_BYTES):
                raise CheckpointError(
                    f"{name}: its header does not end within {n_bytes} bytes. The upload is "
                    "damaged; name another repository."
                ) from None
            n_bytes *= 2


def fetched(repository: HubRepository) -> OpenCheckpoint:
    """The chosen file, whole and verified, open."""
    paths = [repository.fetch(name) for name in repository.shard_bytes()]
    return open_checkpoint(paths[0])
