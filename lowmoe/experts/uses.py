"""Counts how often each expert was used.

Knows:        experts, numbered layer by layer.
Ignorant of:  where experts are, who asks how often.
"""

from array import array
from collections.abc import Iterable, Sequence
from itertools import accumulate

N_BYTES = 8  # of a count, as native code adds to it


class Uses:
    """Passes that used an expert, since it was made; one of many tokens counts once.

    counts: of every expert, int64; first: [L + 1], where a layer's begin.
    """

    def __init__(self, n_experts: Sequence[int]) -> None:
        """n_experts: of each layer."""
        self.first = tuple(accumulate(n_experts, initial=0))
        self.counts = array("q", bytes(N_BYTES * self.first[-1]))

    @property
    def address(self) -> int:
        """Of the counts, which stay where they are."""
        return self.counts.buffer_info()[0]

    def add(self, layer_id: int, expert_ids: Iterable[int]) -> None:
        """These experts of a layer were used."""
        first = self.first[layer_id]
        for expert_id in expert_ids:
            self.counts[first + expert_id] += 1
