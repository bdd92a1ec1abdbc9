"""quantize, inspect, verify, list, rm, doctor, eval: a model's life on the command line."""

import builtins
import importlib.metadata
import json
import shutil
from pathlib import Path

import pytest

import lowmoe
from cuda_ext import card
from lowmoe.checkpoint.layout import Recipe
from lowmoe.checkpoint.popularity import POPULARITY
from lowmoe.families import read_config
from lowmoe.families.aliases import ALIASES
from lowmoe.kernels import cpu
from lowmoe.loader.synthetic import write_synthetic
from lowmoe.plan.memo import NAME
from tests.cli.conftest import RunCommand
from tests.talking_mixtral import CONFIG, copy_of


def test_a_models_life_from_quantize_to_rm(
    lowmoe_command: RunCommand, talking_checkpoint: Path, home: Path
) -> None:
    folder = home / "models" / "mine"

    made = lowmoe_command("quantize", talking_checkpoint, folder, "--bits", "4")
    assert made.code == 0
    assert made.err.splitlines()[-1].startswith(f"{folder}: ")
    assert made.err.splitlines()[-1].endswith(", complete")

    ran = lowmoe_command("run", "mine", "--prompt", "Once", "--max-new-tokens", "2", "--json")
    assert json.loads(ran.out.splitlines()[-1])["bits"] == 4

    shown = json.loads(lowmoe_command("inspect", "mine", "--json").out)
    assert shown["format"] == "trellis, 2 planes"
    assert shown["path"] == str(folder)
    assert shown["calibration"] != "none"
    assert "vocabulary           320" in lowmoe_command("inspect", "mine").out

    verified = lowmoe_command("verify", "mine")
    assert (verified.code, verified.out.count("\n")) == (0, 1)
    assert f"all {shown['spans']} spans are what they should be" in verified.out

    listed = json.loads(lowmoe_command("list", "--json").out)
    n_bytes = sum(f.stat().st_size for f in folder.iterdir())
    assert listed == {
        "home": str(home / "models"),
        "models": [{"name": "mine", "bytes": n_bytes, "finished": True}],
    }

    assert lowmoe_command("rm", "mine", "--yes").code == 0
    assert json.loads(lowmoe_command("list", "--json").out)["models"] == []


def test_a_model_is_optimized_by_its_name(
    lowmoe_command: RunCommand, model_folder: Path, home: Path, tmp_path: Path
) -> None:
    folder, trace, text = home / "models" / "mine", tmp_path / "t.npz", tmp_path / "text"
    shutil.copytree(model_folder, folder)
    text.write_text("Once upon a time there was a model. " * 9)
    assert lowmoe_command("trace", "mine", text, "--out", trace, "--tokens", 40).code == 0
    done = lowmoe_command("optimize", "mine", "--trace", trace)
    assert (done.code, (folder / POPULARITY).is_file()) == (0, True)
    nowhere = lowmoe_command("optimize", "mixtral-8x7b", "--trace", trace)
    assert nowhere.code == 2
    assert "no model folder here yet" in nowhere.err
    ours = lowmoe_command("optimize", "demo", "--trace", trace)
    assert ours.code == 2
    assert "demo comes with lowmoe" in ours.err


@pytest.mark.parametrize("other", ["demo", "nothing/like it"])
def test_only_a_checkpoint_is_compared_with(
    lowmoe_command: RunCommand, model_folder: Path, tmp_path: Path, other: str
) -> None:
    text = tmp_path / "text"
    text.write_text("Once upon a time there was a model. " * 9)
    done = lowmoe_command("eval", model_folder, text, "--against", other)
    assert done.code == 2
    assert f"--against is {other}, but must be" in done.err


def test_list_tells_what_is_unfinished_and_what_comes_along(
    lowmoe_command: RunCommand, model_folder: Path, home: Path
) -> None:
    copy_of(model_folder, home / "models" / "half", without="manifest.json")
    out = lowmoe_command("list").out
    assert "comes with lowmoe" in out
    assert "unfinished: run the same command again" in out
    assert "mixtral-8x22b" in out


