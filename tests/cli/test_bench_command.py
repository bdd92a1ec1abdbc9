"""`lowmoe bench` prints a run's keys as medians, of real models and of shapes alone."""

import json
from pathlib import Path
from typing import Any

from lowmoe.checkpoint.folder import ModelFolder
from lowmoe.engine.load import LoadOptions, load_folder
from lowmoe.engine.profile import BETWEEN
from lowmoe.families import read_config
from tests.cli.conftest import Done, RunCommand
from tests.engine.test_statistics import KEYS
from tests.talking_mixtral import CONFIG

SMALL = ("--runs", "2", "--prompt-tokens", "6", "--new-tokens", "4")
TOGETHER = ["sequences", "decode_tokens_per_s_in_all"]
CEILINGS = [
    "gpu_ceiling_bytes_per_s",
    "ram_ceiling_bytes_per_s",
    "disk_read_bytes_per_s",
    "disk_ceiling_bytes_per_s",
]
# Experts of 36 KiB at 4 bits, 64 of them: a model of which a budget holds half.
SHAPE = {
    **CONFIG,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 8,
    "num_local_experts": 8,
}


def values_of(done: Done) -> dict[str, Any]:
    assert done.code == 0, done.err
    values: dict[str, Any] = json.loads(done.out.splitlines()[-1])
    return values


def test_json_has_the_medians_the_samples_and_the_ceilings(
    lowmoe_command: RunCommand, model_folder: Path
) -> None:
    values = values_of(lowmoe_command("bench", model_folder, *SMALL, "--json"))
    assert list(values) == ["machine", *KEYS, *TOGETHER, *CEILINGS, "profile", "samples"]
    assert values["profile"] is None
    assert [(s["prompt_tokens"], s["new_tokens"]) for s in values["samples"]] == [(6, 4), (6, 4)]
    assert values["decode_tokens_per_s"] == (
        sum(s["decode_tokens_per_s"] for s in values["samples"]) / 2
    )


def test_the_demo_is_what_is_measured_without_a_name(lowmoe_command: RunCommand) -> None:
    done = lowmoe_command(
        "bench", "--bits", "2", "--runs", "1", "--prompt-tokens", "2", "--new-tokens", "2"
    )
    assert done.code == 0
    machine, sample, median, ram, *disk = done.out.splitlines()
    assert "cores" in machine
    assert "2 + 2 tokens" in sample
    assert median.startswith("median: prefill ")
    assert ram.startswith("RAM reads: ")
    assert disk[0].startswith("disk, plain reads of the same sizes: ")


def test_a_profile_shows_each_part_of_a_token(
    lowmoe_command: RunCommand, model_folder: Path
) -> None:
    command = ("bench", model_folder, *SMALL, "--profile")
    profile = values_of(lowmoe_command(*command, "--json"))["profile"]
    assert list(profile) == ["prefill", "decode"]
    parts = {"gate, up", "down", "attention", "head", BETWEEN}
    for phases in profile.values():
        assert parts <= set(phases)
    lines = lowmoe_command(*command).out.splitlines()
    titles = [i for i, line in enumerate(lines) if line.startswith("a ")]
    assert [lines[i].partition(":")[0] for i in titles] == [
        "a token of the prompt",
        "a generated token",
    ]
    for begin, end in zip(titles, [*titles[1:], len(lines)], strict=True):
        shares = [float(line.split()[-1].rstrip("%")) for line in lines[begin + 1 : end]]
        assert len(shares) > len(parts)
        # Each share is rounded to a tenth of a percent.
        assert abs(sum(shares) - 100) <= 0.05 * len(shares)
        for part in parts:
            assert any(part in line for line in lines[begin + 1 : end])


def test_a_shape_alone_is_measured_without_a_checkpoint_and_written_once(
    lowmoe_command: RunCommand, tmp_path: Path, home: Path
) -> None:
    config = tmp_path / "shape" / "config.json"
    config.parent.mkdir()
    config.write_text(json.dumps(SHAPE))
    command = ("bench", config, "--synthetic", *SMALL, "--json")
    first = lowmoe_command(*command)
    assert values_of(first)["bits"] == 4
    (folder,) = (home / "models").iterdir()
    assert folder.name.startswith("synthetic-shape-")
    assert folder.name.endswith("-4bit")
    written = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert values_of(lowmoe_command(*command))["bits"] == 4
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == written


