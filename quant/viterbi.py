"""Searches the trellis: a tail-biting Viterbi algorithm over 16 states, vectorised over words.

A word's two ends must meet in one of 16 states. Searching from each is exact and eight times the
work. Instead one pass forwards over the whole word, free at its start, and one backwards, free at
its end, price every state at the seam; the search is then held to start and end in the cheapest
few. On a Gaussian source, relative squared error of plane 0: exact .0767, the cheapest state .0774,
the cheaper of two .0769; the word turned by half and one state, as often done, .0785.

Knows:        windows, states, squared error.
Ignorant of:  which weight of which matrix a word holds, how scales are chosen.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from quant.layout import WORD_WEIGHTS
from quant.trellis import TrellisCode

# Words searched at once: their costs of one step, 1 MiB, stay in the second-level cache.
# benchmarks/encoder_speed.py, one core: 2.7 M weights/s at 512, 4.6 at 2048, 4.8 at 4096, 4.5 at
# 8192.
CHUNK_WORDS = 4096
SYMBOLS = 4
_BLOCKED = 1e30  # a cost no path can reach


@dataclass(frozen=True, slots=True)
class Trellis:
    """The search over one code's table.

    Time runs from weight 31 down to 0, since a window holds its own symbol lowest and those of
    later weights above. A state is the symbols a window shares with the next step's. The oldest
    symbol, `old`, is what two paths into a state differ in:
    window = old * n_states + state, and the state before = old * n_states / 4 + state / 4.
    """

    values: Tensor  # [windows] float32, at scale 1

    @classmethod
    def of(cls, code: TrellisCode) -> "Trellis":
        return cls(torch.tensor(code.table, dtype=torch.float32) * code.table_unit)

    @property
    def n_states(self) -> int:
        return self.values.shape[0] // SYMBOLS

    def search(self, x: Tensor, scale: Tensor, *, tail_biting: bool) -> Tensor:
        """The windows that bring scale * value closest to x.

        x, scale: [32, words] float32.  Returns [32, words] int64.  Without tail_biting the two
        ends need not meet, which is enough for fitting scales.
        """
        windows = torch.empty(x.shape, dtype=torch.int64)
        for chunk in _chunks(x.shape[1]):
            quadratic, linear = _costs(x[:, chunk], scale[:, chunk])
            if tail_biting:
                costs, seam, offset = self._closed_costs(quadratic, linear)
            else:
                costs = self._forward(quadratic, linear, None)
                seam, offset = costs[-1].argmin(0), torch.zeros(1, dtype=torch.int64)
            windows[:, chunk] = self._trace(costs, quadratic, linear, seam, offset)
        return windows.flip(0)  # from the order of time to that of weights

    def _closed_costs(self, quadratic: Tensor, linear: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The costs of paths that start and end in one state, for the two cheapest such states.

        Returns costs [33, 2 * states, words], the better state of each word [words], and the row
        where its costs begin [words].
        """
        price = self._forward(quadratic, linear, None)[-1] + self._backward(quadratic, linear)
        seams = price.topk(2, dim=0, largest=False).indices
        steps, words = quadratic.shape
        costs = torch.empty(steps + 1, 2, self.n_states, words)
        for candidate in (0, 1):
            self._forward(quadratic, linear, seams[candidate], out=costs[:, candidate])
        ends = costs[-1].gather(1, seams[:, None])[:, 0]  # [2, words]
        second = (ends[1] < ends[0]).long()
        seam = seams.gather(0, second[None])[0]
        return costs.view(steps + 1, -1, words), seam, second * self.n_states

    def _trace(
        self, costs: Tensor, quadratic: Tensor, linear: Tensor, end: Tensor, offset: Tensor
    ) -> Tensor:
        """The windows of the cheapest path that ends in the states `end` [words].

        offset: the row of costs [33, rows, words] where those of state 0 lie, for each word.
        """
        windows = torch.empty(quadratic.shape, dtype=torch.int64)
        by_state = self.values.view(SYMBOLS, self.n_states)
        olds = torch.arange(SYMBOLS)[:, None] * (self.n_states // SYMBOLS) + offset
        state = end
        for t in range(WORD_WEIGHTS - 1, -1, -1):
            values = by_state.index_select(1, state)  # [4, words], one for each oldest symbol
            before = costs[t].gather(0, olds + (state >> 2))
            total = torch.addcmul(before, values, torch.addcmul(linear[t], values, quadratic[t]))
            old = _argmin_of_four(total)
            windows[t] = old * self.n_states | state
            state = old * (self.n_states // SYMBOLS) | state >> 2
        return windows

    def _backward(self, quadratic: Tensor, linear: Tensor) -> Tensor:
        """The cost of the cheapest path from each state at the start to any end [states, words]."""
        words = quadratic.shape[1]
        costs = torch.zeros(self.n_states, words)
        values = self.values.view(SYMBOLS, -1, SYMBOLS, 1)
        shape = (SYMBOLS, self.n_states // SYMBOLS, SYMBOLS, words)
        slope, total = torch.empty(shape), torch.empty(shape)
        for t in range(WORD_WEIGHTS - 1, -1, -1):
            torch.addcmul(linear[t], values, quadratic[t], out=slope)
            torch.addcmul(costs.view(1, -1, SYMBOLS, words), values, slope, out=total)
            costs = torch.amin(total, dim=2).view(self.n_states, words)
        return costs

    def _forward(
        self, quadratic: Tensor, linear: Tensor, start: Tensor | None, out: Tensor | None = None
    ) -> Tensor:
        """The cost of the cheapest path into each state before each step, [33, states, words]."""
        steps, words = quadratic.shape
        costs = torch.empty(steps + 1, self.n_states, words) if out is None else out
        if start is None:
            costs[0] = 0
        else:
            costs[0] = _BLOCKED
            costs[0].scatter_(0, start[None], 0.0)
        # [old, rest of the state before, newest symbol, words]
        values = self.values.view(SYMBOLS, -1, SYMBOLS, 1)
        shape = (SYMBOLS, self.n_states // SYMBOLS, SYMBOLS, words)
        slope, total = torch.empty(shape), torch.empty(shape)
        low, high = torch.empty(2, *shape[1:])
        for a, b, before, after in zip(quadratic, linear, costs[:-1], costs[1:], strict=True):
            torch.addcmul(b, values, a, out=slope)
            torch.addcmul(before.view(SYMBOLS, -1, 1, words), values, slope, out=total)
            torch.minimum(total[0], total[1], out=low)
            torch.minimum(total[2], total[3], out=high)
            torch.minimum(low, high, out=after.view(-1, SYMBOLS, words))
        return costs


def _chunks(n_words: int) -> Iterator[slice]:
    for first in range(0, n_words, CHUNK_WORDS):
        yield slice(first, min(first + CHUNK_WORDS, n_words))


def _costs(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """(x - scale * v)^2 = x^2 + linear * v + quadratic * v^2, x^2 left out, in time's order."""
    x, scale = x.flip(0), scale.flip(0)
    return scale.square(), -2 * scale * x


def _argmin_of_four(rows: Tensor) -> Tensor:
    """argmin over dimension 0 of [4, n]; torch's own takes 0.1 us an element there."""
    low, high = torch.minimum(rows[0], rows[1]), torch.minimum(rows[2], rows[3])
    in_low, in_high = (rows[1] < rows[0]).long(), (rows[3] < rows[2]).long() + 2
    return torch.where(high < low, in_high, in_low)
