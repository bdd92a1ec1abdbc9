"""`lowmoe plan`, as a user types it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from lowmoe.experts.trace import write_trace
from lowmoe.families.aliases import ALIASES
from lowmoe.plan.synthetic_trace import synthetic_trace
from tests.cli.conftest import RunCommand


def test_plan_prints_rows_as_json(lowmoe_command: RunCommand) -> None:
    done = lowmoe_command("plan", "mixtral-8x22b", "--gpu", "4090", "--ram", "64GiB", "--json")
    assert done.code == 0
    rows = json.loads(done.out.splitlines()[-1])["rows"]
    widths = [(row["bits"], row["miss_bits"]) for row in rows]
    assert widths == [(2, None), (4, None), (6, None), (4, 2), (6, 2), (6, 4)]
    for row in rows:
        assert row["decode_tokens_per_s"][0] < row["decode_tokens_per_s"][1]
        assert set(row["bytes"]) == {"disk", "ram", "vram"}
        misses = f" --miss-planes {row['miss_bits'] // 2}" if row["miss_bits"] else ""
        line = f"lowmoe run mixtral-8x22b --bits {row['bits']} --gpu 4090{misses}"
        assert row["command"] == line


def test_plan_reads_a_config_file(lowmoe_command: RunCommand, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(dict(ALIASES["olmoe-1b-7b"].config)))
    by_file = lowmoe_command("plan", config, "--gpu", "none", "--ram", "8GB", "--json")
    by_name = lowmoe_command("plan", "olmoe-1b-7b", "--gpu", "none", "--ram", "8GB", "--json")
    bytes_of = [
        [row["bytes"] for row in json.loads(done.out.splitlines()[-1])["rows"]]
        for done in (by_file, by_name)
    ]
    assert bytes_of[0] == bytes_of[1]


def test_plan_all_ranks_every_alias(lowmoe_command: RunCommand) -> None:
    done = lowmoe_command("plan", "--all", "--gpu", "4090", "--ram", "64GiB", "--json")
    rows = json.loads(done.out.splitlines()[-1])["rows"]
    assert {row["model"] for row in rows} == set(ALIASES)
    lows = [row["decode_tokens_per_s"] for row in rows]
    middles = [0.0 if pair is None else pair[0] * pair[1] for pair in lows]
    assert middles == sorted(middles, reverse=True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["mixtral-8x7b", "--gpu", "4090"], "--ram 64GiB"),
        (["mixtral-8x7b", "--gpu", "4090", "--ram", "90%"], "Give a size: --ram 64GiB"),
        (["mixtral-8x7b", "--gpu", "9999"], "must be auto, none or one of"),
        (["mixtral-8x7b", "--gpu", "none", "--disk", "7GB"], "a speed like 7GB/s"),
        (["mixtral-8x7b", "--gpu", "none", "--disk", "7/s"], "'7/s', but must be a speed like"),
        (["mixtral-8x7b", "--gpu", "none", "--bits", "3"], "must be 2, 4, 6 or auto"),
        (["mixtral-8x7b", "--gpu", "none", "--vram", "8GB"], "no GPU is planned for"),
        (["mixtral-8x7b", "--gpu", "none", "--context", "99999999"], "was made for"),
        ([], "plan takes a model, or --all"),
        (["mixtral-8x7b", "--all"], "plan takes a model, or --all"),
        (["http://example.org/config.json"], "no https address"),
    ],
)
def test_what_plan_cannot_answer_is_said_in_a_line(
    lowmoe_command: RunCommand, arguments: list[str], said: str
) -> None:
    done = lowmoe_command("plan", *arguments)
    assert done.code == 2
    assert said in done.err
    assert len(done.err.splitlines()) == 1


@pytest.mark.parametrize("name", ["RTX 4090", "rtx4090", "NVIDIA GeForce RTX 4090"])
def test_a_card_may_be_called_as_its_box_does(lowmoe_command: RunCommand, name: str) -> None:
    rows = [
        json.loads(
            lowmoe_command(
                "plan", "mixtral-8x7b", "--gpu", gpu, "--ram", "64GiB", "--json"
            ).out.splitlines()[-1]
        )["rows"]
        for gpu in ("4090", name)
    ]
    speeds = [[row["decode_tokens_per_s"] for row in of_one] for of_one in rows]
    assert speeds[0] == speeds[1]


def test_more_ram_than_is_here_is_planned_for_and_said(lowmoe_command: RunCommand) -> None:
    done = lowmoe_command("plan", "mixtral-8x7b", "--gpu", "none", "--ram", "9TB")
    assert "with more RAM than its" in done.out
    line = done.out.splitlines()[-1]
    assert line.startswith("lowmoe run mixtral-8x7b")
    assert "--ram" not in line


@pytest.mark.parametrize(
    ("model", "name", "options"),
    [
        ("mixtral-8x22b", "RTX 4090", " --gpu 'RTX 4090'"),
        ("deepseek-v2-lite", "4090", " --gpu none"),  # whose attention no kernel of a GPU computes
    ],
)
def test_the_line_that_runs_it_can_be_typed(
    lowmoe_command: RunCommand, model: str, name: str, options: str
) -> None:
    done = lowmoe_command("plan", model, "--gpu", name, "--ram", "64GiB")
    assert done.out.splitlines()[-1].endswith(options)


def test_another_card_may_have_more_memory(lowmoe_command: RunCommand) -> None:
    rows = [
        json.loads(
            lowmoe_command(
                "plan", "mixtral-8x7b", "--gpu", "4090", "--ram", "64GiB", *more, "--json"
            ).out.splitlines()[-1]
        )["rows"]
        for more in ([], ["--vram", "48GiB"])
    ]
    assert rows[1][-1]["bytes"]["vram"] > rows[0][-1]["bytes"]["vram"]


def test_the_words_of_the_table_are_explained(lowmoe_command: RunCommand) -> None:
    done = lowmoe_command("plan", "mixtral-8x22b", "--gpu", "4090", "--ram", "64GiB")
    assert "4, misses 2: with --miss-planes 1, experts that are not on the GPU" in done.out
    done = lowmoe_command("plan", "mixtral-8x7b", "--gpu", "h100", "--ram", "256GiB")
    assert "*: what --bits auto takes" in done.out
    assert "miss" not in done.out


def test_a_picture_is_drawn(lowmoe_command: RunCommand, tmp_path: Path) -> None:
    path = tmp_path / "plan.png"
    machine = ["--gpu", "4090", "--ram", "64GiB"]
    done = lowmoe_command("plan", "mixtral-8x7b", *machine, "--plot", path)
    assert done.code == 0
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_picture_of_no_known_format_is_refused(
    lowmoe_command: RunCommand, tmp_path: Path
) -> None:
    path = tmp_path / "plan.nonsense"
    done = lowmoe_command("plan", "mixtral-8x7b", "--gpu", "none", "--plot", path)
    assert done.code == 2
    assert "no picture was written" in done.err


def test_a_text_is_traced_and_simulated(
    lowmoe_command: RunCommand, model_folder: Path, tmp_path: Path
) -> None:
    text, trace, picture = tmp_path / "text", tmp_path / "t.npz", tmp_path / "hits.png"
    text.write_text("Once upon a time there was a model. " * 20)
    done = lowmoe_command("trace", model_folder, text, "--out", trace, "--tokens", 60)
    assert done.code == 0, done.err
    machine = ["--gpu", "4090", "--ram", "16GiB"]
    done = lowmoe_command("simulate", trace, *machine, "--plot", picture, "--json")
    assert done.code == 0, done.err
    policies = json.loads(done.out.splitlines()[-1])["policies"]
    assert set(policies) == {"decayed", "lru", "static", "belady"}
    for found in policies.values():
        assert found["gpu"] == 1.0  # a model so small is on the card as a whole
        assert found["tokens_per_s"] > 0
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trace", "demo"], "a text file, or --synthetic"),
        (["trace", "mixtral-8x9b", "--synthetic"], "has no fit"),
        (["trace", "mixtral-8x7b", "--synthetic", "--tokens", "1"], "at least 2"),
        (["simulate", "nowhere.npz", "--policy", "best"], "must be all, decayed"),
        (["simulate", "nowhere.npz", "--bits", "5"], "must be 2, 4 or 6"),
        (["simulate", "nowhere.npz", "--threads", "-2"], "must be at least 1"),
        (["simulate", "nowhere.npz", "--context", "0"], "must be at least 1"),
        (["trace", "demo", "nowhere.txt"], "nowhere.txt: cannot be read"),
        (["trace", "demo", "text", "--out", "nowhere/trace.npz"], "a folder that is there"),
    ],
)
def test_what_cannot_be_traced_or_simulated_is_said_in_a_line(
    lowmoe_command: RunCommand, arguments: list[str], said: str
) -> None:
    done = lowmoe_command(*arguments)
    assert done.code == 2
    assert said in done.err
    assert len(done.err.splitlines()) == 1


def test_a_trace_of_one_token_is_neither_recorded_nor_replayed(
    lowmoe_command: RunCommand, model_folder: Path, tmp_path: Path
) -> None:
    text, short = tmp_path / "text", tmp_path / "short.npz"
    text.write_text("a")
    done = lowmoe_command("trace", model_folder, text, "--out", short)
    assert done.code == 2
    assert "at least 2" in done.err
    assert not short.exists()
    whole = synthetic_trace("mixtral-8x7b", 2)
    write_trace(short, replace(whole, experts=whole.experts[:1]))
    done = lowmoe_command("simulate", short, "--gpu", "4090", "--ram", "16GiB")
    assert done.code == 2
    assert "1 token" in done.err


def test_the_ceiling_reads_from_disk_what_no_memory_holds(
    lowmoe_command: RunCommand, tmp_path: Path
) -> None:
    trace = tmp_path / "trace.npz"
    write_trace(trace, synthetic_trace("mixtral-8x7b", 96))
    machine = ["--gpu", "4090", "--ram", "8GiB", "--bits", "6"]  # 36 GB of weights
    done = lowmoe_command("simulate", trace, *machine, "--policy", "belady", "--json")
    found = json.loads(done.out.splitlines()[-1])["policies"]["belady"]
    assert found["disk"] > 0.02
    assert found["gpu"] + found["ram"] + found["disk"] == pytest.approx(1)


def test_plan_all_asks_of_no_model_a_longer_context_than_it_has(
    lowmoe_command: RunCommand,
) -> None:
    machine = ["--gpu", "4090", "--ram", "64GiB"]
    done = lowmoe_command("plan", "--all", *machine, "--context", 100_000, "--json")
    named = {row["model"] for row in json.loads(done.out.splitlines()[-1])["rows"]}
    assert "qwen3-coder-480b-a35b" in named
    assert "mixtral-8x7b" not in named
    done = lowmoe_command("plan", "--all", *machine, "--context", 10**8)
    assert done.code == 2
    assert "no model with an alias was made for more than" in done.err
