"""How much memory there is, and how much of it experts may take.

Knows:        the machine's and the container's limits, how budgets are written.
Ignorant of:  what the memory is for.
"""

import re
from typing import Protocol
from weakref import WeakSet

import psutil

from lowmoe.engine.cgroup import memory_limits
from lowmoe.errors import UsageError

# Left to everything else on the machine: the desktop, the page cache, our own temporaries.
MARGIN_SHARE = 0.10
MIN_MARGIN_BYTES = 2**30
LEAST_BYTES = 2**20  # that anybody means who writes a size: "12" is a forgotten unit

_UNITS = {
    "": 1,
    "B": 1,
    **{f"{letter}B": 1000**power for power, letter in enumerate("KMGT", start=1)},
    **{f"{letter}iB": 1024**power for power, letter in enumerate("KMGT", start=1)},
}
_NUMBER = r"([0-9]{1,18}(?:\.[0-9]{1,18})?)"
_SIZE = re.compile(_NUMBER + r"\s*([A-Za-z]*)")
_SHARE = re.compile(_NUMBER + r"\s*%")


def parse_budget(text: str | int, *, name: str, whole_bytes: int) -> int:
    """Bytes of a budget such as 24GiB, 64GB, 90% (of whole_bytes) or a number of bytes.

    Raises UsageError naming the option; also for few bytes without a unit, which was forgotten.
    """
    if isinstance(text, int):
        return _positive(text, name)
    share = _SHARE.fullmatch(text.strip())
    if share and 0 < float(share[1]) <= 100:
        return _positive(int(whole_bytes * float(share[1]) / 100), name)
    size = _SIZE.fullmatch(text.strip())
    units = {unit.lower(): factor for unit, factor in _UNITS.items()}
    if size is None or size[2].lower() not in units:
        raise UsageError(f"--{name} is {text!r}, but must be a size like 24GiB, 64GB or 90%.")
    n_bytes = _positive(int(float(size[1]) * units[size[2].lower()]), name)
    if not size[2] and n_bytes < LEAST_BYTES:
        raise UsageError(f"--{name} is {n_bytes} bytes. Give a unit: {size[1]}GiB.")
    return n_bytes


def ram_budget(text: str | int) -> int:
    """Bytes of what --ram says.  Raises UsageError, also for more than there is."""
    total = total_ram_bytes()
    n_bytes = parse_budget(text, name="ram", whole_bytes=total)
    if n_bytes > total:
        raise UsageError(
            f"--ram is {text}, but this machine has {total / 1e9:.1f} GB. Give less, or leave it "
            "out: then what is free is taken."
        )
    return n_bytes


def _positive(n_bytes: int, name: str) -> int:
    if n_bytes <= 0:
        raise UsageError(f"--{name} is {n_bytes} bytes, but must be more than 0.")
    return n_bytes


def total_ram_bytes() -> int:
    """RAM of this machine, or of this container if that is less."""
    total: int = psutil.virtual_memory().total
    return min([total, *(group.limit_bytes for group in memory_limits())])


class Promised(Protocol):
    """Who was given RAM and takes it as it needs it."""

    @property
    def unfilled_bytes(self) -> int:
        """What it has not taken yet."""
        ...


_promised: WeakSet[Promised] = WeakSet()


def promise_ram(to: Promised) -> None:
    """What `to` has not taken yet is no longer available to others of this process."""
    _promised.add(to)


def available_ram_bytes() -> int:
    """RAM that can be taken now without swapping, a margin and what was promised taken off."""
    available: int = psutil.virtual_memory().available
    rooms = [group.limit_bytes - group.used_bytes for group in memory_limits()]
    promised = sum(store.unfilled_bytes for store in _promised)
    return max(0, min([available, *rooms]) - promised - margin_bytes(total_ram_bytes()))


def margin_bytes(total: int) -> int:
    """What is left to others of so much RAM."""
    return max(MIN_MARGIN_BYTES, int(total * MARGIN_SHARE))
