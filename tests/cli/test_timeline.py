"""`--trace-timeline`: a trace that viewers can read, and whose spans add up to what was done."""

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from lowmoe.decoder.in_torch import TorchComputation
from lowmoe.decoder.native import NativeComputation
from lowmoe.engine.answer import Answer
from lowmoe.engine.batch import Batch
from lowmoe.engine.load import load_folder
from lowmoe.engine.load_options import LoadOptions
from lowmoe.timeline import MOST_SPANS, Timeline
from tests.cli.conftest import RunCommand
from tests.engine.test_gpu_in_part import Workplace
from tests.stand_in_gpu import Cards

ASKED = ["--prompt", "Once", "--temperature", "0", "--max-new-tokens", "4", "--json"]
N_LAYERS, N_ACTIVE = 2, 2  # of the talking model


class Trace:
    """A file by rows, held to the format as it is read."""

    def __init__(self, file: Path) -> None:
        self.values = json.loads(file.read_text())
        events = self.values["traceEvents"]
        names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
        self.rows: dict[str, list[dict[str, Any]]] = {name: [] for name in names.values()}
        for event in events:
            assert event["ph"] in "MX"
            assert event["pid"] == 1
            if event["ph"] == "X":
                assert event["ts"] >= 0
                assert event["dur"] >= 0
                self.rows[names[event["tid"]]].append(event)
        for row in self.rows.values():
            assert_nested(row)

    def seconds(self, row: str, *, containing: str = "") -> float:
        return sum(e["dur"] for e in self.rows[row] if containing in e["name"]) / 1e6


def assert_nested(row: list[dict[str, Any]]) -> None:
    """In the order of their beginnings, each beside or inside what began before it."""
    open_until: list[float] = []
    last = 0.0
    for event in row:
        # In nanoseconds: sums of decimal fractions of microseconds are not exact.
        begin, end = (round(n * 1e3) for n in (event["ts"], event["ts"] + event["dur"]))
        assert begin >= last
        last = begin
        while open_until and open_until[-1] <= begin:
            open_until.pop()
        assert not open_until or end <= open_until[-1], event
        open_until.append(end)


def passes_of(trace: Trace) -> list[dict[str, Any]]:
    return [e for e in trace.rows["passes"] if "tokens" in e["args"]]


def least_ram(lowmoe_command: RunCommand, model_folder: Path) -> int:
    """Bytes with which two experts fit in RAM."""
    refused = lowmoe_command("run", model_folder, *ASKED, "--ram", "1000000B")
    more = re.search(r"Give at least (\d+) bytes more", refused.err)
    assert more is not None
    return 1_000_000 + int(more[1])


def inside(event: dict[str, Any], outer: dict[str, Any]) -> bool:
    end = outer["ts"] + outer["dur"] + 1e-3
    return outer["ts"] <= event["ts"] and event["ts"] + event["dur"] <= end


