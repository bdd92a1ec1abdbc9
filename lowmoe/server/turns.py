"""Whose turn it is: callers in a circle, the asks of one caller in the order they came.

Knows:        who waits, who was served when.
Ignorant of:  what is waited for, threads.
"""

import itertools
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

# Callers without anything that waits whose last turn is remembered, so that one who asks again and
# again is not new every time.
REMEMBERED = 1024


class Turns(Generic[T]):
    """Things that wait, each for a caller."""

    def __init__(self) -> None:
        self._lines: dict[str, list[T]] = {}
        self._served: dict[str, int] = {}  # at which turn last, in that order
        self._turns = itertools.count(1)

    def __len__(self) -> int:
        return sum(len(line) for line in self._lines.values())

    def __bool__(self) -> bool:
        return bool(self._lines)

    def add(self, caller: str, thing: T) -> None:
        """Wait behind all else of this caller."""
        self._lines.setdefault(caller, []).append(thing)

    def next(self, may: Callable[[T], bool]) -> T | None:
        """The first that may, of the caller whose last turn is longest ago; it goes on waiting
        until it is removed.
        """
        for caller in sorted(self._lines, key=lambda caller: self._served.get(caller, 0)):
            for thing in self._lines[caller]:
                if may(thing):
                    self._serve(caller)
                    return thing
        return None

    def holds(self, caller: str, thing: T) -> bool:
        """Whether it waits."""
        return thing in self._lines.get(caller, [])

    def remove(self, caller: str, thing: T) -> bool:
        """Wait no more; whether it did."""
        line = self._lines.get(caller, [])
        if thing not in line:
            return False
        line.remove(thing)
        if not line:
            del self._lines[caller]
        return True

    def remove_all(self) -> list[T]:
        """All that waited."""
        found = [thing for line in self._lines.values() for thing in line]
        self._lines.clear()
        return found

    def _serve(self, caller: str) -> None:
        self._served.pop(caller, None)
        self._served[caller] = next(self._turns)
        if len(self._served) > REMEMBERED:
            del self._served[next(iter(self._served))]
