"""Budgets are read as people write them, and memory is what all limits around us leave."""

from collections import namedtuple
from dataclasses import dataclass
from weakref import WeakSet

import pytest

from lowmoe.engine import memory
from lowmoe.engine.cgroup import MemoryLimit
from lowmoe.engine.memory import (
    available_ram_bytes,
    parse_budget,
    promise_ram,
    ram_budget,
    total_ram_bytes,
)
from lowmoe.errors import UsageError

GIB = 2**30
Machine = namedtuple("Machine", ["total", "available"])


@dataclass(eq=False)
class Store:
    unfilled_bytes: int


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("24GiB", 24 * GIB),
        ("64GB", 64 * 10**9),
        ("1.5GiB", 3 * GIB // 2),
        ("0.5 TB", 5 * 10**11),
        ("100 MiB", 100 * 2**20),
        ("7kB", 7000),
        ("7KIB", 7168),
        (" 24gib ", 24 * GIB),
        ("123456789", 123456789),
        ("42B", 42),
        ("90%", 900),
        ("0.5 %", 5),
        ("100%", 1000),
        (4096, 4096),
    ],
)
def test_a_budget_is_read_as_people_write_it(text: str | int, n_bytes: int) -> None:
    assert parse_budget(text, name="ram", whole_bytes=1000) == n_bytes


@pytest.mark.parametrize(
    "text",
    ["", "much", "24 gigs", "24G", "-1GiB", "1e9", "101%", "0%", "%", "1.5.2GB", "GiB", "9" * 400],
)
def test_anything_else_is_a_usage_error_that_quotes_it(text: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse_budget(text, name="vram", whole_bytes=1000)
    assert str(refused.value) == (
        f"--vram is {text!r}, but must be a size like 24GiB, 64GB or 90%."
    )


def test_a_small_number_is_a_forgotten_unit() -> None:
    with pytest.raises(UsageError, match=r"--ram is 12 bytes\. Give a unit: 12GiB"):
        parse_budget("12", name="ram", whole_bytes=1000)


def test_more_ram_than_there_is_cannot_be_given_to_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, total=24 * GIB, available=20 * GIB, limits=[])
    assert ram_budget("24GiB") == 24 * GIB
    with pytest.raises(UsageError, match=r"--ram is 25GiB, but this machine has 25\.8 GB"):
        ram_budget("25GiB")


@pytest.mark.parametrize("text", ["0", "0GiB", "0.1B", 0, -5, "0.01%"])
def test_a_budget_of_nothing_is_a_usage_error(text: str | int) -> None:
    with pytest.raises(UsageError, match=r"--ram is -?\d+ bytes, but must be more than 0"):
        parse_budget(text, name="ram", whole_bytes=1000)


def machine(
    monkeypatch: pytest.MonkeyPatch, *, total: int, available: int, limits: list[MemoryLimit]
) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: Machine(total, available))
    monkeypatch.setattr(memory, "memory_limits", lambda: limits)
    monkeypatch.setattr(memory, "_promised", WeakSet())  # of models that other tests have open


def test_without_limits_a_tenth_of_the_machine_is_left_to_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine(monkeypatch, total=64 * GIB, available=50 * GIB, limits=[])
    assert total_ram_bytes() == 64 * GIB
    assert available_ram_bytes() == 50 * GIB - int(6.4 * GIB)


def test_on_a_small_machine_a_gibibyte_is_left_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, total=8 * GIB, available=6 * GIB, limits=[])
    assert available_ram_bytes() == 5 * GIB


def test_of_several_limits_the_one_that_leaves_least_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wide = MemoryLimit(limit_bytes=32 * GIB, used_bytes=28 * GIB)  # its other groups' use
    narrow = MemoryLimit(limit_bytes=16 * GIB, used_bytes=2 * GIB)
    machine(monkeypatch, total=64 * GIB, available=50 * GIB, limits=[narrow, wide])
    assert total_ram_bytes() == 16 * GIB
    assert available_ram_bytes() == 4 * GIB - int(1.6 * GIB)


def test_what_was_promised_to_one_model_is_not_given_to_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine(monkeypatch, total=64 * GIB, available=50 * GIB, limits=[])
    before, first = available_ram_bytes(), Store(unfilled_bytes=30 * GIB)
    promise_ram(first)
    assert available_ram_bytes() == before - 30 * GIB
    first.unfilled_bytes = 10 * GIB  # it has taken the others: the system counts them now
    assert available_ram_bytes() == before - 10 * GIB
    del first
    assert available_ram_bytes() == before


def test_what_is_available_is_never_negative(monkeypatch: pytest.MonkeyPatch) -> None:
    over = MemoryLimit(limit_bytes=4 * GIB, used_bytes=5 * GIB)
    machine(monkeypatch, total=64 * GIB, available=50 * GIB, limits=[over])
    assert available_ram_bytes() == 0
