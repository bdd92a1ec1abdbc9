"""Whole models on a stand-in for a GPU: which card, what fits, what is said and counted."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import lowmoe
from cuda_ext.card import Card
from cuda_ext.compile import CompileError
from lowmoe.checkpoint.layout import Recipe
from lowmoe.decoder.gpu_parts import CACHE_ALIGNMENT, cache_bytes
from lowmoe.decoder.hybrid import HybridComputation
from lowmoe.decoder.native import NativeComputation
from lowmoe.decoder.on_gpu import GpuComputation
from lowmoe.engine import gpu as gpu_module
from lowmoe.engine.generate import Session
from lowmoe.engine.gpu import GpuNeeds, GpuRefusal, find_gpu
from lowmoe.engine.load import load_checkpoint, load_folder
from lowmoe.engine.load_on_gpu import GpuPlace
from lowmoe.engine.load_options import LoadOptions
from lowmoe.engine.options import SamplingOptions
from lowmoe.engine.report import SilentReporter
from lowmoe.engine.runtime import Runtime
from lowmoe.errors import FolderError, GpuError, MemoryBudgetError, UsageError
from lowmoe.families import read_config
from lowmoe.families.aliases import ALIASES
from lowmoe.families.fewer_layers import with_layers
from lowmoe.loader.synthetic import write_synthetic
from quant.layout import round_up
from tests.conftest import NO_GPU
from tests.stand_in_gpu import CARD, Cards, StandInGpu
from tests.talking_mixtral import CONFIG, copy_of

PROMPT = [3, 9, 27, 5, 15, 45, 35, 5, 15, 45, 2, 6]
GREEDY = SamplingOptions(temperature=0.0, max_new_tokens=6)
H100 = replace(CARD, name="NVIDIA H100 80GB HBM3", sm=90, memory_bytes=85_000_000_000)
OLD = replace(CARD, name="NVIDIA GeForce RTX 2080 Ti", sm=75)


class Reports(SilentReporter):
    """Hears what is said."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.steps: list[tuple[str, int, int, str]] = []

    def step(self, stage: str, done: int, total: int, unit: str) -> None:
        self.steps.append((stage, done, total, unit))

    def note(self, text: str) -> None:
        self.notes.append(text)


