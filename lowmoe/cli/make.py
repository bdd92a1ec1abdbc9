"""`lowmoe quantize` and `lowmoe pull`.

Knows:        which models may be made from what.
Ignorant of:  how they are made.
"""

from pathlib import Path

from lowmoe.checkpoint.file_names import MANIFEST
from lowmoe.checkpoint.gguf_split import SUFFIX
from lowmoe.checkpoint.manifest import read_manifest
from lowmoe.cli.render import TerminalReporter, err, size
from lowmoe.engine.load_options import LoadOptions
from lowmoe.errors import UsageError
from lowmoe.library.configs import spec_of
from lowmoe.library.making import prepare, quantize_checkpoint, recipe_words, require_recipe
from lowmoe.library.names import HubModel, LocalFolder, drop_finished_work, locate
from lowmoe.library.options import MakeOptions
from lowmoe.plan.advice import advise
from lowmoe.settings import read_settings
from quant.layout import SYMBOL_BITS


def quantize_command(source: Path, folder: Path, options: MakeOptions) -> None:
    """Make a model folder from a checkpoint on disk."""
    if not source.is_dir() and not (source.suffix == SUFFIX and source.is_file()):
        found = "no GGUF file" if source.is_file() else "no such folder"
        named = f" For a model of the hub: lowmoe pull {source}." if not source.exists() else ""
        raise UsageError(
            f"{source}: {found}. Give the folder of a checkpoint, or a GGUF file.{named}"
        )
    if (source / MANIFEST).is_file():
        raise UsageError(
            f"{source}: is a finished model folder. Give the checkpoint that it was made of; or "
            "run it with fewer --bits as it is."
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


def advised_bits(name: str, format: str) -> int:
    """The width at which a model runs best here, which is said.

    Raises as `locate`, and MemoryBudgetError where none would run.
    """
    settings, default = read_settings(), MakeOptions().bits
    located = locate(name, settings)
    if isinstance(located, LocalFolder):
        return read_manifest(located.path).recipe.expert_planes * SYMBOL_BITS
    if not isinstance(located, HubModel) or format != "trellis":
        return default  # the first is refused, other formats have widths of their own
    spec = spec_of(name, settings)
    advice = advise(name, spec, LoadOptions(), settings)
    err.print(advice.words, style="dim", markup=False, soft_wrap=True)
    return advice.bits


def pull_command(name: str, options: MakeOptions) -> None:
    """Download and quantize a repository into the model home."""
    settings = read_settings()
    located = locate(name, settings)
    if isinstance(located, LocalFolder):
        require_recipe(located.path, options)
        drop_finished_work(located.path, settings)
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
