"""A profile divides all of a token's time among the parts it was spent in."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from lowmoe.engine.bench import BenchOptions, BenchResult, bench
from lowmoe.engine.load import load_checkpoint, load_folder
from lowmoe.engine.load_options import LoadOptions
from lowmoe.engine.profile import BETWEEN, BenchProfile, Profiler
from lowmoe.engine.runtime import Runtime
from lowmoe.errors import UsageError

OPTIONS = BenchOptions(runs=1, prompt_tokens=40, new_tokens=12, profile=True)
# Phases that every token of a native model goes through.
PHASES = {"norm", "q, k, v", "attention", "attention's output", "router", "gate, up", "down"}


def ignore(done: int, total: int) -> None:
    return None


@pytest.fixture(params=[1, 2])
def runtime(model_folder: Path, request: pytest.FixtureRequest) -> Iterator[Runtime]:
    runtime = load_folder(model_folder, LoadOptions(threads=request.param))
    yield runtime
    runtime.close()


def test_the_parts_add_up_to_a_tokens_time(runtime: Runtime) -> None:
    # The run's own clock is read some microseconds before or after the profile's. On a busy machine
    # another process may come in between, but not in every one of a few runs.
    apart = [difference(bench(runtime, OPTIONS, ignore)) for _ in range(5)]
    assert min(apart) < 0.05


def difference(result: BenchResult) -> float:
    """Between a profile and the clock of the run that it is of, relative, the larger of the two."""
    profile, last = result.profile, result.samples[-1]
    assert profile is not None
    assert profile.decode is not None
    assert last.decode_tokens_per_s is not None
    decode = sum(profile.decode.values()) * last.decode_tokens_per_s
    prefill = sum(profile.prefill.values()) * OPTIONS.prompt_tokens / last.ttft_s
    return max(abs(decode - 1), abs(prefill - 1))


def test_every_part_is_named_and_the_largest_comes_first(runtime: Runtime) -> None:
    profile = bench(runtime, OPTIONS, ignore).profile
    assert profile is not None
    assert profile.decode is not None
    for phases in (profile.prefill, profile.decode):
        assert PHASES | {BETWEEN} <= set(phases)
        assert list(phases.values()) == sorted(phases.values(), reverse=True)
        assert min(phases.values()) > 0


def test_one_token_has_no_decode_profile(runtime: Runtime) -> None:
    options = BenchOptions(runs=1, prompt_tokens=5, new_tokens=1, profile=True)
    profile = bench(runtime, options, ignore).profile
    assert profile is not None
    assert profile.decode is None


def test_what_torch_computes_has_no_profile(talking_checkpoint: Path) -> None:
    runtime = load_checkpoint(talking_checkpoint, LoadOptions(dtype="float32"))
    with pytest.raises(UsageError, match=r"computed by torch\. Leave it out"):
        bench(runtime, OPTIONS, ignore)
    runtime.close()


class WrittenPool:
    """A pool whose phases are what the test says they were."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}

    def start_profile(self) -> None:
        self.spent = {}

    def phases(self) -> list[tuple[str, float, int]]:
        return [(name, seconds, 1) for name, seconds in self.spent.items()]


def test_seconds_are_those_of_the_last_run_divided_by_its_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = iter([0.0, 50.0, 100.0, 103.0, 104.0, 107.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    pool = WrittenPool()
    profiler = Profiler(cast(Runtime, SimpleNamespace(pool=cast(Any, pool))))
    profiler.begin()
    pool.spent = {"down": 40.0}
    profiler.token()
    profiler.begin()  # the run before is forgotten
    pool.spent = {"down": 1.0, "attention": 1.5}
    profiler.token()
    pool.spent = {"down": 2.0, "attention": 1.5, "head": 0.25}
    profiler.token()
    pool.spent = {"down": 3.0, "attention": 1.5, "head": 0.5}
    profiler.token()
    # 3 s for 10 tokens of the prompt, half a second of them in no phase; then 4 s for two tokens.
    assert profiler.profile(10) == BenchProfile(
        prefill={"attention": 0.15, "down": 0.1, BETWEEN: 0.05},
        decode={BETWEEN: 0.75, "down": 1.0, "head": 0.25},
    )
    decode = profiler.profile(10).decode
    assert decode is not None
    assert list(decode) == ["down", BETWEEN, "head"]
