"""Where tokens go that nobody wrote: experts that come again as often as those of real texts do.

The scores of a layer's experts wander from token to token, each an autoregression of order one
beside what it is worth for good; the highest are taken.

Knows:        how often experts come again.
Ignorant of:  models, time.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lowmoe.decoder.moe import Routing

# Of the next layer's experts a look one layer ahead names so many (benchmarks/read_ahead.py).
FORESEEN = 0.85


class MadeUpRouting:
    """Of one text.  Layers route in order, token by token."""

    def __init__(
        self,
        n_layers: int,
        n_experts: int,
        n_active: int,
        *,
        memory: float,
        skew: float,
        seed: int = 0,
    ) -> None:
        """memory: share of a token's scores that comes from the token before; skew: how far
        experts' lasting worth differs, beside scores that wander by 1.
        """
        self._luck = np.random.default_rng(seed)
        self._n_experts, self._n_active, self._memory = n_experts, n_active, memory
        self._worth = skew * self._luck.standard_normal((n_layers, n_experts))
        self._scores = self._luck.standard_normal((n_layers, n_experts))
        self._layer_of: dict[int, int] = {}
        self._next_token()

    def know(self, routers: Sequence[int]) -> None:
        """Addresses by which layers are told apart."""
        self._layer_of = {router: layer_id for layer_id, router in enumerate(routers)}

    def route(self, router: int, weights: Tensor, ids: Tensor, first: Tensor) -> None:
        """What the operation norm_route says of one token."""
        layer_id = self._layer_of[router]
        if layer_id == 0:
            self._next_token()
        chosen = torch.from_numpy(self._chosen[layer_id])
        ids.copy_(chosen[None])
        weights.fill_(1 / self._n_active)
        counts = torch.zeros(self._n_experts, dtype=torch.int32)
        counts[chosen.long()] = 1
        first[0] = 0
        first[1:].copy_(counts.cumsum(0))

    def foreseen(self, layer_id: int) -> Routing:
        """A look at the layer after the one that routed last, not all of it right."""
        wrong = self._luck.random(self._n_active) > FORESEEN
        others = self._luck.integers(0, self._n_experts, self._n_active)
        guess = np.where(wrong, others, self._chosen[layer_id])
        ids = torch.from_numpy(guess.astype(np.int64))[None]
        return Routing(torch.full(ids.shape, 1 / self._n_active), ids)

    def _next_token(self) -> None:
        noise = self._luck.standard_normal(self._scores.shape)
        self._scores = self._memory * self._scores + (1 - self._memory**2) ** 0.5 * noise
        total = self._scores + self._worth
        self._chosen = np.argpartition(-total, self._n_active - 1, axis=1)[:, : self._n_active]
        self._chosen = self._chosen.astype(np.int32)


def repeats(
    n_experts: int, n_active: int, *, memory: float, skew: float, n_tokens: int = 2000
) -> tuple[float, float]:
    """How often any of a token's experts, and how many of them, were the token before's too."""
    routing = MadeUpRouting(4, n_experts, n_active, memory=memory, skew=skew)
    before, shares = [set(row) for row in routing._chosen], []
    for _ in range(n_tokens):
        routing._next_token()
        now = [set(row) for row in routing._chosen]
        shares += [len(a & b) / n_active for a, b in zip(now, before, strict=True)]
        before = now
    return sum(s > 0 for s in shares) / len(shares), sum(shares) / len(shares)
