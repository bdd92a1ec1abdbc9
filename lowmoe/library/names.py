"""What a name stands for, which models this home holds, removing them.

Knows:        aliases, hub ids, checkpoints, model folders, what a pull leaves under way.
Ignorant of:  making and running models; torch, so that a name is understood before that is there.
"""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import xxhash
from filelock import FileLock, Timeout

from lowmoe.checkpoint import files
from lowmoe.checkpoint.file_names import CONFIG, MANIFEST
from lowmoe.checkpoint.gguf_split import SUFFIX, split_paths
from lowmoe.errors import FolderError, UnknownModelError
from lowmoe.families.aliases import ALIASES, DEMO, hint_of
from lowmoe.settings import Settings

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_KIND = re.compile(r"[\w.-]+")


@dataclass(frozen=True, slots=True)
class LocalFolder:
    """A finished model folder."""

    path: Path


@dataclass(frozen=True, slots=True)
class LocalCheckpoint:
    """A checkpoint on this disk: a Hugging Face folder, or a GGUF file, the first of a split."""

    path: Path

    @property
    def home_name(self) -> str:
        """Its model folder's name: another one as soon as any of its files is another."""
        state = xxhash.xxh3_64(str(self.path.resolve()).encode())
        for path in self._paths():
            status = path.stat()
            state.update(f"{path.name} {status.st_size} {status.st_mtime_ns}".encode())
        name = self.path.resolve().name.removesuffix(SUFFIX)
        return f"{name}-{state.hexdigest()[:8]}"

    def _paths(self) -> list[Path]:
        if self.path.is_file():
            return split_paths(self.path)
        kinds = (".json", ".safetensors", ".jinja", ".model", ".tiktoken")
        return sorted(path for path in self.path.iterdir() if path.suffix in kinds)


@dataclass(frozen=True, slots=True)
class HubModel:
    """A repository on the hub.  kind: of its GGUF files, as in owner/name:Q4_K_M."""

    repo_id: str
    kind: str | None = None

    @classmethod
    def named(cls, name: str) -> "HubModel":
        """By an alias, a repository id or a listed name, with a kind or without."""
        repo_id, colon, kind = name.partition(":")
        if repo_id in ALIASES:
            repo_id = ALIASES[repo_id].repository
        return cls(repo_id, kind.upper() if colon else None)

    @property
    def home_name(self) -> str:
        kind = "" if self.kind is None else f"--{self.kind}"
        return self.repo_id.replace("/", "--") + kind

    @property
    def could_be(self) -> bool:
        """Whether a hub allows such a name."""
        kind = self.kind is None or _KIND.fullmatch(self.kind) is not None
        return kind and _REPO_ID.fullmatch(self.repo_id) is not None


Located = LocalFolder | LocalCheckpoint | HubModel


def locate(model: str, settings: Settings) -> Located:
    """What MODEL is: an alias, a hub repository id, a path, of a folder or a GGUF file, or a name
    that `list` shows.

    What was pulled before is a folder.  Raises UnknownModelError if it is none of these.
    """
    if model == DEMO:
        return LocalFolder(demo_folder())
    path = Path(model).expanduser()
    if path.is_dir():
        return _locate_folder(path)
    if path.suffix == SUFFIX:
        if path.is_file():
            return LocalCheckpoint(path)
        raise UnknownModelError(f"{path}: there is no such file. Give the path of a GGUF file.")
    if path.is_file():
        raise UnknownModelError(
            f"{path}: is a file, but not of GGUF (*{SUFFIX}). Give the folder of a checkpoint or "
            "of a model, or a GGUF file."
        )
    on_hub = HubModel.named(model)
    named = models_home(settings) / on_hub.home_name
    if (named / MANIFEST).is_file():
        return LocalFolder(named)
    if on_hub.could_be:
        return on_hub
    raise UnknownModelError(
        f"{model!r} is no alias, no hub repository (owner/name, owner/name:Q8_0) and no folder "
        f"here. {hint_of(model)}"
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


def made_folder(located: Located, settings: Settings) -> Path | None:
    """The finished model folder of what was located, if there is one."""
    if isinstance(located, LocalFolder):
        return located.path
    folder = models_home(settings) / located.home_name
    return folder if (folder / MANIFEST).is_file() else None


def demo_folder() -> Path:
    """The model that ships with the package."""
    return Path(str(resources.files("lowmoe") / "demo"))


def models_home(settings: Settings) -> Path:
    """Where model folders are kept."""
    return settings.home / "models"


def work_home(settings: Settings) -> Path:
    """Where pulls keep what they have under way."""
    return settings.home / "work"


@dataclass(frozen=True, slots=True, kw_only=True)
class Installed:
    """A model of the home.  finished: False where a pull or a conversion was interrupted.

    path: the model folder, or what was pulled where there is none yet; n_bytes: of both.
    """

    name: str
    path: Path
    n_bytes: int
    finished: bool


def installed(settings: Settings) -> list[Installed]:
    """The models of the home, by name."""
    models, works = _folders(models_home(settings)), _folders(work_home(settings))
    return [
        Installed(
            name=name,
            path=models.get(name, works.get(name, models_home(settings))),
            n_bytes=sum(_bytes_in(places[name]) for places in (models, works) if name in places),
            finished=name in models and (models[name] / MANIFEST).is_file(),
        )
        for name in sorted({*models, *works})
    ]


def _folders(home: Path) -> dict[str, Path]:
    try:
        return {p.name: p for p in home.iterdir() if p.is_dir()} if home.is_dir() else {}
    except OSError as e:
        raise FolderError(f"{home}: listing it gave {e.strerror}. Set LOWMOE_HOME.") from e


def _bytes_in(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.iterdir() if f.is_file())


def find_installed(name: str, settings: Settings) -> Installed:
    """The model of the home, finished or not, that an alias, hub id or listed name stands for."""
    home_name = HubModel.named(name).home_name
    models = {model.name: model for model in installed(settings)}
    if name == DEMO:
        raise UnknownModelError(f"{name!r} comes with lowmoe and cannot be deleted.")
    if home_name not in models:
        known = ", ".join(models) or "none"
        raise UnknownModelError(
            f"{name!r} is not among the models in {models_home(settings)}: {known}."
        )
    return models[home_name]


def remove(model: Installed, settings: Settings) -> None:
    """Delete a model of the home, and what its pull had under way."""
    folder = models_home(settings) / model.name
    with locked(folder), _disk_faults(model.path, "removing it"):
        # The manifest first: what is left of a removal that was interrupted is unfinished.
        files.remove(folder / MANIFEST)
        for path in (folder, work_home(settings) / model.name):
            if path.is_dir():
                shutil.rmtree(path)


def drop_finished_work(folder: Path, settings: Settings) -> None:
    """Delete what the pull of a finished model of the home had under way.

    A pull that was killed in its last moments leaves it, and none goes on from it.
    """
    work = work_home(settings) / folder.name
    # A folder elsewhere only has its name in common with a pull.
    if folder.parent != models_home(settings) or not work.is_dir():
        return
    # Whoever holds the lock deletes it too; a home that cannot be written to still has its models.
    with suppress(FolderError), locked(folder), _disk_faults(work, "removing it"):
        if (folder / MANIFEST).is_file():  # nobody removed it and began anew in between
            shutil.rmtree(work)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
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
        # Removed while it is held: whoever opened it meanwhile notices, as filelock looks at how
        # many names what it locked has, and is refused.
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