def test_spans_of_a_run_on_the_cpu_add_up(
    lowmoe_command: RunCommand, model_folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "trace.json"
    little = least_ram(lowmoe_command, model_folder)
    done = lowmoe_command("run", model_folder, *ASKED, "--trace-timeline", file, "--ram", little)
    assert done.code == 0, done.err
    statistics, trace = json.loads(done.out.splitlines()[-1]), Trace(file)
    passes = passes_of(trace)
    # The tokens of the prompt, and all but the last of the answer.
    n_tokens = statistics["prompt_tokens"] + statistics["new_tokens"] - 1
    assert sum(e["args"]["tokens"] for e in passes) == n_tokens
    layers = [e for e in trace.rows["layers"] if "layer" in e["args"]]
    assert [e["args"]["layer"] for e in layers] == [*range(N_LAYERS)] * len(passes)
    for number, event in enumerate(layers):
        assert inside(event, passes[number // N_LAYERS])
    assert trace.seconds("layers", containing="layer") <= sum(e["dur"] for e in passes) / 1e6
    parts = sum(trace.seconds("layers", containing=p) for p in ("attend", "route", "mix"))
    assert parts <= trace.seconds("layers", containing="layer")
    assert trace.seconds("CPU experts") + trace.seconds("waits") <= trace.seconds(
        "layers", containing="mix"
    )
    assert trace.rows["waits"], "with so little RAM, experts have to be waited for"
    used = [e["args"] for e in trace.rows["CPU experts"]]
    of_single = [e for e in passes if e["args"]["tokens"] == 1]
    assert sum(len(e["experts"]) for e in used) >= len(of_single) * N_LAYERS * N_ACTIVE
    readers = [row for name, row in trace.rows.items() if name.startswith("disk reader")]
    assert readers
    assert all(e["args"]["bytes"] > 0 for row in readers for e in row)


@pytest.mark.parametrize("isa", ["", "torch"])
def test_answers_are_those_of_an_untraced_run(
    lowmoe_command: RunCommand,
    monkeypatch: pytest.MonkeyPatch,
    model_folder: Path,
    tmp_path: Path,
    isa: str,
) -> None:
    if isa:
        monkeypatch.setenv("LOWMOE_ISA", isa)
    plain = lowmoe_command("run", model_folder, *ASKED).out.splitlines()[0]
    traced = lowmoe_command(
        "run", model_folder, *ASKED, "--trace-timeline", tmp_path / "trace.json"
    )
    assert traced.out.splitlines()[0] == plain


def test_untraced_models_are_not_wrapped_in_anything(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = load_folder(model_folder, LoadOptions())
    assert type(runtime.decoder.computation) is NativeComputation
    assert type(runtime.store).__name__ == "ExpertStore"
    runtime.close()
    monkeypatch.setenv("LOWMOE_ISA", "torch")
    runtime = load_folder(model_folder, LoadOptions())
    assert type(runtime.decoder.computation) is TorchComputation
    runtime.close()


def test_a_gpu_that_has_all_shows_its_operations(
    lowmoe_command: RunCommand, monkeypatch: pytest.MonkeyPatch, model_folder: Path, tmp_path: Path
) -> None:
    Cards(monkeypatch)
    file = tmp_path / "trace.json"
    assert lowmoe_command("run", model_folder, *ASKED, "--trace-timeline", file).code == 0
    trace = Trace(file)
    steps = [e for e in trace.rows["GPU"] if "operations" in e["args"]]
    assert len(steps) == len([e for e in passes_of(trace) if e["args"]["tokens"] == 1])
    assert {"attend", "norm_route", "experts_down"} <= set(steps[0]["args"]["operations"])
    assert {e["name"] for e in trace.rows["GPU"]} >= {"embed", "linear", "experts_inner"}


@pytest.mark.parametrize("misses", ["cpu", "page"])
def test_a_gpu_that_has_some_shows_who_does_what(
    lowmoe_command: RunCommand,
    monkeypatch: pytest.MonkeyPatch,
    model_folder: Path,
    tmp_path: Path,
    misses: str,
) -> None:
    work = Workplace(monkeypatch, model_folder)
    file = tmp_path / "trace.json"
    work.give(3, gpu="4090")
    asked = [*ASKED, "--bits", "4", "--misses", misses, "--max-new-tokens", "8"]
    done = lowmoe_command("run", model_folder, *asked, "--trace-timeline", file)
    assert done.code == 0, done.err
    trace = Trace(file)
    passes = passes_of(trace)
    layers = [e for e in trace.rows["layers"] if "layer" in e["args"]]
    assert [e["args"]["layer"] for e in layers] == [*range(N_LAYERS)] * len(passes)
    pieces = [e for e in trace.rows["GPU"] if "operations" in e["args"]]
    n_single = len([e for e in passes if e["args"]["tokens"] == 1])
    assert len(pieces) == 2 * N_LAYERS * n_single
    # The host, and whoever sends in the background.
    waits = [e for name, row in trace.rows.items() if name.startswith("waits") for e in row]
    assert len([e for e in waits if e["name"] == "GPU"]) == N_LAYERS * len(passes)  # few tokens
    if misses == "cpu":
        assert trace.rows["CPU experts"]
    else:
        copied = sum(e["args"]["bytes"] for e in trace.rows["copies"] if e["args"]["bytes"] > 1000)
        assert copied == json.loads(done.out.splitlines()[-1])["to_gpu_bytes"]


def test_bench_writes_one_too(
    lowmoe_command: RunCommand, model_folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "trace.json"
    few = ["--runs", "1", "--prompt-tokens", "4", "--new-tokens", "3"]
    assert lowmoe_command("bench", model_folder, *few, "--trace-timeline", file).code == 0
    assert len(passes_of(Trace(file))) == 2 * (1 + 3)


def test_an_interrupted_run_leaves_a_whole_file_and_no_other(
    lowmoe_command: RunCommand, monkeypatch: pytest.MonkeyPatch, model_folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "trace.json"
    whole = Batch._decode
    calls: list[int] = []

    def interrupted(batch: Batch, running: list[Answer]) -> None:
        calls.append(len(running))
        if len(calls) in (3, 4):  # twice, so that it is not the end of an answer either
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        whole(batch, running)

    monkeypatch.setattr(Batch, "_decode", interrupted)
    done = lowmoe_command("run", model_folder, *ASKED, "--trace-timeline", file)
    assert done.code == 130
    assert len(passes_of(Trace(file))) == len(calls)
    assert list(tmp_path.glob("trace*")) == [file]


@pytest.mark.parametrize("where", ["", "nowhere/trace.json"])
def test_a_file_that_cannot_be_is_said_before_anything_is_loaded(
    lowmoe_command: RunCommand, model_folder: Path, tmp_path: Path, where: str
) -> None:
    done = lowmoe_command("run", model_folder, *ASKED, "--trace-timeline", tmp_path / where)
    assert (done.code, done.out) == (2, "")
    assert "but that is a folder or in none" in done.err


def test_a_timeline_does_not_grow_without_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowmoe.timeline.MOST_SPANS", 3)
    assert MOST_SPANS > 3
    timeline = Timeline()
    for _ in range(5):
        with timeline.span("passes", "x"):
            pass
    trace = json.loads(timeline.to_json())
    assert len([e for e in trace["traceEvents"] if e["ph"] == "X"]) == 3
    assert trace["otherData"] == {"spans left out": 2}
