"""What the control groups around this process allow it (Linux, version 2); nothing elsewhere.

Knows:        where the kernel keeps groups and which one is ours.
Ignorant of:  what the limits are used for.
"""

from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")
# A page is dropped when memory gets short if it is one of these; "file" counts tmpfs too.
_DROPPABLE = ("active_file", "inactive_file")


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryLimit:
    """One group's limit and what its processes hold of it that cannot be dropped, in bytes."""

    limit_bytes: int
    used_bytes: int


def memory_limits() -> list[MemoryLimit]:
    """Of every group around this process that has a limit: all of them bind."""
    return [limit for folder in _groups() if (limit := _memory_limit(folder)) is not None]


def cpu_limits() -> list[float]:
    """Processors' worth of time that each group around this process may use, where limited."""
    quotas = [_words(folder / "cpu.max") for folder in _groups()]
    return [int(words[0]) / int(words[1]) for words in quotas if _are_numbers(words, 2)]


def _groups() -> list[Path]:
    """Our group and those around it, the innermost first."""
    own = next((w[3:] for w in _words(OWN) if w.startswith("0::")), "/")
    innermost = ROOT / own.lstrip("/")
    # Inside a container the path can be the host's; the container's own limits are at the root.
    if not innermost.is_dir() or ".." in innermost.parts:
        return [ROOT]
    around = [folder for folder in innermost.parents if folder.is_relative_to(ROOT)]
    return [innermost, *around]


def _memory_limit(folder: Path) -> MemoryLimit | None:
    limits = [_words(folder / name) for name in ("memory.max", "memory.high")]
    known = [int(words[0]) for words in limits if _are_numbers(words, 1)]
    if not known:
        return None
    current = _words(folder / "memory.current")
    stat = _words(folder / "memory.stat")
    droppable = sum(
        int(value)
        for name, value in zip(stat[::2], stat[1::2], strict=False)
        if name in _DROPPABLE and value.isdecimal()
    )
    used = int(current[0]) if _are_numbers(current, 1) else 0
    return MemoryLimit(limit_bytes=min(known), used_bytes=max(0, used - droppable))


def _are_numbers(words: list[str], count: int) -> bool:
    return len(words) == count and all(word.isdecimal() for word in words)


def _words(path: Path) -> list[str]:
    """A file's words; none where there is no such file, as outside Linux and at the root."""
    try:
        return path.read_text("utf-8").split()
    except OSError:
        return []
