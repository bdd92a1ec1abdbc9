"""--miss-planes: an expert that is missed is computed at its first planes, until it is whole."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_gpu_in_part import Workplace

from lowmoe.engine.generate import Session
from lowmoe.engine.load import load_checkpoint, load_folder
from lowmoe.engine.load_options import LoadOptions
from lowmoe.engine.options import SamplingOptions
from lowmoe.engine.runtime import Runtime
from lowmoe.errors import UsageError
from lowmoe.experts.gpu_slots import GpuSlots
from tests.least_ram import least_ram

TEXT = [5, 60, 7, 120, 9, 33, 71, 200, 13, 44]
GREEDY = SamplingOptions(temperature=0.0, max_new_tokens=40)


def scores(runtime: Runtime, token_id: int) -> torch.Tensor:
    session = Session(runtime)
    session.rewind([])
    (hidden,) = session.forward([token_id])
    return session.logits(hidden)


def least_ram_of(folder: Path) -> int:
    return least_ram(lambda ram: load_folder(folder, LoadOptions(bits=6, ram=ram, context=64)))


@pytest.mark.parametrize("isa", ["", "torch"])
def test_what_is_missed_has_the_bits_of_fewer_planes_and_in_the_end_those_of_all(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, isa: str
) -> None:
    if isa:
        monkeypatch.setenv("LOWMOE_ISA", isa)
    wanted: dict[int, torch.Tensor] = {}
    for n_planes in (1, 2, 3):
        runtime = load_folder(model_folder, LoadOptions(bits=2 * n_planes))
        wanted[n_planes] = scores(runtime, 60)
        runtime.close()
    for n_first in (1, 2):
        runtime = load_folder(model_folder, LoadOptions(bits=6, miss_planes=n_first))
        assert torch.equal(scores(runtime, 60), wanted[n_first])
        store: Any = runtime.store
        while not store.is_complete:
            scores(runtime, 7)
        assert torch.equal(scores(runtime, 60), wanted[3])
        # Every byte of the experts was read, each once.
        assert store.traffic().disk_bytes == 8 * store.expert_bytes
        runtime.close()


def test_with_little_ram_less_is_read_and_it_is_named(model_folder: Path) -> None:
    ram, found = int(least_ram_of(model_folder) * 1.02), {}
    for n_first in (None, 1):
        options = LoadOptions(bits=6, ram=ram, context=64, miss_planes=n_first)
        runtime = load_folder(model_folder, options)
        store: Any = runtime.store
        assert 2 <= store.n_slots < 8
        session = Session(runtime)
        for _ in session.token_ids(TEXT, GREEDY):
            assert store.resident_bytes <= store.n_slots * store.expert_bytes
        found[n_first] = session.statistics()
        runtime.close()
    assert found[None].trades == ()
    assert found[None].coarse_rate == 0
    assert found[1].trades == ("misses at 1 plane",)
    assert 0 < found[1].coarse_rate <= 1
    assert found[1].bytes_per_token.disk < found[None].bytes_per_token.disk


def test_what_is_wanted_again_is_whole(model_folder: Path) -> None:
    ram = int(least_ram_of(model_folder) * 1.02)
    options = LoadOptions(bits=6, ram=ram, context=64, miss_planes=1)
    runtime = load_folder(model_folder, options)
    store: Any = runtime.store
    store.want(0, [3])
    (group,) = store.portions()
    with store.borrow(0, group) as experts:
        assert [len(parts) for parts in experts.values()] == [1]
    assert store.has(0, 3)
    assert not store.has_whole(0, 3)
    store.want(0, [3])
    store._tier.residents[0, 3].refining.result()
    (group,) = store.portions()
    with store.borrow(0, group) as experts:
        assert [len(parts) for parts in experts.values()] == [3]
    assert store.has_whole(0, 3)
    assert store.traffic().coarse == 1
    # What computed once at one plane of three, and once whole, was read as that.
    one_plane = store._tier.buffer_bytes[0]
    assert store.traffic().ram_bytes == one_plane + store.expert_bytes
    runtime.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"miss_planes": 0}, "miss_planes is 0, but must be at least 1"),
        (
            {"miss_planes": 2, "bits": 4},
            "miss_planes is 2, but experts are computed at 2. Give fewer",
        ),
        (
            {"miss_planes": 3, "bits": 6},
            "miss_planes is 3, but experts are computed at 3. Give fewer",
        ),
    ],
)
def test_as_many_planes_as_all_are_refused(
    model_folder: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        load_folder(model_folder, LoadOptions(**options)).close()


def test_unquantized_weights_have_none(talking_checkpoint: Path) -> None:
    with pytest.raises(UsageError, match="miss_planes is 1, but dtype runs unquantized"):
        load_checkpoint(talking_checkpoint, LoadOptions(dtype="float32", miss_planes=1))


@pytest.mark.parametrize("misses", ["cpu", "page"])
def test_on_a_card_hits_have_all_planes_and_misses_the_first(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, home: Path, misses: str
) -> None:
    work = Workplace(monkeypatch, model_folder)
    runtime = work.load(3, misses=misses, miss_planes=1)
    session = Session(runtime)
    for _ in session.token_ids(TEXT, GREEDY):
        pass
    s = session.statistics()
    assert s.trades == ("misses at 1 plane",)
    assert 0 < s.hit_rate.gpu < 1
    assert s.coarse_rate == pytest.approx(1 - s.hit_rate.gpu)
    store: Any = runtime.store
    n_first, n_all = len(store.ram._coarse.first.buffer_bytes), store.slots.n_parts
    assert (n_first, n_all, store.staging.n_parts) == (1, 2, 1)
    traffic = store.traffic()
    n_missed, one_plane = traffic.ram_requests + traffic.disk_requests, store.expert_bytes // 2
    assert traffic.ram_bytes == n_missed * one_plane
    assert traffic.passed_bytes == (n_missed * one_plane if misses == "page" else 0)
    assert traffic.copied_bytes - traffic.passed_bytes == traffic.promoted * store.expert_bytes
    assert sum(of[1] * n for of, n in traffic.layers.items()) == traffic.ram_bytes
    runtime.close()


def test_a_card_without_a_single_hit_computes_at_the_first_planes(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    work = Workplace(monkeypatch, model_folder)
    # Never there, whatever the slots hold.
    monkeypatch.setattr(GpuSlots, "_copy_row", lambda slots, key: None)
    monkeypatch.setattr(GpuSlots, "has", lambda slots, layer_id, expert_id: False)
    monkeypatch.setattr(GpuSlots, "candidate", lambda slots, can_come: None)
    runtime = work.load(3, misses="cpu", miss_planes=1)
    store: Any = runtime.store
    store.slots.tables.zero_()
    found = scores(runtime, 60)
    runtime.close()
    runtime = load_folder(model_folder, LoadOptions(bits=2, gpu="none"))
    wanted = scores(runtime, 60)
    runtime.close()
    # As in test_gpu.py: each of nine products is rounded by both.
    error = (found - wanted).square().sum() / wanted.square().sum()
    assert error < 9 * (2 * 4e-5 + 1e-4)
