"""Which NVIDIA cards are here, and why one cannot be used.

Knows:        what torch, the driver and the installed packages say; what kernels need.
Ignorant of:  what kernels compute, models, who asks.
"""

import ctypes
import importlib.metadata
import re
import sys
from dataclasses import dataclass

import torch

from cuda_ext.compile import INSTALL

# What the kernels' PTX asks for, all of it new in compute capability 8.0 (PTX ISA, target notes of
# mma and of cp.async).
OLDEST_SM = 80
_OLD_CARDS_LACK = "the tensor core products m16n8k16 of float16 and m16n8k32 of int8, and cp.async"
# A driver runs what was made for its own CUDA major or an older one (NVIDIA's "CUDA Compatibility",
# table 1 of minor version compatibility; 550 rather than 525 for cuFuncLoad, new in CUDA 12.4).
# For each major of torch's CUDA: what the driver must run, and the first driver that does.
_DRIVERS = {12: ((12, 4), 550), 13: ((13, 0), 580)}
_OLDEST_CUDA_CORE = (1, 1)  # 1.0.0 cannot be imported beside the cuda-bindings of torch 2.13

_NO_DEVICE = "torch sees no CUDA device; CUDA_VISIBLE_DEVICES may hide it"

Version = tuple[int, int]


class CardError(Exception):
    """No card can do what was asked for: one line of what was found and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """One card.  index: torch's, the 0 of cuda:0; sm: 89 for compute capability 8.9."""

    index: int
    name: str
    sm: int
    memory_bytes: int
    n_multiprocessors: int
    l2_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """All of this machine that decides.  Versions are None where the thing is not there.

    driver: the newest CUDA that the driver runs; torch: the CUDA that torch is built for;
    cuda_core: the installed package's; cards: those that torch sees; trouble: what it said
    instead.
    """

    driver: Version | None
    torch: Version | None
    cuda_core: Version | None
    cards: tuple[Card, ...]
    trouble: str | None = None


def look() -> Facts:
    """Look at this machine.  Allocates nothing on a card."""
    driver = _driver_version()
    torch_version = _version(torch.version.cuda) if torch.version.cuda else None
    # A torch whose driver is too old warns at length when it is asked for its cards.
    may_ask = driver is not None and torch_version is not None and driver >= (torch_version[0], 0)
    cards: tuple[Card, ...] = ()
    trouble = None
    try:
        cards = tuple(map(_card, range(torch.cuda.device_count()))) if may_ask else ()
    except RuntimeError as e:  # all that torch raises where CUDA cannot start
        trouble = str(e).splitlines()[0].rstrip(".")
    return Facts(
        driver=driver,
        torch=torch_version,
        cuda_core=_cuda_core_version(),
        cards=cards,
        trouble=trouble,
    )


def find_card(wanted: str, facts: Facts) -> Card | None:
    """The card to compute on; None for none.

    wanted: "none"; "auto", the first that can be used, if there is one; or, and then it must be
    usable, a part of a card's name or torch's word for it: "4090", "cuda:1".
    Raises CardError, which says why not.
    """
    if wanted == "none":
        return None
    reason = why_none(facts)
    if wanted == "auto":
        usable = (card for card in facts.cards if why_not(card) is None)
        return None if reason else next(usable, None)
    named = [card for card in facts.cards if _answers_to(wanted, card)]
    if reason is None and not named:
        reason = f"the cards here are {'; '.join(map(describe, facts.cards))}"
    if reason := reason or why_not(named[0]):
        raise CardError(f"gpu is {wanted!r}, but {reason}. Run on the CPU with gpu none.")
    return named[0]


def why_none(facts: Facts) -> str | None:
    """What keeps every card of this machine from being used; None if nothing does."""
    if facts.driver is None:
        return "no NVIDIA driver was found"
    if facts.torch is None:
        return (
            "this torch computes on CPUs only. Install one for CUDA, as https://pytorch.org says, "
            f"then {INSTALL}"
        )
    if facts.torch[0] not in _DRIVERS:
        return f"this torch is for CUDA {_dotted(facts.torch)}, and kernels need one for 12 or 13"
    needed, number = _DRIVERS[facts.torch[0]]
    if facts.driver < needed:
        return (
            f"the NVIDIA driver runs CUDA up to {_dotted(facts.driver)}, and a torch for CUDA "
            f"{_dotted(facts.torch)} needs driver {number} or newer. Update it"
        )
    if facts.trouble is not None:
        return f"CUDA cannot start: {facts.trouble}"
    if not facts.cards:
        return _NO_DEVICE
    if facts.cuda_core is None:
        return f"cuda-core is not installed: {INSTALL}"
    if facts.cuda_core < _OLDEST_CUDA_CORE:
        return (
            f"cuda-core is {_dotted(facts.cuda_core)}, and {_dotted(_OLDEST_CUDA_CORE)} or newer "
            f"is needed: {INSTALL}"
        )
    return None


def is_without(facts: Facts) -> bool:
    """Whether there is nothing to complain about: no driver, or no card beside it."""
    return facts.driver is None or why_none(facts) == _NO_DEVICE


def why_not(card: Card) -> str | None:
    """What this card lacks; None if nothing."""
    if card.sm >= OLDEST_SM:
        return None
    return (
        f"{card.name} is sm_{card.sm}, and kernels need sm_{OLDEST_SM} or newer: it lacks "
        f"{_OLD_CARDS_LACK}"
    )


def in_a_line(facts: Facts) -> str:
    """The card that "auto" takes, or "none" and why."""
    if card := find_card("auto", facts):
        return describe(card)
    return f"none: {why_none(facts) or '; '.join(filter(None, map(why_not, facts.cards)))}"


def describe(card: Card) -> str:
    """In one line, for people.  GB are 1e9 bytes, as of lowmoe's other sizes; MB likewise 1e6."""
    return (
        f"{card.name} (cuda:{card.index}, sm_{card.sm}, {card.n_multiprocessors} multiprocessors, "
        f"{card.memory_bytes / 1e9:.1f} GB, L2 {card.l2_bytes / 1e6:.0f} MB)"
    )


def _answers_to(wanted: str, card: Card) -> bool:
    """By torch's word for it, or by words of its name as they follow each other: 4070tisuper."""
    if wanted.lower() == f"cuda:{card.index}":
        return True
    words = card.name.lower().replace("-", " ").split()
    asked = wanted.lower().replace("-", "").replace(" ", "")
    return any(
        "".join(words[first:end]) == asked
        for first in range(len(words))
        for end in range(first + 1, len(words) + 1)
    )


def _card(index: int) -> Card:
    properties = torch.cuda.get_device_properties(index)
    return Card(
        index=index,
        name=properties.name,
        sm=10 * properties.major + properties.minor,
        memory_bytes=properties.total_memory,
        n_multiprocessors=properties.multi_processor_count,
        l2_bytes=properties.L2_cache_size,
    )


def _driver_version() -> Version | None:
    """The newest CUDA that the installed driver runs.  Asks the driver itself, starts nothing."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int(0)
    driver.cuDriverGetVersion(ctypes.byref(version))  # 13020 for 13.2
    return version.value // 1000, version.value % 1000 // 10


def _cuda_core_version() -> Version | None:
    try:
        return _version(importlib.metadata.version("cuda-core"))
    except importlib.metadata.PackageNotFoundError:
        return None


def _version(text: str) -> Version:
    major, minor = re.findall(r"\d+", text)[:2]
    return int(major), int(minor)


def _dotted(version: Version) -> str:
    return f"{version[0]}.{version[1]}"
