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


class OnceUnderWay:
    """Passes on what it hears, and a line of its own once work begins, if it does."""

    def __init__(self, report: Reporter, text: str) -> None:
        self._report, self._text = report, text

    def step(self, stage: str, done: int, total: int, unit: str) -> None:
        """Work has begun."""
        if self._text:
            self._report.note(self._text)
            self._text = ""
        self._report.step(stage, done, total, unit)

    def note(self, text: str) -> None:
        """As it is."""
        self._report.note(text)


class SilentReporter:
    """Tells nobody."""

    def step(self, stage: str, done: int, total: int, unit: str) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""