class Workplace(Cards):
    """A machine with cards, and what is said there."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__(patch)
        self.reports = Reports()

    def load(self, folder: Path, **options: Any) -> Runtime:
        return load_folder(folder, LoadOptions(**options), self.reports)


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch, home: Path) -> Workplace:
    return Workplace(monkeypatch)


def is_on_gpu(runtime: Runtime) -> bool:
    computation = runtime.decoder.computation
    assert isinstance(computation, GpuComputation | HybridComputation | NativeComputation)
    assert (runtime.gpu is None) == isinstance(computation, NativeComputation)
    return runtime.gpu is not None


# --- a model that fits


@pytest.mark.parametrize("kv", ["float16", "int8", "float32"])
@pytest.mark.parametrize("bits", [2, 4, 6])
def test_scores_on_a_gpu_are_the_cpus_but_for_rounding(
    work: Workplace, model_folder: Path, bits: int, kv: str
) -> None:
    scores = []
    for gpu in ("none", "4090"):
        with lowmoe.load(model_folder, gpu=gpu, bits=bits, kv=kv) as model:
            scores.append(model.logits(PROMPT))
            assert model.runtime.bits == bits
            assert is_on_gpu(model.runtime) == (gpu == "4090")
    # Both round activations to int8, before each of the four matrices of two layers and the head:
    # relative squared errors of 4e-5 each, see decoder/native_goldens.py; the CPU adds up planes
    # in int8 besides, 1e-4 each. Rounded alike as they mostly are, they differ by less.
    error = (scores[0] - scores[1]).square().sum() / scores[0].square().sum()
    assert error < 9 * (2 * 4e-5 + 1e-4)


def test_statistics_are_of_the_gpus_memory(work: Workplace, model_folder: Path) -> None:
    runtime = work.load(model_folder)
    session = Session(runtime)
    tokens = list(session.token_ids(PROMPT, GREEDY))
    s = session.statistics()
    expert = runtime.store.expert_bytes
    assert len(tokens) == s.new_tokens == 6
    assert s.hit_rate == replace(s.hit_rate, gpu=1.0, ram=0, disk=0)
    assert s.placement.gpu == runtime.dense_bytes + 8 * expert
    assert (s.placement.ram, s.placement.disk) == (0, 0)
    # Two layers, two experts of a token in each.
    assert s.bytes_per_token.gpu == runtime.dense_bytes_per_token + 4 * expert
    assert (s.bytes_per_token.ram, s.bytes_per_token.disk) == (0, 0)
    assert s.bound_tokens_per_s == pytest.approx(1e12 / s.bytes_per_token.gpu)


def test_experts_of_a_prompt_are_counted_once_for_all_its_tokens(
    work: Workplace, model_folder: Path
) -> None:
    runtime = work.load(model_folder)
    session = Session(runtime)
    list(session.forward(PROMPT))
    used = runtime.store.traffic().gpu_requests
    assert 4 < used <= 8
    list(session.forward([1]))
    assert runtime.store.traffic().gpu_requests == used + 4
    assert runtime.store.traffic().gpu_bytes == (used + 4) * runtime.store.expert_bytes


def test_all_tokens_but_those_of_prompts_are_replayed(work: Workplace, model_folder: Path) -> None:
    runtime = work.load(model_folder)
    gpu = runtime.gpu
    assert isinstance(gpu, StandInGpu)
    session = Session(runtime)
    for n_replayed in (6, 12):
        session.rewind([])
        list(session.token_ids(PROMPT, GREEDY))
        assert (gpu.n_captured, gpu.n_replayed) == (1, n_replayed)


def test_the_same_prompt_has_the_same_answer_whatever_came_before(
    work: Workplace, model_folder: Path
) -> None:
    session = Session(work.load(model_folder))
    alone = list(session.token_ids(PROMPT, GREEDY))
    list(session.token_ids(PROMPT[::-1], GREEDY))
    assert list(session.token_ids(PROMPT, GREEDY)) == alone


def test_several_are_answered_on_it_together(work: Workplace, model_folder: Path) -> None:
    prompts = [PROMPT[: n + 1] for n in range(3)]
    alone = Session(work.load(model_folder))
    wanted = [list(alone.token_ids(p, GREEDY)) for p in prompts]
    found: list[list[int]] = [[], [], []]
    session = Session(work.load(model_folder, sequences=2))
    for index, token in session.stream_all(prompts, [GREEDY] * 3):
        found[index] += [] if token.id is None else [token.id]
    # Rounded otherwise, see tests/decoder/test_together.py: but not as much as to say other things.
    assert found == wanted


def test_every_sequence_has_a_cache_in_its_memory(work: Workplace, model_folder: Path) -> None:
    work.free_bytes = 0
    needed = []
    for sequences in (1, 4):
        asked = LoadOptions(gpu="4090", bits=4, sequences=sequences)
        with pytest.raises(MemoryBudgetError) as refused:
            load_folder(model_folder, asked)
        needed.append(int(str(refused.value).split("but ")[1].split()[0]))
    runtime = work.load(model_folder, gpu="none", bits=4)
    work.free_bytes = 2**40
    assert needed[1] - needed[0] == 3 * cache_bytes(runtime.spec, runtime.n_context, "float16")


def test_progress_is_of_the_bytes_that_experts_have(work: Workplace, model_folder: Path) -> None:
    runtime = work.load(model_folder, bits=4)
    whole = 8 * runtime.store.expert_bytes
    assert [done for _, done, _, _ in work.reports.steps] == [whole // 8 * n for n in range(1, 9)]
    assert {(stage, total, unit) for stage, _, total, unit in work.reports.steps} == {
        ("to the GPU", whole, "B")
    }


def test_every_byte_is_checked_on_its_way(
    work: Workplace, model_folder: Path, tmp_path: Path
) -> None:
    folder = copy_of(model_folder, tmp_path / "spoiled")
    with (folder / "experts-plane1-00001.safetensors").open("r+b") as file:
        file.seek(-5000, 2)
        file.write(b"\xff" * 100)
    with pytest.raises(FolderError, match=r"plane1-00001\.safetensors: .* The file was damaged"):
        work.load(folder)
    assert is_on_gpu(work.load(folder, bits=2))


# --- which card


def test_auto_takes_a_card_and_none_does_not(work: Workplace, model_folder: Path) -> None:
    assert is_on_gpu(work.load(model_folder))
    assert not is_on_gpu(work.load(model_folder, gpu="none"))
    work.put()
    assert not is_on_gpu(work.load(model_folder))
    assert work.reports.notes == []


def test_auto_says_why_a_card_that_is_here_is_not_used(work: Workplace, model_folder: Path) -> None:
    work.put(OLD)
    assert not is_on_gpu(work.load(model_folder))
    (note,) = work.reports.notes
    assert note.startswith(f"computing on the CPU: {OLD.name} is sm_{OLD.sm}, and kernels need")


def test_a_budget_for_a_card_asks_for_it_as_its_name_does(
    work: Workplace, model_folder: Path
) -> None:
    work.free_bytes = 1000
    with pytest.raises(MemoryBudgetError, match="bytes of GPU memory are needed"):
        work.load(model_folder, vram="1GB")


def test_a_card_by_name_has_all_its_memory(work: Workplace, model_folder: Path) -> None:
    assert is_on_gpu(work.load(model_folder, gpu="4090"))
    assert work.limits == [None]


def test_a_larger_card_stands_in_for_one_by_name_within_its_memory(
    work: Workplace, model_folder: Path
) -> None:
    work.put(OLD, H100)
    assert is_on_gpu(work.load(model_folder, gpu="4090"))
    assert work.limits == [24 * 10**9]
    (note,) = work.reports.notes
    assert note == "computing on NVIDIA H100 80GB HBM3 within the 24 GB of a 4090"


@pytest.mark.parametrize(
    ("cards", "wanted", "complaint"),
    [
        ((CARD,), "h100", "gpu is 'h100', but the cards here are NVIDIA GeForce RTX 4090"),
        ((CARD,), "5090", "gpu is '5090', but the cards here are NVIDIA GeForce RTX 4090"),
        ((CARD,), "radeon", "gpu is 'radeon', but the cards here are NVIDIA GeForce RTX 4090"),
        ((OLD,), "2080", "gpu is '2080', but NVIDIA GeForce RTX 2080 Ti is sm_75, and kernels"),
        ((OLD,), "3060", "gpu is '3060', but the cards here are NVIDIA GeForce RTX 2080"),
    ],
)
def test_a_card_that_is_not_here_is_a_usage_error_before_anything_is_read(
    work: Workplace, cards: tuple[Card, ...], wanted: str, complaint: str
) -> None:
    work.put(*cards)
    with pytest.raises(UsageError, match=complaint):
        LoadOptions(gpu=wanted)
    assert work.limits == []


def test_without_a_driver_no_card_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_module, "look", lambda: NO_GPU)
    assert find_gpu("auto") is None
    for wanted in ("4090", "h100", "cuda:0"):
        with pytest.raises(UsageError, match="but no NVIDIA driver was found"):
            find_gpu(wanted)


@pytest.mark.parametrize(
    ("card", "gpu", "vram", "limit"),
    [
        (CARD, "auto", "8GB", 8 * 10**9),
        (CARD, "4090", "50%", CARD.memory_bytes // 2),
        (H100, "4090", "50%", 12 * 10**9),
        (H100, "4090", "60GB", 24 * 10**9),
        (CARD, "auto", 10**9, 10**9),
    ],
)
def test_vram_is_a_budget_of_the_card_or_of_the_one_it_stands_in_for(
    work: Workplace, model_folder: Path, card: Card, gpu: str, vram: str | int, limit: int
) -> None:
    work.put(card)
    assert is_on_gpu(work.load(model_folder, gpu=gpu, vram=vram))
    assert work.limits == [limit]


def test_vram_that_is_no_size_is_a_usage_error(work: Workplace, model_folder: Path) -> None:
    with pytest.raises(UsageError, match="--vram is 'lots', but must be a size"):
        work.load(model_folder, vram="lots")


# --- what does not fit


@pytest.fixture
def needed(work: Workplace, model_folder: Path) -> Callable[..., int]:
    """Bytes that the model needs of a GPU at least, as the complaint about too few of them says."""

    def ask(**options: Any) -> int:
        work.free_bytes = 0
        with pytest.raises(MemoryBudgetError) as refused:
            work.load(model_folder, gpu="4090", **options)
        return int(str(refused.value).split("but ")[1].split()[0])

    return ask


@pytest.fixture
def needed_whole(needed: Callable[..., int]) -> Callable[..., int]:
    """The same with all experts."""

    def ask(**options: Any) -> int:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gpu_module, "MIN_GPU_SLOTS", 1000)
            return needed(**options)

    return ask


def test_a_misfit_says_what_is_needed_what_is_free_and_what_would_fit(
    work: Workplace,
    model_folder: Path,
    needed: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    four, two = needed(bits=4), needed(bits=2)
    work.free_bytes = four - 1
    with pytest.raises(
        MemoryBudgetError,
        match=f"gpu is '4090', but {four} bytes of GPU memory are needed at 4 bits with a context "
        rf"of 384 tokens, and {four - 1} of {four - 1} are free on a stand-in; bits 2 would fit\.",
    ):
        work.load(model_folder, gpu="4090", bits=4)
    work.free_bytes = two - 1
    monkeypatch.setattr(gpu_module, "LEAST_CONTEXT", 100)
    with pytest.raises(MemoryBudgetError, match=r"at 2 bits .* context 192 would fit\. Run on"):
        work.load(model_folder, gpu="4090")
    work.free_bytes = 1000
    with pytest.raises(
        MemoryBudgetError, match=r"and 1000 of 1000 are free on a stand-in\. Run on "
    ):
        work.load(model_folder, gpu="4090")


def test_what_is_needed_is_enough(
    work: Workplace, model_folder: Path, needed: Callable[..., int]
) -> None:
    work.free_bytes = needed(bits=4)
    runtime = work.load(model_folder, gpu="4090", bits=4)
    assert is_on_gpu(runtime)
    assert isinstance(runtime.decoder.computation, HybridComputation)
    # Of the least there is, only few tokens at once pass through.
    assert runtime.decoder.computation.max_tokens == 128


def test_a_longer_cache_and_more_bits_need_more(needed: Callable[..., int]) -> None:
    assert needed(bits=6) > needed(bits=4) > needed(bits=2)
    assert needed(bits=4) > needed(bits=4, context=200)
    # Of 384 tokens and 2 layers, keys and values of 2 heads of 16 numbers, 2 bytes more each.
    assert needed(bits=4, kv="float32") - needed(bits=4) == 384 * 2 * 2 * 2 * 16 * 2


def test_auto_takes_the_most_bits_that_fit(
    work: Workplace, model_folder: Path, needed_whole: Callable[..., int]
) -> None:
    for bits in (4, 2):
        work.free_bytes = needed_whole(bits=bits)
        runtime = work.load(model_folder)
        assert (is_on_gpu(runtime), runtime.bits) == (True, bits)
    assert work.reports.notes == [
        f"experts at {bits} bits, which fit on a stand-in; "
        "with gpu none the CPU computes at up to 6"
        for bits in (4, 2)
    ]


def test_auto_goes_on_on_the_cpu_and_says_so_once(
    work: Workplace, model_folder: Path, needed: Callable[..., int]
) -> None:
    two = needed(bits=2)
    work.free_bytes = 1000
    runtime = work.load(model_folder)
    assert not is_on_gpu(runtime)
    assert runtime.bits == 6
    (note,) = work.reports.notes
    assert note.startswith(f"computing on the CPU: {two} bytes of GPU memory are needed at 2 bits")
    assert "\n" not in note


@pytest.mark.parametrize("error", [CompileError("cuda-core is missing: install it.\nlog")])
def test_kernels_that_cannot_be_compiled_are_an_error_only_where_a_card_was_asked_for(
    work: Workplace, model_folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def failing(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(gpu_module, "open_card", failing)
    assert not is_on_gpu(work.load(model_folder))
    assert work.reports.notes == ["computing on the CPU: cuda-core is missing: install it."]
    with pytest.raises(
        GpuError, match=r"gpu is '4090', but cuda-core is missing: install it\. Run"
    ):
        work.load(model_folder, gpu="4090")


def test_what_has_no_planes_is_left_to_the_cpu(
    work: Workplace, talking_checkpoint: Path, tmp_path: Path
) -> None:
    lowmoe.quantize(talking_checkpoint, tmp_path / "nf4", format="nf4", calibrate=False)
    runtime = work.load(tmp_path / "nf4")
    assert runtime.gpu is None
    (note,) = work.reports.notes
    assert "no GPU kernel reads the nf4" in note
    with pytest.raises(GpuError, match="no GPU kernel reads the nf4"):
        work.load(tmp_path / "nf4", gpu="4090")
    assert load_checkpoint(talking_checkpoint, LoadOptions(dtype="float32")).gpu is None
    with pytest.raises(UsageError, match="unquantized weights, which the CPU computes, but gpu is"):
        load_checkpoint(talking_checkpoint, LoadOptions(dtype="float32", gpu="4090"))


def test_a_shape_that_no_kernel_is_built_for_is_left_to_the_cpu(
    work: Workplace, tmp_path: Path
) -> None:
    config = {**CONFIG, "head_dim": 20}
    write_synthetic(
        tmp_path / "odd",
        config,
        read_config(config),
        Recipe(),
        name="odd",
        progress=lambda done, total: None,
    )
    assert not is_on_gpu(work.load(tmp_path / "odd"))
    assert work.reports.notes == [
        "computing on the CPU: GPU kernels cannot do heads of 20 channels."
    ]


@pytest.mark.parametrize("when", ["making a cache", "computing"])
def test_memory_that_does_not_do_after_all_is_one_line(
    work: Workplace, model_folder: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    def exhausted(*arguments: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has\n..")

    computation: Any = GpuComputation
    method = {"making a cache": "new_cache", "computing": "run_layers"}[when]
    monkeypatch.setattr(computation, method, exhausted)
    with pytest.raises(
        MemoryBudgetError, match=r"^the GPU ran out of memory: CUDA out of memory\. Give a smaller"
    ):
        list(Session(work.load(model_folder)).token_ids(PROMPT, GREEDY))


@pytest.mark.parametrize("n_layers", [1, 2, 4])
def test_less_memory_is_tried_each_time_until_nothing_is_left_to_try(n_layers: int) -> None:
    spec = read_config(with_layers(ALIASES["mixtral-8x7b"].config, n_layers)).spec
    recipe = Recipe(expert_planes=2)
    needs = GpuNeeds(
        spec=spec,
        dense_bytes=10**9,
        part_bytes=recipe.expert_format(spec).part_bytes[0],
        n_context=4096,
        kv="float16",
        n_sequences=1,
    )
    gpu: Any = StandInGpu()
    place = GpuPlace(gpu=gpu, needs=needs, division=needs.divided(gpu, [2], 10**12, 24 * 2**30))
    taken: list[int] = []

    def try_less(place: GpuPlace) -> None:
        taken.append(needs.divided_bytes(gpu, place.division))
        assert len(taken) < 100
        try_less(place.with_less(10**12))

    with pytest.raises(GpuRefusal):
        try_less(place)
    assert len(taken) > 3
    assert sorted(taken, reverse=True) == taken


@pytest.mark.parametrize("kv", ["float16", "int8", "float32"])
def test_a_cache_is_one_piece_of_memory_and_as_large_as_was_reckoned(
    work: Workplace, model_folder: Path, kv: Any
) -> None:
    """In pieces, torch would take up to a quarter more than was reckoned."""
    runtime = work.load(model_folder, kv=kv)
    cache: Any = runtime.decoder.new_cache(100)
    tensors = [*cache.keys, *cache.values]
    row = {"float16": 16 * 2, "int8": 16 + 4, "float32": 16 * 4}[kv]
    of_layer = 2 * 100 * row
    assert {tensor.nbytes for tensor in tensors} == {of_layer}
    piece = tensors[0].untyped_storage()
    assert {tensor.untyped_storage().data_ptr() for tensor in tensors} == {piece.data_ptr()}
    assert piece.nbytes() == cache_bytes(runtime.spec, 100, kv)
    firsts = sorted(tensor.data_ptr() - piece.data_ptr() for tensor in tensors)
    assert firsts == [n * round_up(of_layer, CACHE_ALIGNMENT) for n in range(2 * 2)]
    assert not any(tensor.any() for tensor in tensors)
