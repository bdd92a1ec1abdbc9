"""A machine to be watched, of any size, which does what a test tells it.

Knows:        where experts are and how often they were used, as it was told.
Ignorant of:  models.
"""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import replace

import numpy as np

from lowmoe.engine.statistics import PerTier
from lowmoe.server.watching import TIERS, About, Frame, Rates, State, difference
from tests.server.fake_service import DEMO_CARD

ABOUT = About(
    model=DEMO_CARD.name,
    layers=(0, 4, 4, 4),
    n_active=2,
    tiers=TIERS,
    counts_uses=True,
    thinks=True,
    expert_bytes=1000,
    bits=4,
    isa="avx2",
    n_context=4096,
    n_sequences=4,
)
RATES = Rates(
    tokens_per_s=17.25,
    predicted_tokens_per_s=19.1,
    bound_tokens_per_s=24.6,
    hit_rate=PerTier(gpu=0.6, ram=0.35, disk=0.05),
    bytes_per_token=PerTier(gpu=5.1e9, ram=2.2e9, disk=1.3e8),
    n_context=1234,
    n_answers=1,
)


class FakeWatch:
    """A third of the experts in each tier, in turn.  Every EVERY_S some of them are used."""

    EVERY_S = 0.05

    def __init__(self, layers: tuple[int, ...] = ABOUT.layers, *, used_at_once: int = 2) -> None:
        """used_at_once: experts of each layer, between two frames; 0 for none."""
        self.about = replace(ABOUT, layers=layers)
        self._random = np.random.default_rng(0)
        self._n_used = used_at_once
        self._places = (np.arange(sum(layers)) % len(TIERS)).astype(np.uint8)
        self._uses = np.zeros(sum(layers), np.int64)

    async def frames(self) -> AsyncGenerator[Frame, None]:
        """For ever."""
        before: State | None = None
        while True:
            now = State(self._places.copy(), self._uses.copy(), RATES)
            yield difference(before, now)
            before = now
            await asyncio.sleep(self.EVERY_S)
            self._use_some()

    def _use_some(self) -> None:
        first = 0
        for n in self.about.layers:
            used = self._random.choice(n, min(n, self._n_used), replace=False) if n else []
            for expert in used:
                self._uses[first + expert] += 1
            first += n
