"""How much memory there is, and how much of it experts may take.

Knows:        the machine's and the container's limits, how budgets are written.
Ignorant of:  what the memory is for.
"""

import re
from pathlib import Path

import psutil

from lowmoe.errors import UsageError

# Left to everything else on the machine: the desktop, the page cache, our own temporaries.
MARGIN_SHARE = 0.10
MIN_MARGIN_BYTES = 2**30

_UNITS = {
    "": 1,
    "B": 1,
    **{f"{letter}B": 1000**power for power, letter in enumerate("KMGT", start=1)},
    **{f"{letter}iB": 1024**power for power, letter in enumerate("KMGT", start=1)},
}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)")
_CGROUP_V2 = Path("/sys/fs/cgroup")


def parse_budget(text: str | int, *, name: str, whole_bytes: int) -> int:
    """Bytes of a budget such as 24GiB, 64GB, 90% (of whole_bytes) or a number of bytes.

    Raises UsageError naming the option.
    """
    if isinstance(text, int):
        return _positive(text, name)
    share = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*%", text.strip())
    if share and 0 < float(share[1]) <= 100:
        return int(whole_bytes * float(share[1]) / 100)
    size = _SIZE.fullmatch(text.strip())
    units = {unit.lower(): factor for unit, factor in _UNITS.items()}
    if size is None or size[2].lower() not in units:
        raise UsageError(
            f"--{name} is {text!r}, but must be a size like 24GiB, 64GB or 90%."
        )
    return _positive(int(float(size[1]) * units[size[2].lower()]), name)


def _positive(n_bytes: int, name: str) -> int:
    if n_bytes <= 0:
        raise UsageError(f"--{name} is {n_bytes} bytes, but must be more than 0.")
    return n_bytes


def total_ram_bytes() -> int:
    """RAM of this machine, or of this container if that is less."""
    limit = _cgroup_limit()
    total: int = psutil.virtual_memory().total
    return total if limit is None else min(total, limit)


def available_ram_bytes() -> int:
    """RAM that can be taken now without swapping, a margin already taken off."""
    available: int = psutil.virtual_memory().available
    limit = _cgroup_limit()
    if limit is not None:
        available = min(available, max(0, limit - _cgroup_used()))
    return max(0, available - max(MIN_MARGIN_BYTES, int(total_ram_bytes() * MARGIN_SHARE)))


def _cgroup_limit() -> int | None:
    """The least of this process's cgroup's limits, memory.high and memory.max; None for none."""
    limits = [_cgroup_number(name) for name in ("memory.max", "memory.high")]
    known = [limit for limit in limits if limit is not None]
    return min(known) if known else None


def _cgroup_used() -> int:
    """Bytes in use there that cannot be dropped: file pages can."""
    used = _cgroup_number("memory.current") or 0
    try:
        stat = dict(line.split() for line in (_cgroup_path() / "memory.stat").open())
    except OSError:
        return used
    return max(0, used - int(stat.get("file", 0)))


def _cgroup_number(name: str) -> int | None:
    try:
        text = (_cgroup_path() / name).read_text().strip()
    except OSError:  # no cgroup v2 here, or none of ours
        return None
    return int(text) if text.isdigit() else None


def _cgroup_path() -> Path:
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return _CGROUP_V2
    own = next((line.partition("::")[2] for line in lines if line.startswith("0::")), "/")
    path = _CGROUP_V2 / own.lstrip("/")
    # Inside a container the path is the host's; the container's own limits are then at the root.
    return path if path.is_dir() else _CGROUP_V2
