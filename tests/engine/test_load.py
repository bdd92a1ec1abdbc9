"""Options are checked before anything is read, and memory is divided as they say."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import lowmoe
from lowmoe.checkpoint.layout import Recipe
from lowmoe.decoder.in_torch import TorchComputation
from lowmoe.decoder.native import NativeComputation
from lowmoe.engine import load as load_module
from lowmoe.engine.generate import Session
from lowmoe.engine.load import load_checkpoint, load_folder
from lowmoe.engine.load_options import LoadOptions
from lowmoe.engine.options import SamplingOptions
from lowmoe.errors import FolderError, LowMoeError, MemoryBudgetError, UsageError
from lowmoe.families import read_config
from lowmoe.kernels import cpu
from lowmoe.loader.synthetic import write_synthetic
from quant.trellis import TrellisCode
from tests.talking_mixtral import CONFIG, CONTEXT, copy_of


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"bits": 3}, "bits is 3, but must be 2, 4, 6 or auto"),
        ({"bits": "4"}, "bits is '4'"),
        ({"dtype": "float8"}, "dtype is 'float8', but must be one of float32, bfloat16, float16"),
        ({"kv": "fp4"}, "kv is 'fp4', but must be one of float32, float16, int8"),
        ({"threads": 0}, "threads is 0, but must be at least 1"),
        ({"context": -5}, "context is -5, but must be at least 1"),
        ({"sequences": 0}, "sequences is 0, but must be 1 to 8"),
        ({"sequences": 9}, "sequences is 9, but must be 1 to 8"),
        ({"vram": "8GiB"}, "vram is '8GiB', but no NVIDIA driver was found. Leave it out to run"),
        ({"vram": "8GiB", "gpu": "none"}, "vram is '8GiB', but gpu is none. Leave one of them"),
        ({"gpu": "4090"}, "gpu is '4090', but no NVIDIA driver was found. Run on the CPU"),
    ],
)
def test_options_that_cannot_be_honoured_are_usage_errors(
    changes: dict[str, object], complaint: str
) -> None:
    with pytest.raises(UsageError, match=complaint):
        replace(LoadOptions(), **changes)  # type: ignore[arg-type]


def test_the_budget_for_experts_is_what_the_other_parts_leave(model_folder: Path) -> None:
    with pytest.raises(MemoryBudgetError) as refused:
        load_folder(model_folder, LoadOptions(ram=1, bits=4, context=100))
    with_100_tokens = str(refused.value)
    with pytest.raises(MemoryBudgetError) as refused:
        load_folder(model_folder, LoadOptions(ram=1, bits=4, context=200))
    with_200_tokens = str(refused.value)

    def missing(message: str) -> int:
        return int(message.split("at least ")[1].split()[0])

    runtime = load_folder(model_folder, LoadOptions(bits=4, context=100))
    longer = load_folder(model_folder, LoadOptions(bits=4, context=200))
    computation = runtime.decoder.computation
    cache, working = computation.cache_bytes(100), computation.working_bytes
    more_cache = longer.decoder.computation.cache_bytes(200) - cache
    more_working = longer.decoder.computation.working_bytes - working
    needed = runtime.dense_bytes + cache + working + 2 * runtime.store.expert_bytes
    runtime.close()
    longer.close()
    assert more_working > 0
    assert missing(with_100_tokens) == needed - 1
    assert missing(with_200_tokens) == needed - 1 + more_cache + more_working


def test_a_given_budget_holds_no_memory_to_measure_ram_by(model_folder: Path) -> None:
    given = load_folder(model_folder, LoadOptions(ram="90%"))
    probe = given.probe
    assert probe is not None
    assert probe.numel() >= given.dense_bytes  # the very memory they are in
    assert Session(given).ram_bandwidth() > 0
    given.close()
    free = load_folder(model_folder, LoadOptions())  # so little fits into a cache
    assert free.probe is None
    free.close()


def test_every_sequence_has_a_cache_in_the_budget(model_folder: Path) -> None:
    needed, parts = [], []
    for sequences in (1, 5):
        asked = LoadOptions(bits=4, context=100, sequences=sequences)
        with pytest.raises(MemoryBudgetError) as refused:
            load_folder(model_folder, replace(asked, ram=1))
        needed.append(int(str(refused.value).split("at least ")[1].split()[0]))
        runtime = load_folder(model_folder, asked)
        computation = runtime.decoder.computation
        parts.append(sequences * computation.cache_bytes(100) + computation.working_bytes)
        runtime.close()
    assert needed[1] - needed[0] == parts[1] - parts[0]


def test_more_sequences_than_tokens_of_context_are_decoded_too(model_folder: Path) -> None:
    runtime = load_folder(model_folder, LoadOptions(context=4, sequences=8))
    asked = SamplingOptions(temperature=0.0, max_new_tokens=2)
    found = list(Session(runtime).stream_all([[i, i + 1] for i in range(8)], [asked] * 8))
    runtime.close()
    assert {index for index, _ in found} == set(range(8))


@pytest.mark.parametrize("isa", cpu.isas())
def test_native_code_of_every_instruction_set_can_be_asked_for(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, isa: str
) -> None:
    monkeypatch.setenv("LOWMOE_ISA", isa)
    runtime = load_folder(model_folder, LoadOptions())
    assert runtime.isa == isa
    assert isinstance(runtime.decoder.computation, NativeComputation)
    asked = SamplingOptions(max_new_tokens=2)
    assert len(list(Session(runtime).token_ids([1, 2, 3], asked, heed_ends=False))) == 2
    runtime.close()


def test_without_asking_it_is_the_best(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOWMOE_ISA", raising=False)
    runtime = load_folder(model_folder, LoadOptions())
    runtime.close()
    assert runtime.isa == cpu.isas()[0]


def test_an_instruction_set_that_does_not_run_here_is_a_usage_error(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOWMOE_ISA", "altivec")
    runs = ", ".join(cpu.isas())
    with pytest.raises(UsageError, match=f"LOWMOE_ISA is 'altivec', .* runs {runs}. Take one of"):
        load_folder(model_folder, LoadOptions())


def test_torch_can_be_asked_for_and_has_no_choice_of_caches(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOWMOE_ISA", "torch")
    runtime = load_folder(model_folder, LoadOptions())
    runtime.close()
    assert (runtime.isa, runtime.pool) == ("torch", None)
    assert isinstance(runtime.decoder.computation, TorchComputation)
    with pytest.raises(
        UsageError, match=r"kv is int8, but .* choice of caches, and torch computes here\. Leave"
    ):
        load_folder(model_folder, LoadOptions(kv="int8"))


def test_what_has_no_planes_is_computed_by_torch(talking_checkpoint: Path, tmp_path: Path) -> None:
    lowmoe.quantize(talking_checkpoint, tmp_path / "nf4", format="nf4", calibrate=False)
    for runtime in (
        load_folder(tmp_path / "nf4", LoadOptions()),
        load_checkpoint(talking_checkpoint, LoadOptions(dtype="float32")),
    ):
        runtime.close()
        assert (runtime.isa, runtime.pool) == ("torch", None)
    for kv in cpu.KV_FORMATS:
        with pytest.raises(UsageError, match=f"kv is {kv}, but only native code"):
            load_folder(tmp_path / "nf4", LoadOptions(kv=kv))
        with pytest.raises(UsageError, match=f"kv is {kv}, but only native code"):
            load_checkpoint(talking_checkpoint, LoadOptions(dtype="float32", kv=kv))


@pytest.mark.parametrize("kv", [None, *cpu.KV_FORMATS])
def test_a_cache_is_reckoned_in_the_format_it_is_kept_in(
    model_folder: Path, kv: str | None
) -> None:
    runtime = load_folder(model_folder, LoadOptions(kv=kv))
    runtime.close()
    # 2 layers of keys and values of 2 heads of 16 numbers; 384 tokens take two pages of 256.
    of_a_head = {"float32": 64, "float16": 32, "int8": 16 + 4}[kv or "float16"]
    assert runtime.decoder.computation.cache_bytes(384) == 2 * 2 * 2 * of_a_head * 512


def test_a_code_with_windows_too_wide_for_the_kernels_is_refused(tmp_path: Path) -> None:
    code = TrellisCode(window_bits=7, table=(*range(-63, 64), 0))
    write_synthetic(
        tmp_path / "wide",
        CONFIG,
        read_config(CONFIG),
        Recipe(code=code),
        name="wide",
        progress=lambda done, total: None,
    )
    with pytest.raises(UsageError, match=r"windows of 7 bits, but .* read 6\. Make it") as refused:
        load_folder(tmp_path / "wide", LoadOptions())
    assert "\n" not in str(refused.value)


def test_threads_are_the_pools_too(model_folder: Path) -> None:
    for n_threads in (1, 3):
        runtime = load_folder(model_folder, LoadOptions(threads=n_threads))
        runtime.close()
        assert runtime.pool is not None
        assert runtime.pool.n_threads == n_threads


def test_what_every_token_reads_leaves_an_embedding_out(model_folder: Path) -> None:
    runtime = load_folder(model_folder, LoadOptions())
    runtime.close()
    assert 0 < runtime.dense_bytes_per_token < runtime.dense_bytes


def test_without_a_budget_it_is_what_the_machine_has_free(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_module, "available_ram_bytes", lambda: 0)
    with pytest.raises(MemoryBudgetError, match="0 bytes of RAM are left for experts"):
        load_folder(model_folder, LoadOptions())


def test_the_context_is_at_most_the_models(model_folder: Path) -> None:
    with pytest.raises(UsageError, match=f"context is {CONTEXT + 1} tokens, .* for {CONTEXT}"):
        load_folder(model_folder, LoadOptions(context=CONTEXT + 1))
    runtime = load_folder(model_folder, LoadOptions())
    runtime.close()
    assert runtime.n_context == CONTEXT


def test_the_context_of_a_long_model_is_not_taken_whole(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_module, "DEFAULT_CONTEXT", 64)
    runtime = load_folder(model_folder, LoadOptions())
    runtime.close()
    assert runtime.n_context == 64


def test_more_bits_than_a_folder_holds_are_refused(
    talking_checkpoint: Path, tmp_path: Path
) -> None:
    lowmoe.quantize(talking_checkpoint, tmp_path / "2bit", bits=2, calibrate=False)
    lowmoe.quantize(talking_checkpoint, tmp_path / "nf4", format="nf4", calibrate=False)
    with pytest.raises(
        UsageError, match=r"bits is 4, but .* holds 2 bits a weight\. Make it again"
    ):
        load_folder(tmp_path / "2bit", LoadOptions(bits=4))
    with pytest.raises(UsageError, match=r"bits is 2, but .* holds nf4 experts"):
        load_folder(tmp_path / "nf4", LoadOptions(bits=2))
    runtime = load_folder(tmp_path / "nf4", LoadOptions())
    runtime.close()
    assert runtime.bits == 4


def test_threads_are_torchs_where_torch_computes_and_else_it_has_one(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_folder(model_folder, LoadOptions(threads=3)).close()
    assert torch.get_num_threads() == 1
    monkeypatch.setenv("LOWMOE_ISA", "torch")
    load_folder(model_folder, LoadOptions(threads=2)).close()
    assert torch.get_num_threads() == 2
    load_folder(model_folder, LoadOptions()).close()
    assert torch.get_num_threads() == 1  # what the machine of these tests has


def test_a_load_that_fails_leaves_no_descriptor_open(model_folder: Path, tmp_path: Path) -> None:
    folder = copy_of(model_folder, tmp_path / "spoiled")
    with (folder / "dense.safetensors").open("r+b") as file:
        file.seek(-100, 2)
        file.write(b"\xff" * 100)
    before = open_descriptors()
    for options in (LoadOptions(), LoadOptions(ram=1), LoadOptions(context=CONTEXT + 1)):
        with pytest.raises(FolderError, match=r"dense\.safetensors: .* The file was damaged"):
            load_folder(folder, options)
    with pytest.raises(LowMoeError, match="RAM are left for experts"):
        load_folder(model_folder, LoadOptions(ram=1))
    assert open_descriptors() == before


def test_closing_a_model_closes_its_files(model_folder: Path, talking_checkpoint: Path) -> None:
    before = open_descriptors()
    folder = load_folder(model_folder, LoadOptions())
    folder.store.want(0, [0])
    with folder.store.borrow(0, [0]):
        during = open_descriptors()
    folder.close()
    load_checkpoint(talking_checkpoint, LoadOptions(dtype="float32")).close()
    assert before < during
    assert open_descriptors() == before


def open_descriptors() -> int:
    proc = Path("/proc/self/fd")
    if not proc.is_dir():
        pytest.skip("only Linux tells which descriptors are open")
    return len(list(proc.iterdir()))
