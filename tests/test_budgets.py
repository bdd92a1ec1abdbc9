"""Is what was promised of disk and RAM what a conversion really takes?"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save

from lowmoe.checkpoint import files
from lowmoe.checkpoint.packings.quantization_config import Packings, read_packings
from lowmoe.engine.report import SilentReporter
from lowmoe.errors import DiskSpaceError, MemoryBudgetError
from lowmoe.families import Family, read_config
from lowmoe.library import making
from lowmoe.library.budgets import (
    THREAD_BYTES,
    THREAD_BYTES_A_COLUMN,
    check_ram,
    most_shard_bytes,
)
from lowmoe.library.making import pull
from lowmoe.library.names import HubModel, models_home
from lowmoe.library.options import MakeOptions
from lowmoe.loader.hub import HubRepository, RetryPolicy
from lowmoe.settings import Settings
from tests.loader.fake_hub import FakeHub

QUICK = MakeOptions(bits=2, calibrate=False)
INDEX = "model.safetensors.index.json"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home", isa=None)


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
    pull(HubModel(hub.repo_id), models_home(settings) / "new", settings, QUICK, SilentReporter())
    sizes = {name: len(data) for name, data in laid_out.items() if name.endswith(".safetensors")}
    assert most_shard_bytes(shard_of, sizes, family, Packings()) == Watched.most


def scales_last(name: str) -> str:
    return f"scales-{by_layer(name)}" if name.endswith("scale_inv") else by_layer(name)


def scales_together(name: str) -> str:
    return "scales" if name.endswith("scale_inv") else by_layer(name)


@pytest.mark.parametrize("shard", [scales_last, scales_together, each_for_itself])
def test_so_it_is_where_weights_lie_apart_from_their_scales(
    hub: FakeHub, settings: Settings, talking_checkpoint: Path, family: Family, shard: object
) -> None:
    assert callable(shard)
    tensors = {}
    for name, weight in load_file(talking_checkpoint / "model.safetensors").items():
        tensors[name] = weight
        if re.search(r"(_proj|w\d)\.weight$", name):
            tensors[name] = weight.to(torch.float8_e4m3fn)
            tensors[name + "_scale_inv"] = torch.ones(1)
    shard_of = {name: f"{shard(name)}.safetensors" for name in tensors}
    laid_out = {
        file: save({n: t for n, t in tensors.items() if shard_of[n] == file})
        for file in set(shard_of.values())
    }
    config = json.loads((talking_checkpoint / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": None}
    small = {
        p.name: p.read_bytes() for p in talking_checkpoint.iterdir() if p.suffix != ".safetensors"
    }
    index = json.dumps({"weight_map": shard_of}).encode()
    hub.add_commit(small | laid_out | {INDEX: index, "config.json": json.dumps(config).encode()})
    pull(HubModel(hub.repo_id), models_home(settings) / "new", settings, QUICK, SilentReporter())
    sizes = {name: len(data) for name, data in laid_out.items()}
    assert most_shard_bytes(shard_of, sizes, family, read_packings(config)) == Watched.most


def bytes_needed(hub: FakeHub, settings: Settings, options: MakeOptions) -> int:
    folder = models_home(settings) / "new"
    with pytest.raises(DiskSpaceError, match="bytes of free disk, but 0 are free") as refused:
        pull(HubModel(hub.repo_id), folder, settings, options, SilentReporter())
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


def ram_needed(
    family: Family, monkeypatch: pytest.MonkeyPatch, options: MakeOptions = QUICK
) -> int:
    monkeypatch.setattr("lowmoe.library.budgets.available_ram_bytes", lambda: 0)
    with pytest.raises(MemoryBudgetError, match="needs about") as refused:
        check_ram(family, options)
    found = re.search(r"about (\d+) bytes", str(refused.value))
    assert found is not None
    return int(found[1])


def test_what_fits_into_ram_is_not_refused(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = ram_needed(family, monkeypatch)
    monkeypatch.setattr("lowmoe.library.budgets.available_ram_bytes", lambda: needed)
    check_ram(family, QUICK)
    monkeypatch.setattr("lowmoe.library.budgets.available_ram_bytes", lambda: needed - 1)
    with pytest.raises(MemoryBudgetError, match=f"but {needed - 1} are available"):
        check_ram(family, QUICK)


def test_every_thread_of_the_encoder_needs_ram_of_its_own(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, three = (ram_needed(family, monkeypatch, replace(QUICK, threads=n)) for n in (1, 3))
    widest = max(family.spec.n_hidden, family.spec.uniform_experts().n_inner)
    assert three - one == 2 * (THREAD_BYTES_A_COLUMN * widest + THREAD_BYTES)
    monkeypatch.setattr("lowmoe.library.budgets.physical_cores", lambda: 3)
    assert ram_needed(family, monkeypatch) == three
