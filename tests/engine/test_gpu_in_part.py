"""Whole models of which a stand-in for a GPU holds some experts: division, answers, statistics."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import lowmoe
from lowmoe.checkpoint.folder import ModelFolder
from lowmoe.checkpoint.popularity import POPULARITY, read_popularity
from lowmoe.decoder.hybrid import HybridComputation
from lowmoe.engine import gpu as gpu_module
from lowmoe.engine.generate import Session
from lowmoe.engine.load import load_folder
from lowmoe.engine.load_options import LoadOptions
from lowmoe.engine.options import SamplingOptions
from lowmoe.engine.report import SilentReporter
from lowmoe.engine.runtime import Loading, Runtime
from lowmoe.errors import FolderError, GpuError, MemoryBudgetError, UsageError
from lowmoe.experts.hybrid import HybridExperts
from lowmoe.experts.policy import UNKNOWN
from lowmoe.experts.split import MISSES
from tests.stand_in_gpu import Cards

PROMPT = [3, 9, 27, 5, 15, 45, 35, 5, 15, 45, 2, 6]
GREEDY = SamplingOptions(temperature=0.0, max_new_tokens=12)
N_EXPERTS = 8  # of two layers


class Reports(SilentReporter):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


class Workplace(Cards):
    """A machine with a card, and a model of which it can hold so many experts."""

    def __init__(self, patch: pytest.MonkeyPatch, folder: Path) -> None:
        super().__init__(patch)
        self.patch, self.folder, self.reports = patch, folder, Reports()

    def load(self, n_slots: int, misses: str = "cpu", **options: Any) -> Runtime:
        """misses: whatever the clock says, unless it is to be heeded."""
        self.give(n_slots, **options)
        asked = LoadOptions(bits=4, misses=misses, **options)
        return load_folder(self.folder, asked, self.reports)

    def give(self, n_slots: int, **options: Any) -> None:
        """Free memory for so many experts and what else there is."""
        self.free_bytes = self.needed(n_slots, **options)

    def needed(self, n_slots: int, **options: Any) -> int:
        self.free_bytes = 0
        asked = LoadOptions(bits=4, **options | {"gpu": "4090"})
        with self.patch.context() as patch:
            patch.setattr(gpu_module, "MIN_GPU_SLOTS", n_slots)
            with pytest.raises(MemoryBudgetError) as refused:
                load_folder(self.folder, asked)
        return int(str(refused.value).split("but ")[1].split()[0])


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch, home: Path, model_folder: Path) -> Workplace:
    return Workplace(monkeypatch, model_folder)


def hybrid_of(runtime: Runtime) -> HybridExperts:
    assert isinstance(runtime.decoder.computation, HybridComputation)
    assert isinstance(runtime.store, HybridExperts)
    return runtime.store


@pytest.mark.parametrize("n_slots", [2, 3, 4])
def test_a_card_gets_as_many_experts_as_fit_and_it_is_said(work: Workplace, n_slots: int) -> None:
    runtime = work.load(n_slots)
    assert hybrid_of(runtime).slots.n_slots == n_slots
    assert work.reports.notes == [
        f"{n_slots} of 8 experts fit on a stand-in; the CPU computes the others."
    ]
    runtime.close()


@pytest.mark.parametrize(
    ("misses", "where"),
    [
        ("page", "the others pass through it"),
        ("auto", "the others are computed by the CPU or pass through it, whichever is faster"),
    ],
)
def test_where_misses_are_computed_is_said(work: Workplace, misses: str, where: str) -> None:
    runtime = work.load(3, misses=misses)
    assert work.reports.notes == [f"3 of 8 experts fit on a stand-in; {where}."]
    runtime.close()


@pytest.mark.parametrize("misses", MISSES)
def test_scores_are_the_cpus_wherever_misses_are_computed(work: Workplace, misses: str) -> None:
    with lowmoe.load(work.folder, gpu="none", bits=4) as model:
        wanted = model.logits(PROMPT)
    work.give(3)
    with lowmoe.load(work.folder, gpu="4090", bits=4, misses=misses) as model:
        found = torch.cat(
            [model.session.logits(h) for t in PROMPT for h in model.session.forward([t])]
        )
    # As below, but that every layer's sum may be rounded by both.
    error = (found - wanted).square().sum() / wanted.square().sum()
    assert error < 9 * (2 * 4e-5 + 1e-4)


def test_an_unknown_place_for_misses_is_refused() -> None:
    with pytest.raises(UsageError, match="misses is 'gpu', but must be one of cpu, page, auto"):
        LoadOptions(misses="gpu")


def test_what_passes_through_is_read_from_ram_and_computed_on_the_gpu(work: Workplace) -> None:
    runtime = work.load(3, misses="page")
    experts, session = hybrid_of(runtime), Session(runtime)
    list(session.token_ids(PROMPT, GREEDY))
    s = session.statistics()
    # Two experts of a token in each of two layers, all of them on the GPU.
    of_experts = s.bytes_per_token.gpu - runtime.dense_bytes_per_token
    assert of_experts == pytest.approx(4 * experts.expert_bytes)
    assert 0 < s.bytes_per_token.ram < of_experts + experts.expert_bytes


def test_a_byte_less_is_an_expert_less_and_with_too_few_the_cpu_computes(work: Workplace) -> None:
    work.give(3)
    work.free_bytes -= 1
    runtime = load_folder(work.folder, LoadOptions(bits=4), work.reports)
    assert hybrid_of(runtime).slots.n_slots == 2
    work.give(2)
    work.free_bytes -= 1
    assert load_folder(work.folder, LoadOptions(bits=4), work.reports).gpu is None


@pytest.mark.parametrize("n_slots", [2, 4])
def test_scores_are_the_cpus_but_for_rounding(work: Workplace, n_slots: int) -> None:
    with lowmoe.load(work.folder, gpu="none", bits=4) as model:
        wanted = model.logits(PROMPT)
    work.give(n_slots)
    with lowmoe.load(work.folder, gpu="4090", bits=4) as model:
        hybrid_of(model.runtime)
        found = model.logits(PROMPT)
    # As in test_gpu.py: two layers of four matrices and the head, each rounded by both.
    error = (found - wanted).square().sum() / wanted.square().sum()
    assert error < 9 * (2 * 4e-5 + 1e-4)


def test_the_same_prompt_has_the_same_answer_whatever_came_before(work: Workplace) -> None:
    session = Session(work.load(3))
    list(session.token_ids(PROMPT[:5], GREEDY))
    answers = [list(session.token_ids(PROMPT, GREEDY)) for _ in range(2)]
    assert len(answers[0]) == GREEDY.max_new_tokens
    assert answers[0] == answers[1]


def test_an_answer_that_is_left_early_spoils_no_other(work: Workplace) -> None:
    session = Session(work.load(3))
    wanted = list(session.token_ids(PROMPT, GREEDY))
    for n_tokens in range(1, 5):
        stream = iter(session.token_ids(PROMPT[::-1], GREEDY))
        for _ in range(n_tokens):
            next(stream)
        session.stop()
        assert list(stream) == []
    assert list(session.token_ids(PROMPT, GREEDY)) == wanted


def test_statistics_are_of_all_tiers(work: Workplace) -> None:
    # Not knowing which experts are popular, it begins with others and some are promoted.
    work.patch.setattr(Loading, "popularity", lambda loading: UNKNOWN)
    runtime = work.load(3)
    experts, session = hybrid_of(runtime), Session(runtime)
    n_new = len(list(session.token_ids(PROMPT, GREEDY)))
    s = session.statistics()
    assert s.hit_rate.gpu > 0
    assert s.hit_rate.ram > 0
    assert s.hit_rate.gpu + s.hit_rate.ram + s.hit_rate.disk == pytest.approx(1)
    n_there = len(experts.slots.residents())
    assert n_there in (2, 3)  # one may be on its way
    assert s.placement.gpu == runtime.dense_bytes + n_there * experts.expert_bytes
    whole = N_EXPERTS * experts.expert_bytes
    assert s.placement.gpu - runtime.dense_bytes + s.placement.ram + s.placement.disk == whole
    # Two experts of a token in each of two layers, on the GPU or on the CPU.
    of_experts = s.bytes_per_token.gpu - runtime.dense_bytes_per_token
    run = session.last_run
    assert run is not None
    n_promoted = run.decoding.traffic.promoted
    moved_up = n_promoted * experts.expert_bytes / (n_new - 1)  # which reads RAM, too
    in_ram = s.bytes_per_token.ram - moved_up
    assert of_experts + in_ram == pytest.approx(4 * experts.expert_bytes)
    assert 0 < n_promoted <= s.promoted
    # All crossed that moved up, and what passed through for the prompt.
    assert s.to_gpu_bytes >= s.promoted * experts.expert_bytes
    assert s.to_gpu_bytes % experts.expert_bytes == 0
    assert n_new == s.new_tokens
    # A stand-in moves 1e12 bytes a second, RAM less; the disk may have taken longer than both.
    ram_s = s.bytes_per_token.ram / session.ram_bandwidth()
    gpu_s = s.bytes_per_token.gpu / 1e12
    assert s.bound_tokens_per_s is not None
    assert 0 < s.bound_tokens_per_s <= (1 + 1e-6) / max(ram_s, gpu_s)


def test_a_card_begins_with_the_experts_that_calibration_found_popular(work: Workplace) -> None:
    with ModelFolder(work.folder) as folder:
        data = folder.small_file(POPULARITY)
    assert data is not None
    shares = read_popularity(data, [4, 4])
    keys = sorted(((i, e) for i in range(2) for e in range(4)), key=lambda k: -shares[k[0]][k[1]])
    assert hybrid_of(work.load(3)).slots.residents() == sorted(keys[:3])


def test_a_popularity_that_is_damaged_is_one_line(work: Workplace, tmp_path: Path) -> None:
    copy = shutil.copytree(work.folder, tmp_path / "copy")
    (copy / POPULARITY).write_bytes((copy / POPULARITY).read_bytes().replace(b"[", b"{"))
    with pytest.raises(FolderError, match=r"popularity\.json.* has hash .*, but the manifest"):
        load_folder(copy, LoadOptions(gpu="none"))


def test_ram_for_too_few_experts_is_one_line(work: Workplace) -> None:
    with pytest.raises(MemoryBudgetError, match=r"bytes of RAM are left for experts, but two of"):
        work.load(3, ram="1MiB")


def test_without_native_code_a_card_that_holds_some_is_not_used(
    work: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    work.give(3)
    monkeypatch.setenv("LOWMOE_ISA", "torch")
    with pytest.raises(GpuError, match="some experts have to be computed on the CPU, and LOWMOE_"):
        load_folder(work.folder, LoadOptions(bits=4, gpu="4090"), work.reports)
    assert load_folder(work.folder, LoadOptions(bits=4), work.reports).gpu is None


def test_what_was_reckoned_is_what_is_taken(work: Workplace) -> None:
    runtime = work.load(3)
    experts = hybrid_of(runtime)
    slots, staging = experts.slots, experts.staging
    parts, n_experts = slots._places.part_bytes, [4, 4]
    assert sum(p.nbytes for p in slots._pieces) == 3 * slots.slot_bytes(parts)
    assert slots.tables.nbytes == slots.table_bytes(n_experts)
    taken = sum(s.memory.nbytes + s.table.nbytes for s in staging._sets)
    assert taken == staging.needed_bytes(parts, 4)
