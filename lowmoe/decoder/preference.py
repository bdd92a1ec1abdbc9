"""Experts at hand are preferred over others that are a little likelier: --cache-aware-routing.

When a token's experts are chosen, one at hand counts as 1 / (1 - budget) times as likely as it is.
So it takes the place of one that is not at hand just if its own likelihood is more than 1 - budget
of that one's. What experts weigh is as likely as they are.

Knows:        how likely experts of each layer count.
Ignorant of:  routers, where experts are.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lowmoe.spec import ModelSpec


def boost_of(budget: float) -> float:
    """By how much a logit is higher that counts so, where the likelihood is a softmax."""
    return -math.log1p(-budget)


class Preference:
    """factors: of each layer, [E] float32, which native code reads where it lies."""

    def __init__(self, spec: ModelSpec, budget: float) -> None:
        """budget: from 0 to 1, both left out."""
        assert 0 < budget < 1
        self._factor = 1 / (1 - budget)
        self.factors: list[Tensor] = [torch.ones(n) for n in spec.n_experts_by_layer]

    def look(self, layer_id: int, is_at_hand: Callable[[int, int], bool]) -> None:
        """Prefer what is at hand now.  is_at_hand: of a layer's id and an expert's."""
        factors = self.factors[layer_id]
        at_hand = [is_at_hand(layer_id, e) for e in range(factors.shape[0])]
        factors.fill_(1.0).masked_fill_(torch.tensor(at_hand, dtype=torch.bool), self._factor)

    def forget(self) -> None:
        """Prefer none: all are at hand."""
        for factors in self.factors:
            factors.fill_(1.0)