def test_a_shapes_layers_are_cut(lowmoe_command: RunCommand, tmp_path: Path, home: Path) -> None:
    config = tmp_path / "shape" / "config.json"
    config.parent.mkdir()
    config.write_text(json.dumps(SHAPE))
    command = ("bench", config, "--synthetic", *SMALL, "--json", "--layers")
    assert values_of(lowmoe_command(*command, 3))["bits"] == 4
    (folder,) = (home / "models").iterdir()
    assert folder.name.endswith("-3layers-4bit")
    with ModelFolder(folder) as written:
        assert (
            read_config(written.manifest.config).spec.layers == read_config(SHAPE).spec.layers[:3]
        )
    assert "--layers is 9, but must be 1 to 8" in lowmoe_command(*command, 9).err


def test_the_demo_models_shape_is_one_too(lowmoe_command: RunCommand, home: Path) -> None:
    assert values_of(lowmoe_command("bench", "--synthetic", *SMALL, "--json", "--layers", 1))
    (folder,) = (home / "models").iterdir()
    assert folder.name.startswith("synthetic-demo-1layers")


def test_layers_without_experts_are_no_shape_to_measure(lowmoe_command: RunCommand) -> None:
    refused = lowmoe_command("bench", "deepseek-v3", "--synthetic", "--layers", "3")
    assert refused.code == 2
    assert "the first 3 layers of deepseek-v3 have no experts" in refused.err


def test_a_model_twice_as_large_as_its_budget_runs_from_disk(
    lowmoe_command: RunCommand, tmp_path: Path, home: Path
) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(SHAPE))
    command = ("bench", config, "--synthetic", *SMALL, "--bits", "4", "--json")
    whole = values_of(lowmoe_command(*command))
    (folder,) = (home / "models").iterdir()
    experts = expert_bytes(folder) * 64

    values = values_of(lowmoe_command(*command, "--ram", dense_and_cache(folder) + experts // 2))

    assert values["placement"]["disk"] >= experts / 2
    assert values["placement"]["ram"] + values["placement"]["disk"] == (
        whole["placement"]["ram"] + whole["placement"]["disk"]
    )
    assert 0 < values["hit_rate"]["disk"] < 1
    assert values["bytes_per_token"]["disk"] > 0
    assert values["disk_read_bytes_per_s"] > 0


def test_sequences_are_decoded_together(lowmoe_command: RunCommand, model_folder: Path) -> None:
    command = ("bench", model_folder, *SMALL, "--sequences", "3")
    values = values_of(lowmoe_command(*command, "--json"))
    assert values["sequences"] == 3
    assert len(values["samples"]) % 3 == 0
    assert values["decode_tokens_per_s_in_all"] > 0
    shown = lowmoe_command(*command)
    assert shown.code == 0
    assert "3 together: decode" in shown.out


def test_a_profile_is_of_one_sequence(lowmoe_command: RunCommand, model_folder: Path) -> None:
    refused = lowmoe_command("bench", model_folder, "--sequences", "2", "--profile")
    assert refused.code == 2
    assert "--sequences is 2. Leave one of them out." in refused.err


def expert_bytes(folder: Path) -> int:
    with ModelFolder(folder) as opened:
        spans = opened.manifest.spans
        return sum(spans[f"layers.0.experts.0.plane{p}"].place.n_bytes for p in (0, 1))


def dense_and_cache(folder: Path) -> int:
    # With a budget given, RAM's speed is measured by weights, which are there already.
    runtime = load_folder(folder, LoadOptions(ram="90%"))
    runtime.close()
    cache = runtime.decoder.computation.cache_bytes(runtime.n_context)
    return runtime.dense_bytes + runtime.decoder.computation.working_bytes + cache
