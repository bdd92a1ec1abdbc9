"""`lowmoe quantize` and `lowmoe pull`.

Knows:        which models may be made from what.
Ignorant of:  how they are made.
"""

from pathlib import Path

from lowmoe.checkpoint.gguf_split import SUFFIX
from lowmoe.checkpoint.manifest import MANIFEST, read_manifest
from lowmoe.cli.render import TerminalReporter, err, size
from lowmoe.errors import UsageError
from lowmoe.library import (
    HubModel,
    LocalFolder,
    MakeOptions,
    locate,
    prepare,
    quantize_checkpoint,
    recipe_words,
    require_recipe,
)
from lowmoe.settings import read_settings


def quantize_command(source: Path, folder: Path, options: MakeOptions) -> None:
    """Make a model folder from a checkpoint on disk."""
    if not source.is_dir() and not (source.suffix == SUFFIX and source.is_file()):
        raise UsageError(
            f"{source}: no such folder. Give the folder of a checkpoint, or a GGUF file."
        )
    if (folder / MANIFEST).is_file():
        found = recipe_words(read_manifest(folder).recipe)
        raise UsageError(
            f"{folder}: is a finished model already with {found}, asked for is "
            f"{recipe_words(options.recipe())}. Give another folder, or remove this one (lowmoe rm "
            f"{folder.name}, if it is in the home)."
        )
    with TerminalReporter() as report:
        quantize_checkpoint(source, folder, options, report)
    _done(folder)


def pull_command(name: str, options: MakeOptions) -> None:
    """Download and quantize a repository into the model home."""
    settings = read_settings()
    located = locate(name, settings)
    if isinstance(located, LocalFolder):
        require_recipe(located.path, options)
        err.print(f"{located.path} is complete already.", style="dim", markup=False, soft_wrap=True)
        return
    if not isinstance(located, HubModel):
        raise UsageError(f"{name}: is on this disk already. Run it, or give a hub repository.")
    with TerminalReporter() as report:
        folder = prepare(located, settings, options, report)
    _done(folder)


def _done(folder: Path) -> None:
    total = sum(f.stat().st_size for f in folder.iterdir())
    err.print(f"{folder}: {size(total)}, complete", markup=False, soft_wrap=True)
