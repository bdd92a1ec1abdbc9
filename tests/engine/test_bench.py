"""A benchmark runs what it says it runs, and its medians are medians."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from lowmoe.checkpoint.folder import ModelFolder
from lowmoe.engine.answer import Answer
from lowmoe.engine.batch import Batch
from lowmoe.engine.bench import BenchOptions, BenchResult, bench, disk_bandwidth
from lowmoe.engine.load import load_checkpoint, load_folder
from lowmoe.engine.load_options import LoadOptions
from lowmoe.engine.runtime import Runtime
from lowmoe.engine.statistics import PerTier, RunStatistics


@pytest.fixture
def runtime(model_folder: Path) -> Iterator[Runtime]:
    runtime = load_folder(model_folder, LoadOptions())
    yield runtime
    runtime.close()


def ignore(done: int, total: int) -> None:
    return None


def test_every_run_has_the_tokens_that_were_asked_for(runtime: Runtime) -> None:
    steps: list[tuple[int, int]] = []
    result = bench(
        runtime,
        BenchOptions(runs=2, prompt_tokens=9, new_tokens=5),
        lambda done, total: steps.append((done, total)),
    )
    assert [(s.prompt_tokens, s.new_tokens) for s in result.samples] == [(9, 5), (9, 5)]
    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert result.ram_ceiling_bytes_per_s > 0
    assert result.disk_ceiling_bytes_per_s is not None


def test_sequences_are_decoded_together_and_counted_in_all(model_folder: Path) -> None:
    runtime = load_folder(model_folder, LoadOptions(sequences=3))
    result = bench(runtime, BenchOptions(runs=2, prompt_tokens=9, new_tokens=6), ignore)
    runtime.close()
    assert [(s.prompt_tokens, s.new_tokens) for s in result.samples] == [(9, 6)] * 6
    values = result.to_json()
    assert values["sequences"] == 3
    # The first to begin are alone for a step or two.
    assert values["decode_tokens_per_s_in_all"] > values["decode_tokens_per_s"]
    alone = min(s.bytes_per_token.ram for s in result.samples)
    assert alone < runtime.dense_bytes_per_token  # which a step reads once for all three


def test_an_end_token_does_not_end_a_run(runtime: Runtime) -> None:
    every = tuple(range(runtime.spec.n_vocab))
    ending = replace(runtime, spec=replace(runtime.spec, end_ids=every))
    result = bench(ending, BenchOptions(runs=1, prompt_tokens=4, new_tokens=6), ignore)
    assert result.samples[0].new_tokens == 6


def test_no_run_finds_its_prompt_in_the_cache(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts: list[list[int]] = []
    join = Batch.join

    def remembering(batch: Batch, answer: Answer) -> None:
        join(batch, answer)
        prompts.append(answer.context[:])
        assert answer.n_reused == 0

    monkeypatch.setattr(Batch, "join", remembering)
    bench(runtime, BenchOptions(runs=2, prompt_tokens=8, new_tokens=1), ignore)
    assert len({tuple(p) for p in prompts}) == 3


def test_a_checkpoint_has_no_disk_ceiling(talking_checkpoint: Path) -> None:
    runtime = load_checkpoint(talking_checkpoint, LoadOptions(dtype="float32"))
    result = bench(runtime, BenchOptions(runs=1, prompt_tokens=3, new_tokens=2), ignore)
    runtime.close()
    assert result.disk_ceiling_bytes_per_s is None


def sample(**changes: object) -> RunStatistics:
    values: dict[str, object] = {
        "prompt_tokens": 4,
        "new_tokens": 2,
        "ttft_s": 1.0,
        "prefill_tokens_per_s": 4.0,
        "decode_tokens_per_s": 2.0,
        "bits": 4,
        "placement": PerTier(),
        "hit_rate": PerTier(ram=0.5),
        "bytes_per_token": PerTier(),
        "bound_tokens_per_s": None,
        "predicted_tokens_per_s": None,
        "to_gpu_bytes": 0,
        "promoted": 0,
        "trades": ("something",),
        "coarse_rate": 0.0,
    }
    return RunStatistics(**{**values, **changes})  # type: ignore[arg-type]


def test_medians_are_taken_key_by_key_and_leave_out_what_is_unknown() -> None:
    samples = [
        sample(ttft_s=1.0, decode_tokens_per_s=9.0, hit_rate=PerTier(ram=0.1)),
        sample(ttft_s=5.0, decode_tokens_per_s=None, hit_rate=PerTier(ram=0.9)),
        sample(ttft_s=2.0, decode_tokens_per_s=3.0, hit_rate=PerTier(ram=0.4)),
    ]
    values = BenchResult(
        sequences=2,
        samples=samples,
        tokens_per_s_in_all=[4.0, None, 8.0],
        gpu_ceiling_bytes_per_s=None,
        ram_ceiling_bytes_per_s=1e9,
        disk_read_bytes_per_s=None,
        disk_ceiling_bytes_per_s=None,
        profile=None,
    ).to_json()
    assert values["ttft_s"] == 2.0
    assert values["decode_tokens_per_s"] == 6.0
    assert values["decode_tokens_per_s_in_all"] == 6.0
    assert values["hit_rate"] == {"gpu": 0, "ram": 0.4, "disk": 0}
    assert values["bound_tokens_per_s"] is None
    assert values["profile"] is None
    assert values["samples"] == [s.to_json() for s in samples]


def test_disk_bandwidth_is_bytes_of_experts_over_time(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[int, int]] = []
    read_expert = ModelFolder.read_expert

    def remembering(self: ModelFolder, *what: object, check: bool) -> int:
        read.append(what[:2])  # type: ignore[arg-type]
        return read_expert(self, *what, check=check)  # type: ignore[arg-type]

    monkeypatch.setattr(ModelFolder, "read_expert", remembering)
    # Two readings of the clock are those around everything; readers that ask see no time pass.
    clock = iter([0.0, *[0.0] * 8, 2.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    with ModelFolder(model_folder) as folder:
        n_bytes = sum(
            s.place.n_bytes
            for name, s in folder.manifest.spans.items()
            if ".plane" in name and ".experts." in name
        )
        assert disk_bandwidth(folder) == n_bytes / 2.0
    assert sorted(read) == [(layer, expert) for layer in range(2) for expert in range(4)]


def test_disk_reads_are_those_of_decoding(runtime: Runtime) -> None:
    # All experts fit and are in RAM after a prompt that wants every one, so decoding reads nothing.
    result = bench(runtime, BenchOptions(runs=1, prompt_tokens=200, new_tokens=3), ignore)
    assert result.samples[0].bytes_per_token.disk == 0
    assert result.disk_read_bytes_per_s is None
