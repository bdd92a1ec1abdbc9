"""Which card is used, and what is said when none can be."""

import ctypes
import importlib.metadata
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from cuda_ext import card as cards
from cuda_ext.card import (
    Card,
    CardError,
    Facts,
    describe,
    find_card,
    in_a_line,
    is_without,
    look,
    why_none,
    why_not,
)

RTX_4090 = Card(
    index=0,
    name="NVIDIA GeForce RTX 4090",
    sm=89,
    memory_bytes=25_250_000_000,
    n_multiprocessors=128,
    l2_bytes=75_497_472,
)
A100 = replace(RTX_4090, index=1, name="NVIDIA A100-PCIE-40GB", sm=80)
RTX_2080 = replace(RTX_4090, index=2, name="NVIDIA GeForce RTX 2080 Ti", sm=75)
GOOD = Facts(driver=(13, 0), torch=(13, 0), cuda_core=(1, 2), cards=(RTX_4090, A100))

UNUSABLE = [
    (replace(GOOD, driver=None), "no NVIDIA driver was found"),
    (
        replace(GOOD, torch=None, cards=()),
        "this torch computes on CPUs only. Install one for CUDA, as https://pytorch.org says, then "
        "pip install 'lowmoe[cuda]'",
    ),
    (
        replace(GOOD, driver=(12, 9), cards=()),
        "the NVIDIA driver runs CUDA up to 12.9, and a torch for CUDA 13.0 needs driver 580 or "
        "newer. Update it",
    ),
    (
        replace(GOOD, driver=(12, 3), torch=(12, 6)),
        "the NVIDIA driver runs CUDA up to 12.3, and a torch for CUDA 12.6 needs driver 550 or "
        "newer. Update it",
    ),
    (
        replace(GOOD, torch=(11, 8)),
        "this torch is for CUDA 11.8, and kernels need one for 12 or 13",
    ),
    (replace(GOOD, cards=()), "torch sees no CUDA device; CUDA_VISIBLE_DEVICES may hide it"),
    (replace(GOOD, cuda_core=None), "cuda-core is not installed: pip install 'lowmoe[cuda]'"),
    (
        replace(GOOD, cuda_core=(1, 0)),
        "cuda-core is 1.0, and 1.1 or newer is needed: pip install 'lowmoe[cuda]'",
    ),
]


@pytest.mark.parametrize(("facts", "reason"), UNUSABLE, ids=[reason for _, reason in UNUSABLE])
def test_what_is_missing_is_said_to_who_asked_by_name_and_auto_goes_without(
    facts: Facts, reason: str
) -> None:
    assert why_none(facts) == reason
    assert find_card("auto", facts) is None
    with pytest.raises(CardError) as caught:
        find_card("4090", facts)
    assert str(caught.value) == f"gpu is '4090', but {reason}. Run on the CPU with gpu none."
    assert find_card("none", facts) is None


@pytest.mark.parametrize(
    "facts",
    [GOOD, replace(GOOD, driver=(13, 2)), replace(GOOD, torch=(12, 8), driver=(13, 0))],
    ids=["the same CUDA", "a newer driver", "a driver of a newer major"],
)
def test_a_driver_runs_its_own_cuda_and_older_ones(facts: Facts) -> None:
    assert why_none(facts) is None
    assert find_card("auto", facts) == RTX_4090


@pytest.mark.parametrize(
    ("wanted", "found"),
    [("4090", RTX_4090), ("a100", A100), ("geforce", RTX_4090), ("cuda:1", A100)],
)
def test_a_card_goes_by_any_part_of_its_name_or_by_torchs(wanted: str, found: Card) -> None:
    assert find_card(wanted, GOOD) == found


def test_a_card_that_is_not_there_is_told_which_are() -> None:
    with pytest.raises(CardError, match=r"gpu is '5090', but the cards here are .*4090.*; .*A100"):
        find_card("5090", GOOD)


