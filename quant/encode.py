"""Chooses the codes of trellis planes: a tail-biting Viterbi search over 16 states, vectorised.

A word's two ends must meet in one of 16 states. Searching from each is exact and eight times the
work. Instead one pass forwards over the whole word, free at its start, and one backwards, free at
its end, price every state at the seam; the search is then held to start and end in the cheapest
few. On a Gaussian source, relative squared error of plane 0: exact .0767, the cheapest state .0774,
the cheaper of two .0769; the word turned by half and one state, as often done, .0785.

Knows:        the trellis, squared error, scales and their fit.
Ignorant of:  what the weights are for, how d was chosen, files.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from quant.layout import (
    BLOCK_COLUMNS,
    BLOCK_ROWS,
    SCALE_LEVELS,
    SLICE_COLUMNS,
    SLICES,
    WORD_WEIGHTS,
    WORDS,
    PlaneLayout,
)
from quant.transform import transform_weights
from quant.trellis import TrellisCode

Encode: TypeAlias = Callable[[Tensor, Tensor, PlaneLayout, TrellisCode, int], list[Tensor]]

# Words searched at once: their costs of one step, 1 MiB, stay in the second-level cache.
# benchmarks/encoder_speed.py, one core: 2.7 M weights/s at 512, 4.6 at 2048, 4.8 at 4096, 4.5 at
# 8192.
CHUNK_WORDS = 4096
SYMBOLS = 4
_BLOCKED = 1e30  # a cost no path can reach


def encode_planes(
    weights: Tensor, d: Tensor, layout: PlaneLayout, code: TrellisCode, n_planes: int
) -> list[Tensor]:
    """Code W / d H as a stack of planes, each coding what the planes before it left.

    weights: W [n_out, n_in], any float dtype; d: [n_in].  Returns n_planes of [plane_bytes] uint8.
    Works through a few 64-row blocks at a time, so that beside weights and planes memory stays a
    small multiple of one chunk. Blocks are independent: coding them apart gives the same bytes.
    """
    planes = [torch.zeros(layout.plane_bytes, dtype=torch.uint8) for _ in range(n_planes)]
    blocks_at_once = max(1, CHUNK_WORDS // (layout.column_blocks * SLICES * WORDS))
    with _one_thread():
        for first in range(0, layout.row_blocks, blocks_at_once):
            last = min(first + blocks_at_once, layout.row_blocks)
            residual = _padded_rows(weights, d, layout, first, last)
            for plane in planes:
                residual = residual - _encode_rows(residual, plane, layout, code, first, last)
    return planes


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Keep torch from splitting operations of a few microseconds: ten times slower on a busy CPU.

    EncoderPool is how several cores are used.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _padded_rows(weights: Tensor, d: Tensor, layout: PlaneLayout, first: int, last: int) -> Tensor:
    rows = transform_weights(weights[first * BLOCK_ROWS : last * BLOCK_ROWS], d)
    padded = torch.zeros((last - first) * BLOCK_ROWS, layout.padded_columns)
    padded[: rows.shape[0], : layout.n_in] = rows
    return padded


def _encode_rows(
    target: Tensor, plane: Tensor, layout: PlaneLayout, code: TrellisCode, first: int, last: int
) -> Tensor:
    """Code the row blocks first..last into `plane`; returns the weights they decode to.

    target: [rows, padded_columns].
    """
    trellis = _Trellis.of(code)
    rows, columns = target.shape
    groups = target.view(rows, -1, BLOCK_COLUMNS)
    x = _to_words(target)
    # The plain rms is the best start for a stack: .97 of it is as good for plane 0, but leaves more
    # outliers to the next ones (three planes of a Gaussian: .00050 instead of .00048).
    scales = ScaleFit.of(groups.square().mean(2).sqrt())
    rough = _from_words(trellis.search(x, _spread(scales), tail_biting=False), rows, columns)
    scales = ScaleFit.least_squares(groups, trellis.values[rough].view_as(groups))
    windows = trellis.search(x, _spread(scales), tail_biting=True)
    values = trellis.values[_from_words(windows, rows, columns)].view_as(groups)
    scales = ScaleFit.least_squares(groups, values)
    _store_codes(windows, plane, layout, first, last)
    _store_scales(scales, plane, layout, first, last)
    return (values * scales.products()[:, :, None]).view(rows, columns)


@dataclass(frozen=True, slots=True)
class ScaleFit:
    """Scales in the form a plane can hold: row [rows] float16, nibble [rows, groups] 0 to 15."""

    row: Tensor
    nibble: Tensor

    @classmethod
    def of(cls, wanted: Tensor) -> "ScaleFit":
        """The nearest representable scales to `wanted` [rows, groups] >= 0."""
        row = wanted.amax(1).half()
        step = (row.float() / SCALE_LEVELS)[:, None]
        nibble = torch.where(step > 0, wanted / step, 0).round()
        # A group far below its row's loudest still gets the smallest step; only silence gets 0.
        return cls(row, torch.where(wanted > 0, nibble.clamp(1, SCALE_LEVELS), 0))

    @classmethod
    def least_squares(cls, groups: Tensor, values: Tensor) -> "ScaleFit":
        """The scales that bring values closest to groups, both [rows, groups, 64]."""
        energy = values.square().sum(2)
        ideal = torch.where(energy > 0, (groups * values).sum(2) / energy, 0).clamp_min(0)
        nibble = cls.of(ideal).nibble
        # With the nibbles fixed, the best row scale is one more least-squares fit.
        weight = (nibble.square() * energy).sum(1)
        row = torch.where(weight > 0, (nibble * energy * ideal).sum(1) / weight, 0) * SCALE_LEVELS
        return cls(row.half(), nibble)

    def products(self) -> Tensor:
        """The scale of every group, [rows, groups] float32."""
        return self.row.float()[:, None] * self.nibble / SCALE_LEVELS


def _to_words(weights: Tensor) -> Tensor:
    """[rows, columns] -> [32, words]: weight i of every word, words in the layout's order."""
    rows, columns = weights.shape
    blocks = weights.view(
        rows // BLOCK_ROWS, 4, WORDS, 2, columns // BLOCK_COLUMNS, SLICES, SLICE_COLUMNS
    )
    return blocks.permute(1, 3, 6, 0, 4, 5, 2).reshape(WORD_WEIGHTS, -1)


