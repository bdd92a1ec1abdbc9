"""Chooses the codes of trellis planes: scales first, then codes, errors fed back.

What a matrix is worth is the error of its output. Inside a Hadamard block the inputs are
correlated, so the error of columns already coded can be made up for by those still to come. The
columns are coded four at a time, a slice of all blocks at once, and what earlier slices got wrong
is added, as far as the input's covariance says it can be corrected, to what later ones aim at
(LDLQ: QuIP, arXiv 2307.13304; GPTQ, arXiv 2210.17323, in another order of the same sums).

A stack of planes must be good at every depth, and each depth has its own errors to feed back. A
plane fed with its own depth's errors alone leaves the next plane a residual that is larger for
having been shaped. Aiming half at its own depth and half at the whole stack's keeps nearly all of
both. Measured once on the demo model while this was written, layer 0, gate and up, output error at
one / two / three planes: no feedback .0504 / .00380 / .00029, each plane for itself
.0226 / .00246 / .00039, all for the whole stack .0427 / .00307 / .00014, half and half
.0258 / .00215 / .00020.

Knows:        words of a matrix, scales and their fit, covariance of inputs.
Ignorant of:  where weights and covariances come from, how the trellis is searched, files.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
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
from quant.transform import hadamard_matrix, hadamard_size, transform_weights
from quant.trellis import TrellisCode, decode_plane
from quant.viterbi import Trellis

Encode: TypeAlias = Callable[
    [Tensor, Tensor, PlaneLayout, TrellisCode, int, Tensor | None], list[Tensor]
]

# Rows coded at once hold about so many weights: enough words in a slice to keep the search busy.
CHUNK_WEIGHTS = 2**21
# The covariance is the calibration text's; half of it is taken for noise. Measured once on the demo
# model while this was written, layers 0 and 3, on other text than it was calibrated on, two planes
# of gate and up: no feedback .00351, damping .01 .00308, .1 .00307, .5 .00307; three planes:
# .00028, .00030, .00028, .00026.
DAMPING = 0.5
_TINY = 1e-30
OWN_DEPTH_SHARE = 0.5


def encode_planes(
    weights: Tensor,
    d: Tensor,
    layout: PlaneLayout,
    code: TrellisCode,
    n_planes: int,
    covariance: Tensor | None = None,
) -> list[Tensor]:
    """Code W / d H as a stack of planes, each coding what the planes before it left.

    weights: W [n_out, n_in], any float dtype; d: [n_in]; covariance: [blocks, h, h] of the inputs
    inside each Hadamard block of h channels, None to take them for uncorrelated.
    Returns n_planes of [plane_bytes] uint8.  Raises ValueError for weights that are not finite.
    Works through some rows at a time, so that beside weights and planes memory stays a small
    multiple of one chunk.
    """
    metric = transformed_covariance(covariance, d)
    parts = (
        encode_rows(weights[first:last], d, code, n_planes, metric)
        for first, last in row_chunks(layout)
    )
    return join_rows(parts, layout, n_planes)


@dataclass(frozen=True, slots=True)
class CodedRows:
    """Some rows of every plane, and what their gains need.

    planes: [plane_bytes of these rows] uint8 each; energy: of the exact output; kept: for each
    depth of the stack, the product of the exact and the coded output.
    """

    planes: list[Tensor]
    energy: float
    kept: list[float]


def join_rows(parts: Iterable[CodedRows], layout: PlaneLayout, n_planes: int) -> list[Tensor]:
    """Whole planes of chunks of rows that come in order."""
    planes = [torch.zeros(layout.plane_bytes, dtype=torch.uint8) for _ in range(n_planes)]
    energy, kept = 0.0, [0.0] * n_planes
    for (first, last), part in zip(row_chunks(layout), parts, strict=True):
        for plane, rows in zip(planes, part.planes, strict=True):
            place_rows(plane, layout, rows, PlaneLayout(last - first, layout.n_in), first)
        energy += part.energy
        kept = [a + b for a, b in zip(kept, part.kept, strict=True)]
    for plane, product in zip(planes, kept, strict=True):
        gain = energy / product if product > 0 else 1.0
        plane[layout.gain_offset :][:4].view(torch.float32).fill_(gain)
    return planes


def row_chunks(layout: PlaneLayout) -> Iterator[tuple[int, int]]:
    """The rows that are coded at once, [first, last), the same however many cores there are."""
    step = max(1, CHUNK_WEIGHTS // (layout.padded_columns * BLOCK_ROWS)) * BLOCK_ROWS
    for first in range(0, layout.n_out, step):
        yield first, min(first + step, layout.n_out)


def place_rows(
    plane: Tensor, layout: PlaneLayout, part: Tensor, of: PlaneLayout, first: int
) -> None:
    """Copy `part`, a plane of layout `of`, into `plane` from row `first` on, a multiple of 64."""
    begin = first // BLOCK_ROWS
    for (start, size), (part_start, part_size) in zip(layout.regions(), of.regions(), strict=True):
        region = plane[start : start + size].view(layout.row_blocks, -1)
        rows = part[part_start : part_start + part_size].view(of.row_blocks, -1)
        region[begin : begin + of.row_blocks] = rows


def transformed_covariance(covariance: Tensor | None, d: Tensor) -> Tensor | None:
    """H = E[x' x'^T] in the basis of the codes, [blocks, h, h] float32, its diagonal 1 on average.

    None without a covariance or where blocks are too small for feedback.
    """
    size = hadamard_size(d.shape[0])
    if covariance is None or size <= SLICE_COLUMNS:
        return None
    channels = d.float().view(-1, size)
    scaled = covariance.float() * channels[:, :, None] * channels[:, None, :]
    h = hadamard_matrix(size)
    metric = h @ scaled @ h
    return metric / metric.diagonal(dim1=1, dim2=2).mean().clamp_min(_TINY)


def feedback_factors(metric: Tensor) -> Tensor:
    """How an error in one column is to be made up for in later ones, [blocks, h, h] float32.

    With H = U D U^T, U unit upper triangular in blocks of 4, an error e costs |e U|^2 in the metric
    D: aiming column k at w_k + sum over j < k of e_j U_jk leaves each slice's own coding error and
    no more.  metric: H.  Returns U less its diagonal.
    """
    size = metric.shape[1]
    level = metric.diagonal(dim1=1, dim2=2).mean(1).clamp_min(_TINY)
    damped = metric / level[:, None, None] + DAMPING * torch.eye(size)
    upper = torch.linalg.cholesky(damped.flip(1, 2)).flip(1, 2)  # damped = upper upper^T
    slices = torch.arange(size) // SLICE_COLUMNS
    diagonal = torch.where(slices[:, None] == slices[None], upper, 0)
    unit = torch.linalg.solve_triangular(diagonal, upper, upper=True, left=False)
    return torch.where(slices[:, None] == slices[None], 0, unit)


def encode_rows(
    weights: Tensor, d: Tensor, code: TrellisCode, n_planes: int, metric: Tensor | None
) -> CodedRows:
    """Code some rows, [n, n_in], as planes of PlaneLayout(n, n_in).

    metric: transformed_covariance's.
    """
    layout = PlaneLayout(*weights.shape)
    with _one_thread():
        target = torch.zeros(layout.padded_rows, layout.padded_columns)
        target[: layout.n_out, : layout.n_in] = transform_weights(weights, d)
        if not torch.isfinite(target).all():
            raise ValueError("weights are not finite")
        stack = _Stack.of(target, Trellis.of(code), n_planes)
        if metric is not None:
            stack = stack.with_feedback(target, Trellis.of(code), layout, feedback_factors(metric))
        planes = [
            _pack(windows, scales, layout)
            for windows, scales in zip(stack.windows, stack.scales, strict=True)
        ]
        return CodedRows(planes, *_kept(target, planes, layout, code, metric))


def _kept(
    target: Tensor,
    planes: list[Tensor],
    layout: PlaneLayout,
    code: TrellisCode,
    metric: Tensor | None,
) -> tuple[float, list[float]]:
    """The energy of the exact output, and its product with the coded one at every depth."""
    exact = target[: layout.n_out, : layout.n_in]
    felt = exact
    if metric is not None:
        blocks = exact.reshape(layout.n_out, *metric.shape[:2]).transpose(0, 1)
        felt = (blocks @ metric).transpose(0, 1).reshape(exact.shape)
    coded, kept = torch.zeros_like(exact), []
    for plane in planes:
        coded = coded + decode_plane(plane, layout, code)[: layout.n_out, : layout.n_in]
        kept.append(float((felt * coded).sum(dtype=torch.float64)))
    return float((felt * exact).sum(dtype=torch.float64)), kept


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Keep torch from splitting what takes microseconds: ten times slower on a busy CPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True, slots=True)
class _Stack:
    """Planes being chosen.  windows: [32, words] of each plane; scales: of each plane."""

    windows: list[Tensor]
    scales: list["ScaleFit"]

    @classmethod
    def of(cls, target: Tensor, trellis: Trellis, n_planes: int) -> "_Stack":
        """Code target [rows, columns], every weight for itself."""
        stack, residual = cls([], []), target
        rows, columns = target.shape
        for _ in range(n_planes):
            groups, x = residual.view(rows, -1, BLOCK_COLUMNS), _to_words(residual)
            # The plain rms is the best start for a stack: .97 of it is as good for plane 0, but
            # leaves more outliers to the next (three planes of a Gaussian: .00050, not .00048,
            # measured once while this was written).
            scales = ScaleFit.of(groups.square().mean(2).sqrt())
            rough = trellis.search(x, _spread(scales), tail_biting=False)
            values = trellis.values[_from_words(rough, rows, columns)].view_as(groups)
            scales = ScaleFit.least_squares(groups, values)
            windows = trellis.search(x, _spread(scales), tail_biting=True)
            values = trellis.values[_from_words(windows, rows, columns)].view_as(groups)
            scales = ScaleFit.least_squares(groups, values)
            residual = residual - (values * scales.products()[:, :, None]).view(rows, columns)
            stack.windows.append(windows)
            stack.scales.append(scales)
        return stack

    def with_feedback(
        self, target: Tensor, trellis: Trellis, layout: PlaneLayout, factors: Tensor
    ) -> "_Stack":
        """The same scales with codes chosen anew, slice by slice, errors fed back.

        target: [rows, columns]; factors: [blocks, h, h].
        """
        n_blocks, size = factors.shape[:2]
        n_slices = size // SLICE_COLUMNS  # of a Hadamard block
        aim = target[:, : layout.n_in].view(-1, n_blocks, size).transpose(0, 1)  # [blocks, rows, h]
        # What every depth of the stack has got wrong so far.
        errors = [torch.zeros_like(aim) for _ in self.scales]
        spread = [_by_slice(_spread(s), layout) for s in self.scales]
        chosen = [_by_slice(w.clone(), layout) for w in self.windows]
        for s in range(n_slices):
            columns = slice(s * SLICE_COLUMNS, (s + 1) * SLICE_COLUMNS)
            here = slice(s, layout.n_in // SLICE_COLUMNS, n_slices)  # this slice of every block
            coded = torch.zeros_like(aim[:, :, columns])
            for depth in range(len(self.scales)):
                felt = errors[depth] * OWN_DEPTH_SHARE + errors[-1] * (1 - OWN_DEPTH_SHARE)
                back = felt[:, :, : columns.start] @ factors[:, : columns.start, columns]
                wanted = _slice_words(aim[:, :, columns] + back - coded)
                scale = spread[depth][:, :, here]
                windows = trellis.search(
                    wanted, scale.reshape(WORD_WEIGHTS, -1), tail_biting=True
                ).view_as(scale)
                chosen[depth][:, :, here] = windows
                coded = coded + _from_slice_words(trellis.values[windows] * scale)
                errors[depth][:, :, columns] = aim[:, :, columns] - coded
        return _Stack([c.reshape(WORD_WEIGHTS, -1) for c in chosen], self.scales)


def _by_slice(words: Tensor, layout: PlaneLayout) -> Tensor:
    """[32, words] as [32, row_blocks, slices of the whole row, 8]."""
    return words.view(WORD_WEIGHTS, layout.row_blocks, -1, WORDS)


def _slice_words(columns: Tensor) -> Tensor:
    """Four columns of every block, [blocks, rows, 4], as words [32, row_blocks * blocks * 8]."""
    shape = (columns.shape[0], -1, 4, WORDS, 2, SLICE_COLUMNS)
    return columns.reshape(shape).permute(2, 4, 5, 1, 0, 3).reshape(WORD_WEIGHTS, -1)


def _from_slice_words(words: Tensor) -> Tensor:
    """The inverse of _slice_words, from [32, row_blocks, blocks, 8]."""
    _, row_blocks, n_blocks, _ = words.shape
    parts = words.reshape(4, 2, SLICE_COLUMNS, row_blocks, n_blocks, WORDS)
    return parts.permute(4, 3, 0, 5, 1, 2).reshape(n_blocks, -1, SLICE_COLUMNS)


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


def _pack(windows: Tensor, scales: ScaleFit, layout: PlaneLayout) -> Tensor:
    """A plane's bytes.  windows: [32, words], of which the low two bits are stored."""
    if not torch.isfinite(scales.row).all():
        raise ValueError("weights are too large for float16 scales")
    plane = torch.zeros(layout.plane_bytes, dtype=torch.uint8)
    quads = (windows & 3).view(8, 4, -1)  # byte, weight of the byte, word
    packed = quads[:, 0] | quads[:, 1] << 2 | quads[:, 2] << 4 | quads[:, 3] << 6
    plane[: layout.code_bytes] = packed.to(torch.uint8).t().flatten()
    nibbles = scales.nibble.to(torch.uint8).view(layout.row_blocks, 2, BLOCK_ROWS // 2, -1)
    pairs = (nibbles[:, 0] | nibbles[:, 1] << 4).transpose(1, 2)  # [row_blocks, column_blocks, 32]
    start = layout.group_scale_offset
    plane[start : start + layout.group_scale_bytes] = pairs.flatten()
    start = layout.row_scale_offset
    plane[start : start + layout.row_scale_bytes].view(torch.float16)[:] = scales.row
    return plane
