import os
import sys
from pathlib import Path

import pytest

from lowmoe.settings import read_settings


def test_the_home_is_the_one_that_was_asked_for(tmp_path: Path) -> None:
    assert read_settings({"LOWMOE_HOME": str(tmp_path)}).home == tmp_path


def test_a_tilde_is_the_users_home() -> None:
    assert read_settings({"LOWMOE_HOME": "~/models"}).home == Path.home() / "models"


def test_an_empty_variable_is_none() -> None:
    assert read_settings({"LOWMOE_HOME": ""}) == read_settings({})


@pytest.mark.parametrize(("value", "isa"), [(None, None), ("", None), ("avx2", "avx2")])
def test_the_instruction_set_is_the_one_that_was_asked_for(
    value: str | None, isa: str | None
) -> None:
    assert read_settings({} if value is None else {"LOWMOE_ISA": value}).isa == isa


@pytest.mark.parametrize(
    ("platform", "environment", "home"),
    [
        ("linux", {}, Path.home() / ".cache"),
        ("linux", {"XDG_CACHE_HOME": "/x/cache"}, Path("/x/cache")),
        ("linux", {"XDG_CACHE_HOME": ""}, Path.home() / ".cache"),
        ("darwin", {"XDG_CACHE_HOME": "/x/cache"}, Path.home() / "Library" / "Caches"),
        ("win32", {"LOCALAPPDATA": "/x/local"}, Path("/x/local")),
        ("win32", {}, Path.home() / "AppData" / "Local"),
    ],
)
def test_without_it_models_live_in_the_systems_cache(
    monkeypatch: pytest.MonkeyPatch, platform: str, environment: dict[str, str], home: Path
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    assert read_settings(environment).home == home / "lowmoe"


def test_the_environment_of_the_process_is_read_when_asked_not_at_import(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(os.environ, "LOWMOE_HOME", str(tmp_path))
    assert read_settings().home == tmp_path