def _from_words(words: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of _to_words."""
    blocks = words.view(
        4, 2, SLICE_COLUMNS, rows // BLOCK_ROWS, columns // BLOCK_COLUMNS, SLICES, WORDS
    )
    return blocks.permute(3, 0, 6, 1, 4, 5, 2).reshape(rows, columns)


def _spread(scales: ScaleFit) -> Tensor:
    """Each weight's scale, [32, words]."""
    products = scales.products()
    return _to_words(products.repeat_interleave(BLOCK_COLUMNS, dim=1))


def _store_codes(
    windows: Tensor, plane: Tensor, layout: PlaneLayout, first: int, last: int
) -> None:
    """Pack the low two bits of windows [32, words] into words, weight 0 lowest."""
    quads = (windows & 3).view(8, 4, -1)  # byte, weight of the byte, word
    packed = quads[:, 0] | quads[:, 1] << 2 | quads[:, 2] << 4 | quads[:, 3] << 6
    codes = plane[: layout.code_bytes].view(layout.row_blocks, -1)
    codes[first:last] = packed.to(torch.uint8).t().reshape(last - first, -1)


def _store_scales(
    scales: ScaleFit, plane: Tensor, layout: PlaneLayout, first: int, last: int
) -> None:
    nibbles = scales.nibble.to(torch.uint8).view(last - first, 2, BLOCK_ROWS // 2, -1)
    packed = (nibbles[:, 0] | nibbles[:, 1] << 4).transpose(1, 2)  # [blocks, column_blocks, 32]
    start = layout.group_scale_offset
    stored = plane[start : start + layout.group_scale_bytes].view(layout.row_blocks, -1)
    stored[first:last] = packed.reshape(last - first, -1)
    rows = plane[layout.row_scale_offset :].view(torch.float16)
    rows[first * BLOCK_ROWS : last * BLOCK_ROWS] = scales.row


@dataclass(frozen=True, slots=True)
class _Trellis:
    """The search over one code's table.

    Time runs from weight 31 down to 0, since a window holds its own symbol lowest and those of
    later weights above. A state is the symbols a window shares with the next step's. The oldest
    symbol, `old`, is what two paths into a state differ in:
    window = old * n_states + state, and the state before = old * n_states / 4 + state / 4.
    """

    values: Tensor  # [windows] float32, at scale 1

    @classmethod
    def of(cls, code: TrellisCode) -> "_Trellis":
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
