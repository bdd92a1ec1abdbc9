"""Which experts deserve their place: decayed frequency of use, recency as tie-break.

Routing is skewed and the skew drifts slowly with the text, so how often an expert was used lately
predicts best whether it will be used again; plain recency evicts, at every pass over the layers,
just what the next token needs first.

Knows:        how often and how lately each expert of each layer was used.
Ignorant of:  bytes, tiers, what an expert is.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

# An expert of one layer.
Key: TypeAlias = tuple[int, int]

# A use counts half after 43 uses of its layer: long enough to know an expert, short enough to
# follow a change of subject. A guess, until there are recorded routings of large models to fit.
DECAY = 0.984


_NEVER = (0.0, 0, 0)  # how much it was used, when by its layer's clock, when by that of all


@dataclass(frozen=True, slots=True)
class Popularity:
    """What is known before the first use.  shares: of tokens, of experts that were counted."""

    shares: Mapping[Key, float] = field(default_factory=dict)

    def ordered(self, keys: Iterable[Key]) -> list[Key]:
        """The most popular first, those alike in the order they were in."""
        return sorted(keys, key=lambda key: -self.shares.get(key, 0.0))


UNKNOWN = Popularity()


class Policy(Protocol):
    """Who deserves a place most."""

    def record(self, layer_id: int, expert_ids: list[int]) -> None:
        """These experts of a layer were just used, once each."""

    def worth(self, key: Key) -> tuple[float, int]:
        """How much an expert deserves its place; compare with <."""


class UsePolicy:
    """Counts uses layer by layer; time passes for a layer only when it is used."""

    def __init__(self, decay: float = DECAY, *, start: Popularity = UNKNOWN) -> None:
        """start: counts as if it had been so for ever, until it has decayed."""
        self._decay = decay
        self._layer_clock: dict[int, int] = {}
        self._clock = 0
        # Weight, its layer time, its time. A share s of uses adds up to s * (1 + decay + ..).
        self._uses: dict[Key, tuple[float, int, int]] = {
            key: (share / (1 - decay), 0, 0) for key, share in start.shares.items()
        }

    def record(self, layer_id: int, expert_ids: list[int]) -> None:
        """These experts of a layer were just used, once each."""
        self._clock += 1
        now = self._layer_clock[layer_id] = self._layer_clock.get(layer_id, 0) + 1
        for expert_id in expert_ids:
            key = (layer_id, expert_id)
            weight, then, _ = self._uses.get(key, _NEVER)
            self._uses[key] = (weight * self._decay ** (now - then) + 1, now, self._clock)

    def worth(self, key: Key) -> tuple[float, int]:
        """How much an expert deserves its place; compare with <."""
        weight, then, time = self._uses.get(key, _NEVER)
        age = self._layer_clock.get(key[0], 0) - then
        return weight * self._decay**age, time
