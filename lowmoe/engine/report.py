"""Who hears how long work goes on.

Knows:        what progress is made of.
Ignorant of:  what work; how progress is shown.
"""

from typing import Protocol


class Reporter(Protocol):
    """Hears how long work goes on."""

    def step(self, stage: str, done: int, total: int, unit: str) -> None:
        """So many units of a stage are done.  unit: "B" for bytes, "weights"."""

    def note(self, text: str) -> None:
        """One line worth knowing."""


class SilentReporter:
    """Tells nobody."""

    def step(self, stage: str, done: int, total: int, unit: str) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""
