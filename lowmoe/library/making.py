"""Making a model folder out of what a name stands for.

Knows:        checkpoints, hub repositories, the order of checks, locks and work.
Ignorant of:  running models; how progress is shown; how much memory and disk is needed.
"""

from pathlib import Path

from lowmoe.checkpoint import files
from lowmoe.checkpoint.file_names import CONFIG, MANIFEST
from lowmoe.checkpoint.layout import Recipe
from lowmoe.checkpoint.manifest import Source, read_manifest
from lowmoe.checkpoint.reader import Checkpoint, read_json
from lowmoe.checkpoint.writer import JOURNAL
from lowmoe.decoder.open_checkpoint import OpenCheckpoint, in_folder, open_checkpoint
from lowmoe.decoder.weights import CheckpointTensors
from lowmoe.engine.load_options import TORCH
from lowmoe.engine.machine import physical_cores
from lowmoe.engine.report import OnceUnderWay, Reporter
from lowmoe.engine.template_file import template_file
from lowmoe.engine.text_parts import SMALL_FILES
from lowmoe.errors import UsageError
from lowmoe.families import read_config
from lowmoe.kernels import cpu
from lowmoe.kernels.cpu.encode import NativeEncoder
from lowmoe.library import gguf_pulls
from lowmoe.library.budgets import check_pull_disk, check_ram, shards_of_pull
from lowmoe.library.calibration import calibration_text
from lowmoe.library.names import (
    HubModel,
    LocalCheckpoint,
    LocalFolder,
    Located,
    drop_finished_work,
    locked,
    made_folder,
    models_home,
    work_home,
)
from lowmoe.library.options import MakeOptions
from lowmoe.loader.convert import Conversion, Progress
from lowmoe.loader.hub import DownloadProgress, HubRepository
from lowmoe.settings import Settings, read_settings
from quant.encode import Encode, encode_planes
from quant.layout import SYMBOL_BITS

NO_CALIBRATION = (
    "without calibration all channels are coded alike. The demo model, whose channels are about as "
    "loud as each other, hardly minds; with channels as loud as a large model's its KL divergence "
    "is 82 times higher at 4 bits (1.37 instead of .017, see the README)."
)
NO_TEMPLATE = (
    "has no chat template, so it goes on with texts and answers no messages; a base model, or "
    "one whose makers write prompts in code."
)


def prepare(located: Located, settings: Settings, options: MakeOptions, report: Reporter) -> Path:
    """The model folder of what was located, made now if need be."""
    if made := made_folder(located, settings):
        drop_finished_work(made, settings)
        return made
    assert not isinstance(located, LocalFolder)
    folder = models_home(settings) / located.home_name
    if isinstance(located, LocalCheckpoint):
        quantize_checkpoint(located.path, folder, options, report)
    else:
        pull(located, folder, settings, options, report)
    return folder


def require_recipe(folder: Path, options: MakeOptions) -> None:
    """Raises UsageError if a finished folder cannot serve what was asked for.

    Other planes of experts are files of their own, so a folder of 6 bits serves 4 and 2 too.
    """
    found, asked = read_manifest(folder).recipe, options.recipe()
    if found.format == asked.format and (
        found.format != "trellis" or found.expert_planes >= asked.expert_planes
    ):
        return
    raise UsageError(
        f"{folder}: is finished with {recipe_words(found)}, asked for is {recipe_words(asked)}. "
        f"Ask for what is there, or remove it first: lowmoe rm {folder.name}"
    )


def recipe_words(recipe: Recipe) -> str:
    """A recipe as a user would say it."""
    if recipe.format == "trellis":
        return f"trellis at {recipe.expert_planes * SYMBOL_BITS} bits"
    return recipe.format


