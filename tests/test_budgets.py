"""Is what was promised of disk and RAM what a conversion really takes?"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import huggingface_hub
import pytest
from safetensors.torch import load_file, save

from lowmoe.checkpoint import files
from lowmoe.errors import DiskSpaceError, MemoryBudgetError
from lowmoe.families import Family, read_config
from lowmoe.library import MakeOptions, SilentReporter, making, models_home, pull
from lowmoe.library.budgets import WORKER_BYTES, most_shard_bytes, worker_processes
from lowmoe.loader.hub import HubRepository, RetryPolicy
from lowmoe.settings import Settings
from tests.loader.fake_hub import FakeHub

QUICK = MakeOptions(bits=2, calibrate=False)
INDEX = "model.safetensors.index.json"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home")


@pytest.fixture
def family(talking_checkpoint: Path) -> Family:
    return read_config(json.loads((talking_checkpoint / "config.json").read_text()))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    huggingface_hub.close_session()
    with FakeHub() as hub:
        there = partial(Watched, endpoint=hub.endpoint, retry=RetryPolicy(tries=1))
        monkeypatch.setattr(making, "HubRepository", there)
        Watched.most = 0
        yield hub
    huggingface_hub.close_session()


class Watched(HubRepository):
    """Remembers the most bytes of shards that ever lay in its folder."""

    most = 0

    def fetch(self, name: str) -> Path:
        path = super().fetch(name)
        Watched.most = max(Watched.most, self.shard_bytes_here())
        return path


def in_shards(checkpoint: Path, shard_of: Mapping[str, str]) -> dict[str, bytes]:
    """The files of a checkpoint with its tensors laid out anew."""
    tensors = load_file(checkpoint / "model.safetensors")
    found = {p.name: p.read_bytes() for p in checkpoint.iterdir() if p.suffix != ".safetensors"}
    for shard in set(shard_of.values()):
        found[shard] = save({n: t for n, t in tensors.items() if shard_of[n] == shard})
    return found | {INDEX: json.dumps({"weight_map": shard_of}).encode()}


def by_layer(name: str) -> str:
    layer = re.search(r"layers\.(\d+)", name)
    return layer[1] if layer else "ends"


def by_expert(name: str) -> str:
    expert = re.search(r"experts\.(\d+)", name)
    return expert[1] if expert else "rest"


def each_for_itself(name: str) -> str:
    return name


def by_alphabet(name: str) -> str:
    return "first" if name < "model.layers.0.q" else "second"


@pytest.mark.parametrize("shard", [by_layer, by_expert, each_for_itself, by_alphabet])
def test_no_more_shards_lie_on_the_disk_than_was_reckoned(
    hub: FakeHub, settings: Settings, talking_checkpoint: Path, family: Family, shard: object
) -> None:
    assert callable(shard)
    tensors = load_file(talking_checkpoint / "model.safetensors")
    shard_of = {name: f"{shard(name)}.safetensors" for name in tensors}
    laid_out = in_shards(talking_checkpoint, shard_of)
    hub.add_commit(laid_out)
    pull(hub.repo_id, models_home(settings) / "new", settings, QUICK, SilentReporter())
    sizes = {name: len(data) for name, data in laid_out.items() if name.endswith(".safetensors")}
    assert most_shard_bytes(shard_of, sizes, family) == Watched.most


def bytes_needed(hub: FakeHub, settings: Settings, options: MakeOptions) -> int:
    folder = models_home(settings) / "new"
    with pytest.raises(DiskSpaceError, match="bytes of free disk, but 0 are free") as refused:
        pull(hub.repo_id, folder, settings, options, SilentReporter())
    found = re.search(r"needs (\d+) bytes", str(refused.value))
    assert found is not None
    return int(found[1])


def test_disk_is_needed_for_the_calibration_state_and_not_for_what_is_here(
    hub: FakeHub,
    settings: Settings,
    talking_checkpoint: Path,
    family: Family,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub.add_commit({p.name: p.read_bytes() for p in talking_checkpoint.iterdir()})
    monkeypatch.setattr(files, "free_bytes", lambda path: 0)
    needed = bytes_needed(hub, settings, QUICK)
    n_tokens = 512  # conftest.py's
    states = 2 * 4 * n_tokens * family.spec.n_hidden
    assert bytes_needed(hub, settings, replace(QUICK, calibrate=True)) == needed + states
    begun = settings.home / "work" / "new" / "model.safetensors.part"
    begun.write_bytes(bytes(5000))
    assert bytes_needed(hub, settings, QUICK) == needed - 5000


class Noting(SilentReporter):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def ram_needed(family: Family, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr("lowmoe.library.budgets.available_ram_bytes", lambda: 0)
    with pytest.raises(MemoryBudgetError, match="needs about") as refused:
        worker_processes(family, QUICK, Noting())
    found = re.search(r"about (\d+) bytes", str(refused.value))
    assert found is not None
    return int(found[1])


@pytest.mark.parametrize(
    ("spare_workers", "n_workers", "is_noted"), [(0, 1, True), (2.9, 2, True), (8, 8, False)]
)
def test_no_more_processes_encode_than_fit_into_ram(
    family: Family,
    monkeypatch: pytest.MonkeyPatch,
    spare_workers: float,
    n_workers: int,
    is_noted: bool,
) -> None:
    available = ram_needed(family, monkeypatch) + int(spare_workers * WORKER_BYTES)
    monkeypatch.setattr("lowmoe.library.budgets.available_ram_bytes", lambda: available)
    report = Noting()
    assert worker_processes(family, replace(QUICK, threads=8), report) == n_workers
    assert [n.split(" encoder")[0] for n in report.notes] == (
        [f"{n_workers} instead of 8"] if is_noted else []
    )


def test_all_cores_encode_unless_nothing_is_to_be_encoded(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowmoe.library.budgets.available_ram_bytes", lambda: 2**50)
    monkeypatch.setattr("lowmoe.library.budgets.physical_cores", lambda: 6)
    assert worker_processes(family, QUICK, Noting()) == 6
    assert worker_processes(family, replace(QUICK, format="bf16"), Noting()) == 1
