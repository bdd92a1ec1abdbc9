"""The shape of a model that need not be on this disk, by its config.json.

Knows:        aliases, folders, checkpoints, files, the hub, addresses of a file.
Ignorant of:  what a config says.
"""

import json
import re
import tempfile
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowmoe.checkpoint.file_names import CONFIG
from lowmoe.checkpoint.gguf_split import SUFFIX
from lowmoe.checkpoint.manifest import read_manifest
from lowmoe.checkpoint.reader import read_json
from lowmoe.decoder.open_checkpoint import open_checkpoint
from lowmoe.errors import DownloadError, UsageError
from lowmoe.families import read_config
from lowmoe.families.aliases import ALIASES
from lowmoe.library import gguf_pulls
from lowmoe.library.names import HubModel, LocalCheckpoint, LocalFolder, locate
from lowmoe.loader.hub import HubRepository
from lowmoe.settings import Settings
from lowmoe.spec import ModelSpec

MAX_BYTES = 16 * 2**20
TIMEOUT_S = 30.0
_PAGE = re.compile(r"https://[\w.-]+/([\w.-]+/[\w.-]+?)/?")


def spec_of(model: str, settings: Settings) -> ModelSpec:
    """Of an alias, a folder, a checkpoint, a GGUF file, a config.json or its address, a hub
    repository or its page; of an alias without a network.

    Raises UnknownModelError for none of these; DownloadError, CheckpointError, UsageError,
    UnsupportedModelError.
    """
    path = Path(model).expanduser()
    if path.suffix == SUFFIX and path.is_file():
        return open_checkpoint(path).family.spec
    found = _config_of(model, settings)
    if isinstance(found, HubModel):
        return _of_repository(found)
    return read_config(found).spec


def _config_of(model: str, settings: Settings) -> Mapping[str, Any] | HubModel:
    """What its config.json says, or the repository that has to be asked."""
    if model in ALIASES:
        return ALIASES[model].config
    if page := _PAGE.fullmatch(model):
        model = page[1]
    elif "://" in model:
        return _downloaded(model)
    path = Path(model).expanduser()
    if path.is_file() and path.suffix != SUFFIX:
        return read_json(path)
    located = locate(model, settings)
    if isinstance(located, LocalFolder):
        return read_manifest(located.path).config
    if isinstance(located, LocalCheckpoint):
        return open_checkpoint(located.path).files.config
    return located


def _of_repository(model: HubModel) -> ModelSpec:
    with tempfile.TemporaryDirectory() as scratch:
        repository = HubRepository(
            model.repo_id, kind=model.kind, folder=Path(scratch), progress=None
        )
        if repository.choice is not None:
            return gguf_pulls.family_of(repository).spec
        return read_config(read_json(repository.fetch(CONFIG))).spec


def _downloaded(address: str) -> Mapping[str, Any]:
    if not address.startswith("https://"):
        raise UsageError(f"{address}: is no https address. Download the file and give its path.")
    # What the hub shows as a page is a file under another word.
    request = urllib.request.Request(address.replace("/blob/", "/resolve/"))
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            data = answer.read(MAX_BYTES + 1)
    except (urllib.error.URLError, TimeoutError, OSError) as e:
        raise DownloadError(f"{address}: {e}. Check the address and the network.") from e
    try:
        values = json.loads(data) if len(data) <= MAX_BYTES else None
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise DownloadError(f"{address}: is no JSON object of at most {MAX_BYTES} bytes.")
    return values
