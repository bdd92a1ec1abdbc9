"""What the machine does, for who watches: where experts are, which are used, how fast it goes.

The model's thread writes down where things stand, at most every EVERY_S and only while somebody
watches or all answers have ended; each watcher is told what has changed since it was told last, so
that a slow one is told less often and holds nothing up.

Knows:        the store's places and uses, the totals of steps, who watches.
Ignorant of:  HTTP, how anything is shown.
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lowmoe.engine.statistics import PerTier

EVERY_S = 0.1
# What is said of speed is said of so long: less would jump, more would lag.
WINDOW_S = 2.0
TIERS = ("gpu", "ram", "disk")  # by their numbers in frames

Numbers = NDArray[np.integer[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """What stays as it is.

    layers: experts of each, maybe 0; n_active: chosen of a layer for a token; tiers: those that
    experts may be in; counts_uses: whether it is known which experts are used.
    """

    model: str
    layers: tuple[int, ...]
    n_active: int
    tiers: tuple[str, ...]
    counts_uses: bool
    expert_bytes: int
    bits: int
    isa: str
    n_context: int
    n_sequences: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Of the last WINDOW_S of decoding, and what there is now.

    n_context: tokens of the longest conversation under way; n_answers: under way.
    """

    tokens_per_s: float | None = None
    predicted_tokens_per_s: float | None = None
    bound_tokens_per_s: float | None = None
    hit_rate: PerTier = field(default_factory=PerTier)
    bytes_per_token: PerTier = field(default_factory=PerTier)
    n_context: int = 0
    n_answers: int = 0
    n_waiting: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Frame:
    """What has changed.  Experts are numbered layer by layer.

    whole: of the first, which says of every expert where it is and how often it was used so far;
    later ones say which moved, to which of TIERS, and which were used how often more.
    """

    whole: bool
    moved_at: Numbers
    moved_to: Numbers
    used_at: Numbers
    used_times: Numbers
    rates: Rates


class Watch(Protocol):
    """Who can tell."""

    @property
    def about(self) -> About:
        """What stays as it is."""

    def frames(self) -> AsyncIterator[Frame]:
        """The whole at first, then what changes; without an end."""


@dataclass(frozen=True, slots=True, eq=False)
class State:
    """Where things stand.  places: of each expert, in TIERS; uses: of each, since the beginning."""

    places: Numbers
    uses: Numbers
    rates: Rates


def difference(before: State | None, now: State) -> Frame:
    """What to tell who knows of `before`."""
    if before is None:
        everywhere = np.arange(now.places.size)
        return Frame(
            whole=True,
            moved_at=everywhere,
            moved_to=now.places,
            used_at=everywhere,
            used_times=now.uses,
            rates=now.rates,
        )
    moved = np.flatnonzero(now.places != before.places)
    more = now.uses - before.uses
    used = np.flatnonzero(more)
    return Frame(
        whole=False,
        moved_at=moved,
        moved_to=now.places[moved],
        used_at=used,
        used_times=more[used],
        rates=now.rates,
    )