def test_inspect_shows_a_checkpoint_and_the_demo(
    lowmoe_command: RunCommand, talking_checkpoint: Path
) -> None:
    shown = json.loads(lowmoe_command("inspect", talking_checkpoint, "--json").out)
    assert (shown["format"], shown["layers"]) == ("checkpoint, unquantized", 2)
    assert shown["chat_template"] == "chat_template.jinja"
    demo = json.loads(lowmoe_command("inspect", "--json").out)
    assert (demo["vocabulary"], demo["chat_template"]) == (8192, "chat_template.jinja")


def test_inspect_shows_that_there_is_no_chat_template(
    lowmoe_command: RunCommand, talking_checkpoint: Path, tmp_path: Path
) -> None:
    folder = copy_of(talking_checkpoint, tmp_path / "silent")
    (folder / "chat_template.jinja").unlink()
    assert json.loads(lowmoe_command("inspect", folder, "--json").out)["chat_template"] is None
    (folder / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    shown = json.loads(lowmoe_command("inspect", folder, "--json").out)
    assert shown["chat_template"] == "tokenizer_config.json"


def test_verify_names_what_a_flipped_bit_has_damaged(
    lowmoe_command: RunCommand, model_folder: Path, tmp_path: Path
) -> None:
    folder = copy_of(model_folder, tmp_path / "damaged")
    path = folder / "experts-plane2-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    done = lowmoe_command("verify", folder)
    assert done.code == 1
    assert done.out == ""
    last = done.err.splitlines()[-1]
    assert last.startswith(f"lowmoe: {path}: layers.1.experts.3.plane2 has hash")


@pytest.mark.parametrize(("reply", "stays"), [("n\n", True), ("\n", True), ("Yes\n", False)])
def test_rm_asks_first(
    lowmoe_command: RunCommand,
    model_folder: Path,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    reply: str,
    stays: bool,
) -> None:
    folder = copy_of(model_folder, home / "models" / "asked")
    questions: list[str] = []

    def answer(question: str) -> str:
        questions.append(question)
        return reply

    monkeypatch.setattr(builtins, "input", answer)
    done = lowmoe_command("rm", "asked")
    assert done.code == 0
    assert folder.exists() == stays
    assert ("Nothing was deleted" in done.out) == stays
    (question,) = questions
    assert question.startswith(f"Delete {folder}, ")


def test_rm_with_nobody_to_answer_deletes_nothing(
    lowmoe_command: RunCommand, model_folder: Path, home: Path
) -> None:
    folder = copy_of(model_folder, home / "models" / "asked")
    done = lowmoe_command("rm", "asked")
    assert done.code == 2
    assert "Give --yes to delete without asking" in done.err
    assert (folder / "manifest.json").is_file()


def test_pulling_what_was_pulled_says_so(
    lowmoe_command: RunCommand, model_folder: Path, home: Path
) -> None:
    copy_of(model_folder, home / "models" / "mistralai--Mixtral-8x7B-v0.1")
    done = lowmoe_command("pull", "mixtral-8x7b-base")
    assert (done.code, done.out) == (0, "")
    assert done.err.endswith("mistralai--Mixtral-8x7B-v0.1 is complete already.\n")


@pytest.mark.parametrize("command", [("pull",), ("run", "--prompt", "Once", "--max-new-tokens", 1)])
def test_what_a_finished_pull_left_goes_the_next_time_the_model_is_named(
    lowmoe_command: RunCommand, model_folder: Path, home: Path, command: tuple[str, ...]
) -> None:
    copy_of(model_folder, home / "models" / "mistralai--Mixtral-8x7B-v0.1")
    work = home / "work" / "mistralai--Mixtral-8x7B-v0.1"
    work.mkdir(parents=True)
    (work / "model-Q8_0.gguf").write_bytes(b"GGUF")
    done = lowmoe_command(command[0], "mixtral-8x7b-base", *command[1:])
    assert done.code == 0
    assert not work.exists()


@pytest.mark.parametrize(
    ("options", "asked"),
    [(("--bits", "6"), "trellis at 6 bits"), (("--format", "nf4"), "nf4")],
)
def test_pulling_more_than_the_finished_folder_holds_is_refused(
    lowmoe_command: RunCommand, two_bit_folder: Path, options: tuple[str, ...], asked: str
) -> None:
    name = two_bit_folder.name
    done = lowmoe_command("pull", "mixtral-8x7b-base", *options)
    assert (done.code, done.out) == (2, "")
    assert f"is finished with trellis at 2 bits, asked for is {asked}" in done.err
    assert f"lowmoe rm {name}" in done.err
    assert lowmoe_command("pull", "mixtral-8x7b-base", "--bits", "2").code == 0


@pytest.fixture
def two_bit_folder(talking_checkpoint: Path, home: Path) -> Path:
    folder = home / "models" / "mistralai--Mixtral-8x7B-v0.1"
    lowmoe.quantize(talking_checkpoint, folder, bits=2, calibrate=False)
    return folder


def test_quantizing_into_a_finished_folder_names_both_recipes(
    lowmoe_command: RunCommand, talking_checkpoint: Path, model_folder: Path
) -> None:
    done = lowmoe_command("quantize", talking_checkpoint, model_folder, "--format", "bf16")
    assert done.code == 2
    assert "finished model already with trellis at 6 bits, asked for is bf16" in done.err


@pytest.fixture
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests also run from a checkout that nobody installed."""
    monkeypatch.setattr(importlib.metadata, "version", lambda name: f"{name} 1.2.3")


@pytest.mark.usefixtures("_installed")
def test_doctor_tells_what_the_machine_offers(lowmoe_command: RunCommand, home: Path) -> None:
    values = json.loads(lowmoe_command("doctor", "--json").out)
    assert values["lowmoe"] == "lowmoe 1.2.3"
    assert values["home"] == str(home)
    assert values["threads"] >= 1
    assert 0 <= values["ram_available_bytes"] < values["ram_bytes"]
    assert values["ram_read_bytes_per_s"] > 0
    assert isinstance(values["direct_reads"], bool)
    assert [p.name for p in home.iterdir()] == [NAME]  # the probes are gone
    shown = lowmoe_command("doctor").out
    assert all(key.replace("_", " ") in shown for key in values)


def test_doctor_tells_of_a_machine_where_lowmoe_is_not_installed(
    lowmoe_command: RunCommand, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert json.loads(lowmoe_command("doctor", "--json").out)["lowmoe"] == "not installed"


@pytest.mark.usefixtures("_installed")
def test_doctor_names_the_instruction_set_and_says_nothing_against_the_best(
    lowmoe_command: RunCommand, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOWMOE_ISA", raising=False)
    monkeypatch.setattr(cpu, "isas", lambda: ["avx512", "avx2", "scalar"])
    values = json.loads(lowmoe_command("doctor", "--json").out)
    assert values["instruction_set"] == "avx512"
    assert values["instruction_sets"] == ["avx512", "avx2", "scalar"]
    done = lowmoe_command("doctor")
    assert "avx512, avx2, scalar" in done.out
    assert "LOWMOE_ISA" not in done.err
    assert "no instruction set" not in done.err


@pytest.mark.usefixtures("_installed")
@pytest.mark.parametrize("isa", ["avx2", "scalar", "torch"])
def test_doctor_says_that_a_slower_instruction_set_was_asked_for(
    lowmoe_command: RunCommand, home: Path, monkeypatch: pytest.MonkeyPatch, isa: str
) -> None:
    monkeypatch.setattr(cpu, "isas", lambda: ["avx512", "avx2", "scalar"])
    monkeypatch.setenv("LOWMOE_ISA", isa)
    assert json.loads(lowmoe_command("doctor", "--json").out)["instruction_set"] == isa
    words = " ".join(lowmoe_command("doctor").err.split())
    assert f"LOWMOE_ISA is {isa}, but this processor runs avx512, which is faster." in words
    assert "no instruction set" not in words  # it has one, which is not to be used


@pytest.mark.usefixtures("_installed")
def test_doctor_says_that_a_processor_has_no_fast_instruction_set(
    lowmoe_command: RunCommand, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "isas", lambda: ["scalar"])
    monkeypatch.delenv("LOWMOE_ISA", raising=False)
    words = " ".join(lowmoe_command("doctor").err.split())
    assert "This processor has no instruction set that lowmoe has fast code for" in words
    assert "LOWMOE_ISA" not in words


@pytest.mark.usefixtures("_installed")
def test_doctor_names_the_gpu_or_says_why_there_is_none(
    lowmoe_command: RunCommand, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = card.Facts(driver=None, torch=None, cuda_core=None, cards=())
    monkeypatch.setattr(card, "look", lambda: nothing)
    line = "none: no NVIDIA driver was found"
    assert json.loads(lowmoe_command("doctor", "--json").out)["gpu"] == line
    assert f"gpu                    {line}\n" in lowmoe_command("doctor").out


def test_eval_prints_perplexity_and_with_a_checkpoint_what_quantizing_cost(
    lowmoe_command: RunCommand, model_folder: Path, talking_checkpoint: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text"
    text.write_text("Once upon a time, there was a small brown owl.")
    alone = json.loads(lowmoe_command("eval", model_folder, text, "--json").out)
    of_model = ["perplexity", "kl", "top1", "tokens"]
    assert list(alone) == [*of_model, "hit_rate", "coarse_rate", "disk_bytes", "trades"]
    assert alone["perplexity"] > 1
    assert (alone["kl"], alone["top1"]) == (None, None)

    def against(*options: str) -> dict[str, float]:
        done = lowmoe_command(
            "eval", model_folder, text, "--against", talking_checkpoint, "--json", *options
        )
        values: dict[str, float] = json.loads(done.out)
        return values

    six, two = against("--bits", "6"), against("--bits", "2")
    assert six["perplexity"] == pytest.approx(alone["perplexity"])
    assert six["tokens"] == alone["tokens"] > 10
    assert 0 < six["kl"] < two["kl"]
    assert 0.5 < six["top1"] <= 1
    shown = lowmoe_command("eval", model_folder, text, "--window", "8").out
    assert shown.startswith("perplexity ")
    refused = lowmoe_command("eval", model_folder, text, "--window", 10**6)
    assert refused.code == 2
    assert "is 1000000 tokens, but" in refused.err


def test_aliases_are_listed_with_sizes_and_licences(lowmoe_command: RunCommand) -> None:
    lines = lowmoe_command("list", "--aliases").out.splitlines()
    assert len(lines) == len(ALIASES)
    (line,) = [line for line in lines if line.startswith("mixtral-8x7b ")]
    name, whole, active, _, does, licence, repository = line.split()
    assert (whole, active, does, licence) == ("46.7B,", "12.9B", "chats", "apache-2.0")
    values = json.loads(lowmoe_command("list", "--aliases", "--json").out)["aliases"]
    assert [row["name"] for row in values] == list(ALIASES)
    (row,) = [row for row in values if row["name"] == name]
    assert row["repository"] == repository
    assert row["chats"] is True
    (base,) = [line for line in lines if line.startswith("mixtral-8x7b-base ")]
    assert base.split()[4] == "continues"
    assert row["parameters"] == 46702792704  # as its makers' index file counts


def test_a_licence_is_shown_of_what_was_pulled(
    lowmoe_command: RunCommand, model_folder: Path, tmp_path: Path
) -> None:
    assert json.loads(lowmoe_command("inspect", model_folder, "--json").out)["licence"] is None
    pulled = tmp_path / "pulled"
    write_synthetic(
        pulled,
        CONFIG,
        read_config(CONFIG),
        Recipe(expert_planes=1),
        name="allenai/OLMoE-1B-7B-0924-Instruct",
        progress=lambda done, total: None,
    )
    assert "apache-2.0" in lowmoe_command("inspect", pulled).out
