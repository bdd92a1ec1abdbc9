"""What the server has done and is doing, in numbers that any thread may read.

Knows:        what is counted.
Ignorant of:  who wants to know, in which format.
"""

import time
from collections import deque
from dataclasses import dataclass, field

from lowmoe.engine.statistics import PerTier, RunStatistics
from lowmoe.experts.ledger import Traffic

SPEED_WINDOW_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    """At one moment.

    n_open: asks that are not over; n_waiting: those of which an answer has yet to begin;
    n_under_way: answers that have a cache, n_reading of them with a prompt that is not read yet;
    n_sequences: the most there may be.  is_closing: no more asks are taken.
    Totals: asked, refused (Overloaded), failed, closed (by their client before their end): asks;
    ended: answers by what ended them; prompt_tokens: of answers that have begun, reused_tokens
    those of them that were in a cache; new_tokens; steps: passes of one token of each answer.
    traffic: experts lent and bytes moved since the model was loaded, `of_steps` for tokens alone.
    tokens_per_s: of all answers together in the last seconds with work, 0 without.
    predicted_tokens_per_s: as planned for one answer alone, where that is known; latest: of the
    answer that ended last.  placement: bytes of weights by tier when it ended.
    """

    n_sequences: int
    is_closing: bool = False
    n_open: int = 0
    n_waiting: int = 0
    n_under_way: int = 0
    n_reading: int = 0
    asked: int = 0
    refused: int = 0
    failed: int = 0
    closed: int = 0
    ended: dict[str, int] = field(default_factory=dict)
    prompt_tokens: int = 0
    reused_tokens: int = 0
    new_tokens: int = 0
    steps: int = 0
    traffic: Traffic = field(default_factory=Traffic)
    of_steps: Traffic = field(default_factory=Traffic)
    tokens_per_s: float = 0.0
    predicted_tokens_per_s: float | None = None
    placement: PerTier = field(default_factory=PerTier)
    latest: RunStatistics | None = None


class Speed:
    """Tokens/s of the last few seconds in which there was work."""

    def __init__(self) -> None:
        self._marks: deque[tuple[float, int]] = deque(maxlen=64)

    def at(self, n_tokens: int) -> None:
        """So many tokens there are now, in all."""
        now = time.monotonic()
        if not self._marks or now - self._marks[-1][0] >= SPEED_WINDOW_S / 50:
            self._marks.append((now, n_tokens))

    def rest(self) -> None:
        """There is no more work."""
        self._marks.clear()

    def tokens_per_s(self) -> float:
        """0 where too little is known."""
        marks = list(self._marks)
        recent = [mark for mark in marks if mark[0] >= time.monotonic() - SPEED_WINDOW_S] or marks
        if len(recent) < 2:
            return 0.0
        (began, before), (now, after) = recent[0], recent[-1]
        return (after - before) / (now - began)
