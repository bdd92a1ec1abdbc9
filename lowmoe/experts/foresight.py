"""Which guesses deserve a read: those of ranks that have lately come true.

A wrong guess costs a whole expert's read, and where the disk is the limit every such read delays
one that is needed. Guesses come with the likeliest first, and how often each rank comes true
differs between models and texts; so it is measured, for every guess not in RAM, read or not.

Knows:        how often guesses of each rank came true lately.
Ignorant of:  which experts they were, reads, RAM.
"""

# Measured on random models of which RAM held half, of 64 experts a layer and of 8: bytes read over
# bytes that were missing is 1.28 and 1.22 where every guess is read; from .7 on 1.07 and 1.07, and
# 3 to 5 % faster; from .9 on 1.02 and 1.03, but slower with 64. Nothing ahead: 6 % slower there.
TRUST = 0.75
MEMORY = 0.98  # of the latest outcomes, about fifty count
N_RANKS = 64  # guesses beyond, those of long prompts, count like the last


class Foresight:
    """Trusts every rank until it has seen it fail."""

    def __init__(self) -> None:
        self._came_true = [1.0] * N_RANKS

    def trusts(self, rank: int) -> bool:
        """Whether a guess of this rank, 0 for the likeliest, is to be read."""
        return self._came_true[min(rank, N_RANKS - 1)] >= TRUST

    def learn(self, rank: int, *, came_true: bool) -> None:
        """A guess of this rank that was not in RAM came true, or did not."""
        rank = min(rank, N_RANKS - 1)
        self._came_true[rank] += (came_true - self._came_true[rank]) * (1 - MEMORY)