def quantize_checkpoint(source: Path, folder: Path, options: MakeOptions, report: Reporter) -> None:
    """Make a model folder from a checkpoint on this disk."""
    if source.resolve() == folder.resolve():
        raise UsageError(f"{folder}: is the checkpoint itself. Give the model another folder.")
    if folder.is_dir() and any(folder.iterdir()) and not _is_ours(folder):
        raise UsageError(f"{folder}: is not empty and no model folder. Give an empty or new one.")
    checkpoint = open_checkpoint(source)
    check_ram(checkpoint.family, options)
    origin = Source(name=source.resolve().name, commit=None)
    files.make_folder(folder.parent)
    with locked(folder):
        _convert(checkpoint, folder, origin, options, report)


def pull(
    model: HubModel, folder: Path, settings: Settings, options: MakeOptions, report: Reporter
) -> None:
    """Download a repository shard by shard, or one of its GGUF files, and make a model folder.

    Of safetensors, the disk never holds more than the result, the calibration state and the shards
    that were begun and are still to be read from. How much that is, and RAM, are checked before the
    first shard, or once the header of a GGUF file is here.
    """

    def downloaded(p: DownloadProgress) -> None:
        report.step("download", p.bytes_done, p.bytes_total, "B")

    files.make_folder(folder.parent)
    with locked(folder):
        work = work_home(settings) / folder.name
        repository = HubRepository(model.repo_id, kind=model.kind, folder=work, progress=downloaded)
        if repository.choice is None:
            checkpoint = _of_shards(repository, folder, options, report)
        else:
            checkpoint = _of_gguf(repository, folder, options, report)
        if template_file(checkpoint.small_file) is None:
            report.note(f"{model.repo_id}: {NO_TEMPLATE}")
        origin = Source(name=model.repo_id, commit=repository.commit)
        _convert(checkpoint, folder, origin, options, report)
        repository.forget()


def _of_shards(
    repository: HubRepository, folder: Path, options: MakeOptions, report: Reporter
) -> OpenCheckpoint:
    small = repository.fetch_small()
    family = read_config(read_json(small / CONFIG))
    check_ram(family, options)
    shards = shards_of_pull(repository, small, family)
    check_pull_disk(repository, shards, family, folder, options, report)
    return in_folder(Checkpoint(small, repository), small)  # fetches a single shard


def _of_gguf(
    repository: HubRepository, folder: Path, options: MakeOptions, report: Reporter
) -> OpenCheckpoint:
    report.note(f"{repository.repo_id}: takes {repository.choice}")
    family = gguf_pulls.family_of(repository)
    check_ram(family, options)
    check_pull_disk(repository, repository.total_bytes(), family, folder, options, report)
    return gguf_pulls.fetched(repository)


def _convert(
    checkpoint: OpenCheckpoint,
    folder: Path,
    source: Source,
    options: MakeOptions,
    report: Reporter,
) -> None:
    found = {name: checkpoint.small_file(name) for name in SMALL_FILES}
    small_files = {name: data for name, data in found.items() if data is not None}
    if options.recipe().dense_dtype is None and not options.calibrate:
        report.note(NO_CALIBRATION)

    # Said once work began, as whatever is wrong before that is told in one line.
    told = OnceUnderWay(
        report,
        f"{source.name}: quantized once, {recipe_words(options.recipe())}, into {folder}; "
        "from then on it starts at once",
    )

    def coded(p: Progress) -> None:
        told.step("quantize", p.done, p.total, "weights")

    calibration = None
    if options.calibrates:
        calibration = calibration_text(options.calibration, small_files, checkpoint.family)
    Conversion(
        CheckpointTensors(checkpoint.files, checkpoint.family),
        folder,
        options.recipe(),
        source=source,
        small_files=small_files,
        calibration=calibration,
        encode=_encoder(options),
        progress=coded,
    ).run()


def _encoder(options: MakeOptions) -> Encode:
    """Native code, unless LOWMOE_ISA asks for torch."""
    forced = read_settings().isa
    if forced == TORCH:
        return encode_planes
    threads = options.threads or physical_cores()
    return NativeEncoder(isa=cpu.choose_isa(forced), threads=threads).encode


def _is_ours(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (MANIFEST, JOURNAL))
