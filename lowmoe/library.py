"""The models on this machine: what a name stands for, and making a model folder out of it.

    LOWMOE_HOME/models/NAME      model folders, finished or not
    LOWMOE_HOME/work/NAME        what a pull has under way

Knows:        aliases, hub ids, checkpoints, model folders; what must fit before work begins.
Ignorant of:  running models; how progress is shown.
"""

import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Protocol

import torch
import xxhash
from filelock import FileLock, Timeout

from lowmoe.checkpoint import files
from lowmoe.checkpoint.folder import ModelFolder
from lowmoe.checkpoint.layout import FORMATS, Place, Recipe, folder_layout
from lowmoe.checkpoint.manifest import MANIFEST, Source
from lowmoe.checkpoint.reader import CONFIG, Checkpoint, read_json
from lowmoe.checkpoint.safetensors_file import SafetensorsFile
from lowmoe.checkpoint.writer import SPARE_BYTES
from lowmoe.decoder.weights import CheckpointTensors
from lowmoe.engine.machine import physical_cores
from lowmoe.engine.memory import available_ram_bytes
from lowmoe.engine.text_parts import SMALL_FILES, TOKENIZER, TextParts
from lowmoe.errors import (
    DiskSpaceError,
    FolderError,
    MemoryBudgetError,
    TextError,
    UnknownModelError,
    UsageError,
)
from lowmoe.families import Family, read_config
from lowmoe.families.aliases import ALIASES, DEMO, near_names
from lowmoe.loader.convert import CalibrationText, Conversion, Progress
from lowmoe.loader.hub import DownloadProgress, HubRepository
from lowmoe.settings import Settings
from quant.layout import SYMBOL_BITS

CALIBRATION_TOKENS = 8192
CALIBRATION_SEQUENCE = 1024
SECTION_BREAK = "\n<|section|>\n"
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Working memory of a conversion beside experts and hidden states: the interpreter, torch, one
# layer's dense weights in float32 and the search's tables.
CONVERSION_SPARE_BYTES = 2**30


class Reporter(Protocol):
    """Hears how long work goes on."""

    def step(self, stage: str, done: int, total: int, unit: str) -> None:
        """So many units of a stage are done.  unit: "B" for bytes, "weights"."""

    def note(self, text: str) -> None:
        """One line worth knowing."""


