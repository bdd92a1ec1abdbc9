"""`lowmoe run` where there is a card, or a stand-in for one."""

import json
from pathlib import Path

import pytest

from lowmoe.experts.split import MISSES
from tests.cli.conftest import RunCommand
from tests.stand_in_gpu import CARD, Cards

ASKED = ["--prompt", "Once", "--temperature", "0", "--max-new-tokens", "4"]


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> Cards:
    return Cards(monkeypatch)


@pytest.mark.parametrize("options", [[], ["--gpu", "4090"], ["--vram", "8GiB"]])
def test_a_model_that_fits_is_answered_by_the_card(
    lowmoe_command: RunCommand, cards: Cards, model_folder: Path, options: list[str]
) -> None:
    done = lowmoe_command("run", model_folder, *ASKED, "--json", *options)
    assert done.code == 0
    values = json.loads(done.out.splitlines()[-1])
    assert values["hit_rate"] == {"gpu": 1, "ram": 0, "disk": 0}
    assert values["placement"]["gpu"] > 0
    assert values["placement"]["ram"] == values["placement"]["disk"] == 0
    assert values["bound_tokens_per_s"] == pytest.approx(1e12 / values["bytes_per_token"]["gpu"])
    assert cards.limits == [8 * 2**30 if "--vram" in options else None]


def test_the_line_at_the_end_tells_of_the_gpu_where_it_has_something(
    lowmoe_command: RunCommand, cards: Cards, model_folder: Path
) -> None:
    line = lowmoe_command("run", model_folder, *ASKED).err.splitlines()[-1]
    assert "· GPU " in line
    assert "hits GPU 100%, RAM 0%, disk 0%" in line
    assert "GPU" not in lowmoe_command("run", model_folder, *ASKED, "--gpu", "none").err


def test_one_that_does_not_fit_is_answered_by_the_cpu_which_is_said(
    lowmoe_command: RunCommand, cards: Cards, model_folder: Path
) -> None:
    cards.free_bytes = 1000
    done = lowmoe_command("run", model_folder, *ASKED, "--json")
    assert done.code == 0
    assert json.loads(done.out.splitlines()[-1])["placement"]["gpu"] == 0
    assert done.err.count("computing on the CPU: ") == 1
    assert "and 1000 of 1000 are free on a stand-in." in done.err


def test_but_a_card_that_was_asked_for_by_name_must_do_it(
    lowmoe_command: RunCommand, cards: Cards, model_folder: Path
) -> None:
    cards.free_bytes = 1000
    done = lowmoe_command("run", model_folder, *ASKED, "--gpu", "4090")
    assert (done.code, done.out) == (1, "")
    (line,) = [line for line in done.err.splitlines() if line.startswith("lowmoe: ")]
    assert line.startswith("lowmoe: gpu is '4090', but ")
    done = lowmoe_command("run", model_folder, *ASKED, "--gpu", "h200")
    assert (done.code, done.out) == (2, "")
    assert f"gpu is 'h200', but the cards here are {CARD.name}" in done.err


def test_bench_shows_what_the_card_allows(
    lowmoe_command: RunCommand, cards: Cards, model_folder: Path
) -> None:
    few = ["--runs", "1", "--prompt-tokens", "4", "--new-tokens", "3"]
    done = lowmoe_command("bench", model_folder, *few)
    assert "GPU copies: 1 TB/s measured here" in done.out
    values = json.loads(lowmoe_command("bench", model_folder, *few, "--json").out.splitlines()[-1])
    assert values["gpu_ceiling_bytes_per_s"] == 1e12
    done = lowmoe_command("bench", model_folder, *few, "--profile")
    assert (done.code, done.out) == (2, "")
    assert "this model is computed by cuda. Leave it out." in done.err


@pytest.mark.parametrize("misses", MISSES)
def test_misses_are_computed_where_it_is_said(
    lowmoe_command: RunCommand, cards: Cards, model_folder: Path, misses: str
) -> None:
    asked = ("run", model_folder, *ASKED, "--gpu", "4090", "--bits", "4")
    # As much as it says it needs, and a little for experts beside the two that must fit.
    cards.free_bytes = 1000
    needed = int(lowmoe_command(*asked).err.split("but ")[1].split()[0])
    cards.free_bytes = needed + 10_000
    done = lowmoe_command(*asked, "--misses", misses, "--json")
    assert done.code == 0
    values = json.loads(done.out.splitlines()[-1])
    assert 0 < values["hit_rate"]["gpu"] < 1
    said = {"cpu": "the CPU computes the others", "page": "the others pass through it"}
    assert said.get(misses, "whichever is faster") in done.err


def test_a_place_for_misses_that_is_none_is_bad_usage(
    lowmoe_command: RunCommand, model_folder: Path
) -> None:
    done = lowmoe_command("run", model_folder, *ASKED, "--misses", "gpu")
    assert done.code == 2
    assert "misses is 'gpu', but must be one of cpu, page, auto." in done.err
