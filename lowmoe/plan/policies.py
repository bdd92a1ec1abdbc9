"""Policies to compare with the one that runs: who deserves a place, by other rules.

Knows:        last uses, recorded counts, the future of a trace.
Ignorant of:  tiers, bytes.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from lowmoe.experts.policy import Key, Policy, Popularity, UsePolicy
from lowmoe.experts.trace import RoutingTrace

NAMES = ("decayed", "lru", "static", "belady")
_NEVER = 2**62


class Static:
    """By the counts of a profile, whatever is used."""

    def __init__(self, popularity: Popularity) -> None:
        self._shares: Mapping[Key, float] = popularity.shares

    def record(self, layer_id: int, expert_ids: list[int]) -> None:
        """Nothing is learnt."""

    def worth(self, key: Key) -> tuple[float, int]:
        return self._shares.get(key, 0.0), 0


class Belady:
    """By the next use, which only a replay knows: the ceiling of all policies.

    Source: Belady, IBM Systems Journal 5(2), 1966.
    """

    def __init__(self, trace: RoutingTrace) -> None:
        uses: dict[Key, list[int]] = {}
        for token in range(trace.n_tokens):
            for layer in range(trace.n_layers):
                for expert in set(trace.experts[token, layer].tolist()):
                    uses.setdefault((layer, expert), []).append(token * trace.n_layers + layer)
        self._uses = {key: np.array(times) for key, times in uses.items()}
        self._n_layers, self._token = trace.n_layers, -1
        self._now = -1

    def record(self, layer_id: int, expert_ids: list[int]) -> None:
        # Layer by layer, token by token, as the trace goes.
        self._token += layer_id == 0
        self._now = self._token * self._n_layers + layer_id

    def worth(self, key: Key) -> tuple[float, int]:
        times = self._uses.get(key)
        if times is None:
            return -_NEVER, 0
        at = int(np.searchsorted(times, self._now, side="right"))
        return -(float(times[at]) if at < len(times) else _NEVER), 0


def policy_of(name: str, trace: RoutingTrace, profile: Popularity) -> Policy:
    """One of NAMES.  profile: counts of another text than the trace's, for `static`."""
    if name == "lru":
        return UsePolicy(decay=0.0)  # what was used before the last use counts nothing
    if name == "static":
        return Static(profile)
    return Belady(trace) if name == "belady" else UsePolicy(start=profile)


def counted(trace: RoutingTrace) -> Popularity:
    """A trace's own shares of tokens by expert."""
    shares: dict[Key, float] = {}
    for layer, n_experts in enumerate(trace.n_experts):
        counts = np.bincount(trace.experts[:, layer].reshape(-1), minlength=n_experts)
        shares |= {(layer, e): float(n) / trace.n_tokens for e, n in enumerate(counts)}
    return Popularity(shares)


def halves(trace: RoutingTrace) -> tuple[RoutingTrace, RoutingTrace]:
    """The first half, to make a profile of, and the second, to replay."""
    middle = trace.n_tokens // 2
    first, second = trace.experts[:middle], trace.experts[middle:]
    return tuple(  # type: ignore[return-value]
        replace(trace, experts=part, begins=(0,)) for part in (first, second)
    )