def test_a_card_too_old_is_passed_over_or_refused_with_what_it_lacks() -> None:
    facts = replace(GOOD, cards=(RTX_2080, A100))
    assert why_not(A100) is None
    assert find_card("auto", facts) == A100
    assert find_card("auto", replace(GOOD, cards=(RTX_2080,))) is None
    with pytest.raises(
        CardError, match=r"RTX 2080 Ti is sm_75, .* sm_80 or newer: .*cp.async. Run"
    ):
        find_card("2080", facts)


def test_a_card_is_described_in_one_line() -> None:
    assert describe(RTX_4090) == (
        "NVIDIA GeForce RTX 4090 (cuda:0, sm_89, 128 multiprocessors, 25.2 GB, L2 75 MB)"
    )


def test_the_doctors_line_names_the_card_or_the_reason() -> None:
    assert in_a_line(GOOD) == describe(RTX_4090)
    assert in_a_line(replace(GOOD, driver=None)) == "none: no NVIDIA driver was found"
    old = in_a_line(replace(GOOD, cards=(RTX_2080, replace(RTX_2080, name="GTX 1080", sm=61))))
    assert old.startswith("none: NVIDIA GeForce RTX 2080 Ti is sm_75")
    assert "; GTX 1080 is sm_61" in old


def test_looking_at_this_machine_finds_what_torch_finds() -> None:
    facts = look()
    assert (facts.torch is None) == (torch.version.cuda is None)
    if not torch.cuda.is_available():
        assert facts.cards == ()
        assert find_card("auto", facts) is None


class FakeDriver:
    """Of the CUDA that cuDriverGetVersion is to tell."""

    def __init__(self, version: int) -> None:
        self.version = version

    def cuDriverGetVersion(self, out: "ctypes._CArgObject") -> int:
        out._obj.value = self.version
        return 0


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with one H100, CUDA 13.0 everywhere."""
    h100 = SimpleNamespace(
        name="NVIDIA H100 80GB HBM3",
        major=9,
        minor=0,
        total_memory=85_000_000_000,
        multi_processor_count=132,
        L2_cache_size=52_428_800,
    )
    monkeypatch.setattr(cards.ctypes, "CDLL", lambda name: FakeDriver(13000))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.2.2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: h100)
    return monkeypatch


def test_looking_asks_driver_torch_and_packages(machine: pytest.MonkeyPatch) -> None:
    card = Card(
        index=0,
        name="NVIDIA H100 80GB HBM3",
        sm=90,
        memory_bytes=85_000_000_000,
        n_multiprocessors=132,
        l2_bytes=52_428_800,
    )
    assert look() == Facts(driver=(13, 0), torch=(13, 0), cuda_core=(1, 2), cards=(card,))


def test_a_torch_with_too_old_a_driver_is_not_asked(machine: pytest.MonkeyPatch) -> None:
    def asked() -> int:
        raise AssertionError("torch would warn")

    machine.setattr(cards.ctypes, "CDLL", lambda name: FakeDriver(12080))
    machine.setattr(torch.cuda, "device_count", asked)
    assert look().driver == (12, 8)
    assert look().cards == ()


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("NVIDIA GeForce RTX 4070 Ti SUPER", ["4070tisuper", "4070", "RTX 4070 Ti"]),
        ("NVIDIA A100-SXM4-80GB", ["a100", "a100-sxm4"]),
        ("NVIDIA L40S", ["l40s"]),
    ],
)
def test_a_card_is_found_by_words_of_its_name(name: str, found: list[str]) -> None:
    card = replace(RTX_4090, name=name)
    for wanted in found:
        assert find_card(wanted, replace(GOOD, cards=(card,))) == card
    for wanted in ("l4", "40", "", "super ti"):
        with pytest.raises(CardError, match="the cards here are"):
            find_card(wanted, replace(GOOD, cards=(card,)))


def test_a_cuda_that_cannot_start_is_a_reason() -> None:
    facts = replace(GOOD, cards=(), trouble="out of memory")
    assert why_none(facts) == "CUDA cannot start: out of memory"
    assert not is_without(facts)
    assert is_without(replace(GOOD, cards=()))