class SilentReporter:
    """Tells nobody."""

    def step(self, stage: str, done: int, total: int, unit: str) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MakeOptions:
    """How to make a model folder.

    bits: of experts, 2, 4 or 6; format: "trellis", or "nf4", "bf16", "fp16", "fp32", which have
    widths of their own; calibration: a text file, None for the text that comes with lowmoe;
    calibrate: False codes all channels alike; threads: worker processes, None for all cores.
    """

    bits: int = 4
    format: str = "trellis"
    calibration: Path | None = None
    calibrate: bool = True
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.bits not in (2, 4, 6):
            raise UsageError(f"bits is {self.bits}, but must be 2, 4 or 6.")
        if self.format not in FORMATS:
            raise UsageError(f"format is {self.format!r}, but must be one of {', '.join(FORMATS)}.")
        if self.threads is not None and self.threads < 1:
            raise UsageError(f"threads is {self.threads}, but must be at least 1.")
        if self.calibration is not None and not self.calibrate:
            raise UsageError(
                f"calibration is {self.calibration}, but calibrating is switched off. "
                "Leave one of them out."
            )

    def recipe(self) -> Recipe:
        """The same in terms of planes."""
        return Recipe(format=self.format, expert_planes=self.bits // SYMBOL_BITS)


# --- what a name stands for


@dataclass(frozen=True, slots=True)
class LocalFolder:
    """A finished model folder."""

    path: Path


@dataclass(frozen=True, slots=True)
class LocalCheckpoint:
    """A Hugging Face checkpoint on this disk."""

    path: Path

    @property
    def home_name(self) -> str:
        """Its model folder's name: another one as soon as any of its files is another."""
        state = xxhash.xxh3_64(str(self.path.resolve()).encode())
        for path in sorted(self.path.iterdir()):
            if path.suffix in (".json", ".safetensors", ".jinja"):
                status = path.stat()
                state.update(f"{path.name} {status.st_size} {status.st_mtime_ns}".encode())
        return f"{self.path.resolve().name}-{state.hexdigest()[:8]}"


@dataclass(frozen=True, slots=True)
class HubModel:
    """A repository on the hub."""

    repo_id: str

    @property
    def home_name(self) -> str:
        return self.repo_id.replace("/", "--")


Located = LocalFolder | LocalCheckpoint | HubModel


def locate(model: str, settings: Settings) -> Located:
    """What MODEL is: an alias, a hub repository id, a path or a name that `list` shows.

    What was pulled before is a folder.  Raises UnknownModelError if it is none of these.
    """
    if model == DEMO:
        return LocalFolder(demo_folder())
    path = Path(model).expanduser()
    if path.is_dir():
        return _locate_folder(path)
    on_hub = HubModel(ALIASES[model].repository if model in ALIASES else model)
    named = models_home(settings) / on_hub.home_name
    if (named / MANIFEST).is_file():
        return LocalFolder(named)
    if _REPO_ID.fullmatch(on_hub.repo_id):
        return on_hub
    near = near_names(model)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise UnknownModelError(
        f"{model!r} is no alias, no hub repository (owner/name) and no folder here.{hint} "
        f"Aliases: {', '.join([DEMO, *ALIASES])}."
    )


def _locate_folder(path: Path) -> Located:
    if (path / MANIFEST).is_file():
        return LocalFolder(path)
    if (path / CONFIG).is_file():
        return LocalCheckpoint(path)
    raise FolderError(
        f"{path}: has neither {MANIFEST} (a model folder) nor {CONFIG} (a checkpoint). "
        "If a conversion was interrupted, run it again: it goes on where it stopped."
    )


def demo_folder() -> Path:
    """The model that ships with the package."""
    return Path(str(resources.files("lowmoe") / "demo"))


def models_home(settings: Settings) -> Path:
    """Where model folders are kept."""
    return settings.home / "models"


@dataclass(frozen=True, slots=True, kw_only=True)
class Installed:
    """A model folder of the home.  finished: False where a conversion was interrupted."""

    name: str
    path: Path
    n_bytes: int
    finished: bool


def installed(settings: Settings) -> list[Installed]:
    """The models of the home, by name."""
    home = models_home(settings)
    try:
        folders = sorted(p for p in home.iterdir() if p.is_dir()) if home.is_dir() else []
    except OSError as e:
        raise FolderError(f"{home}: listing it gave {e.strerror}. Set LOWMOE_HOME.") from e
    return [
        Installed(
            name=path.name,
            path=path,
            n_bytes=sum(f.stat().st_size for f in path.iterdir() if f.is_file()),
            finished=(path / MANIFEST).is_file(),
        )
        for path in folders
    ]


def find_installed(name: str, settings: Settings) -> Installed:
    """The model of the home, finished or not, that an alias, hub id or listed name stands for."""
    home_name = HubModel(ALIASES[name].repository if name in ALIASES else name).home_name
    models = {model.name: model for model in installed(settings)}
    if home_name not in models:
        known = ", ".join(models) or "none"
        raise UnknownModelError(
            f"{name!r} is not among the models in {models_home(settings)}: {known}."
        )
    return models[home_name]


def remove(model: Installed, settings: Settings) -> None:
    """Delete a model of the home."""
    with _locked(model.path), _disk_faults(model.path, "removing it"):
        # The manifest first: what is left of a removal that was interrupted is unfinished.
        files.remove(model.path / MANIFEST)
        shutil.rmtree(model.path)
        shutil.rmtree(settings.home / "work" / model.name, ignore_errors=True)


# --- making model folders


def prepare(located: Located, settings: Settings, options: MakeOptions, report: Reporter) -> Path:
    """The model folder of what was located, made now if need be."""
    if isinstance(located, LocalFolder):
        return located.path
    folder = models_home(settings) / located.home_name
    if (folder / MANIFEST).is_file():
        return folder
    if isinstance(located, LocalCheckpoint):
        quantize_checkpoint(located.path, folder, options, report)
    else:
        pull(located.repo_id, folder, settings, options, report)
    return folder


def quantize_checkpoint(source: Path, folder: Path, options: MakeOptions, report: Reporter) -> None:
    """Make a model folder from a checkpoint on this disk."""
    if source.resolve() == folder.resolve():
        raise UsageError(f"{folder}: is the checkpoint itself. Give the model another folder.")
    if folder.is_dir() and any(folder.iterdir()) and not _is_ours(folder):
        raise UsageError(f"{folder}: is not empty and no model folder. Give an empty or new one.")
    checkpoint = Checkpoint(source)
    family = read_config(checkpoint.config)
    _check_ram(family, options)
    origin = Source(name=source.resolve().name, commit=None)
    _convert(checkpoint, family, folder, origin, options, report)


def pull(
    repo_id: str, folder: Path, settings: Settings, options: MakeOptions, report: Reporter
) -> None:
    """Download a repository shard by shard and make a model folder of it.

    The disk never holds more than the result and about two shards; disk and RAM are checked
    before the first shard.
    """

    def downloaded(p: DownloadProgress) -> None:
        report.step("download", p.bytes_done, p.bytes_total, "B")

    work = settings.home / "work" / folder.name
    repository = HubRepository(repo_id, folder=work, progress=downloaded)
    checkpoint_folder = repository.fetch_small()
    family = read_config(read_json(checkpoint_folder / CONFIG))
    _check_ram(family, options)
    _check_pull_disk(repository, family, folder, options, report)
    checkpoint = Checkpoint(checkpoint_folder, repository)  # a single shard is fetched here
    origin = Source(name=repo_id, commit=repository.commit)
    _convert(checkpoint, family, folder, origin, options, report)
    repository.forget()


def _convert(
    checkpoint: Checkpoint,
    family: Family,
    folder: Path,
    source: Source,
    options: MakeOptions,
    report: Reporter,
) -> None:
    small_files = _small_files(checkpoint.folder)
    if options.recipe().dense_dtype is None and not options.calibrate:
        report.note(NO_CALIBRATION)

    def coded(p: Progress) -> None:
        report.step("quantize", p.done, p.total, "weights")

    calibration = _calibration(small_files, family, options)
    files.make_folder(folder.parent)
    with _locked(folder):
        Conversion(
            CheckpointTensors(checkpoint, family),
            folder,
            options.recipe(),
            source=source,
            small_files=small_files,
            calibration=calibration,
            n_workers=options.threads or physical_cores(),
            progress=coded,
        ).run()


NO_CALIBRATION = (
    "without calibration all channels are coded alike: on the demo model that raises the KL "
    "divergence by a tenth at 4 bits, on models with louder channels up to four times."
)


def _small_files(folder: Path) -> dict[str, bytes]:
    limit = 256 * 2**20
    return {
        name: files.read_all(folder / name, limit=limit)
        for name in SMALL_FILES
        if (folder / name).is_file()
    }


def _calibration(
    small_files: Mapping[str, bytes], family: Family, options: MakeOptions
) -> CalibrationText | None:
    if options.recipe().dense_dtype is not None or not options.calibrate:
        return None
    if TOKENIZER not in small_files:
        raise TextError(
            f"the checkpoint has no {TOKENIZER}, but calibration needs to read text. Add the file, "
            "or give --no-calibration."
        )
    text = _calibration_text(options.calibration)
    tokenizer = TextParts(small_files.get).tokenizer
    ids = section_tokens(
        [tokenizer.encode(s, add_special=False) for s in text.split(SECTION_BREAK)],
        CALIBRATION_TOKENS,
    )
    if not ids:
        raise UsageError("the calibration text is empty. Give a file with a few pages of text.")
    if max(ids) >= family.spec.n_vocab:
        raise TextError(
            f"{TOKENIZER} gives token id {max(ids)}, but config.json has a vocabulary of "
            f"{family.spec.n_vocab}. They look like different models; download both again."
        )
    length = min(CALIBRATION_SEQUENCE, family.spec.context_length)
    return CalibrationText(
        sequences=torch.split(torch.tensor(ids), length),
        text_hash=xxhash.xxh3_128_hexdigest(text.encode()),
    )


def _calibration_text(path: Path | None) -> str:
    if path is None:
        return (resources.files("lowmoe") / "loader" / "calibration.txt").read_text("utf-8")
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(f"{path}: cannot be read as UTF-8 text ({e}).") from e


def section_tokens(sections: list[list[int]], limit: int) -> list[int]:
    """At most `limit` tokens, taken from all sections as evenly as they allow, in their order."""
    room, share = limit, {}
    for left, index in enumerate(sorted(range(len(sections)), key=lambda i: len(sections[i]))):
        share[index] = min(len(sections[index]), room // (len(sections) - left))
        room -= share[index]
    return [token for i, section in enumerate(sections) for token in section[: share[i]]]


def _check_ram(family: Family, options: MakeOptions) -> None:
    """An expert twice in float32, hidden states, one layer: what a conversion holds at once."""
    spec = family.spec
    expert = 3 * spec.n_hidden * spec.uniform_experts().n_inner
    embedding = spec.n_vocab * spec.n_hidden
    tokens = CALIBRATION_TOKENS if options.calibrate else 0
    needed = max(2 * 4 * expert, 4 * embedding) + 4 * 4 * tokens * spec.n_hidden
    needed += CONVERSION_SPARE_BYTES
    available = available_ram_bytes()
    if available < needed:
        raise MemoryBudgetError(
            f"making this model needs about {needed} bytes of RAM, but {available} are available. "
            "Close other programs, or make it on a larger machine and copy the folder."
        )


def _check_pull_disk(
    repository: HubRepository,
    family: Family,
    folder: Path,
    options: MakeOptions,
    report: Reporter,
) -> None:
    result = folder_layout(family.spec, options.recipe()).total_bytes
    present = sum(f.stat().st_size for f in folder.iterdir()) if folder.is_dir() else 0
    needed = max(0, result - present) + 2 * repository.largest_shard_bytes() + SPARE_BYTES
    free = files.free_bytes(folder)
    report.note(
        f"{repository.repo_id}: {repository.total_bytes()} bytes to download, {result} bytes in "
        f"the end, at most {needed} bytes of disk in between, {free} free"
    )
    if free < needed:
        raise DiskSpaceError(
            f"{folder}: needs {needed} bytes of free disk, but {free} are free. Free "
            f"{needed - free} bytes more, or set LOWMOE_HOME to a folder on another disk."
        )


def _is_ours(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (MANIFEST, "journal.jsonl"))


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes from making or removing the same folder."""
    path = folder.with_name(folder.name + ".lock")
    lock = FileLock(path)
    try:
        with _disk_faults(path, "locking it"):
            lock.acquire(timeout=0)
    except Timeout:
        raise FolderError(
            f"{folder}: another lowmoe is making or removing it. Wait for it to end."
        ) from None
    try:
        yield
    finally:
        # Removed while it is held: whoever opened it meanwhile notices and is refused.
        with suppress(OSError):  # Windows removes no open file; there it stays
            path.unlink()
        lock.release()


@contextmanager
def _disk_faults(path: Path, doing: str) -> Iterator[None]:
    try:
        yield
    except Timeout:  # an OSError too, of another kind
        raise
    except OSError as e:
        raise FolderError(
            f"{path}: {doing} gave {e.strerror or e}. Choose a folder that can be written to."
        ) from e


def verify(folder: ModelFolder, report: Callable[[int, int], None]) -> None:
    """Read every byte of a model folder.  report: bytes done and in all.

    Raises FolderError for a span, CheckpointError for a header that was damaged.
    """
    spans = folder.manifest.spans
    _verify_headers(folder)
    total, done = sum(s.place.n_bytes for s in spans.values()), 0
    for name, span in spans.items():
        folder.read(name)
        done += span.place.n_bytes
        report(done, total)
    for name in folder.manifest.small_files:
        folder.small_file(name)


def _verify_headers(folder: ModelFolder) -> None:
    """We never read them; other people's readers of safetensors do."""
    spans = folder.manifest.spans
    for file in sorted({span.place.file for span in spans.values()}):
        found = SafetensorsFile.open(folder.path / file).tensors
        places = {name: Place(file, e.offset, e.n_bytes) for name, e in found.items()}
        wanted = {name: s.place for name, s in spans.items() if s.place.file == file}
        if places != wanted:
            name = min(n for n in {*places, *wanted} if places.get(n) != wanted.get(n))
            raise FolderError(
                f"{folder.path / file}: its header and the manifest disagree about {name}. "
                "The file was damaged; make the model again."
            )
