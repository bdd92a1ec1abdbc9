from dataclasses import dataclass

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowmoe.kernels.cpu import _native
from quant import trellis
from quant.layout import BLOCK_COLUMNS, BLOCK_ROWS, PlaneLayout
from quant.trellis import DEFAULT_CODE, TrellisCode

ISAS = _native.isas()
TABLE_OFFSET = 64
SCALE_COLUMNS = 128
SHARE_SUM = 255

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A matrix of random bits and tokens of random codes."""

    layout: PlaneLayout
    code: TrellisCode
    planes: list[Tensor]
    codes: NDArray[np.int8]  # [T, padded_columns]
    scales: Floats  # [T, groups of 128]

    @property
    def rows(self) -> int:
        return self.layout.padded_rows

    def native(self, name: str, isa: str, tokens: slice = slice(None)) -> Floats:
        """What a kernel makes of some tokens, [T, padded_rows]."""
        codes, scales = self.codes[tokens], self.scales[tokens]
        y = np.full((len(codes), self.rows), np.nan, np.float32)
        getattr(_native, name)(
            isa=isa,
            planes=self.planes,
            n_out=self.layout.n_out,
            n_in=self.layout.n_in,
            table=native_table(self.code),
            scale_unit=self.code.scale_unit,
            codes=codes,
            scales=scales,
            first_block=0,
            y=y,
        )
        return y


def native_table(code: TrellisCode) -> NDArray[np.uint8]:
    """64 values + 64: a narrower window's are repeated, so that bits above it change nothing."""
    values = np.array(code.table * (64 // len(code.table)))
    return (values + TABLE_OFFSET).astype(np.uint8)


def random_planes(layout: PlaneLayout, n_planes: int, rng: np.random.Generator) -> list[Tensor]:
    """Any bits are a plane, but for the scales and the gain."""
    planes = []
    for p in range(n_planes):
        plane = torch.from_numpy(rng.integers(0, 256, layout.plane_bytes, np.uint8)).clone()
        row_scales = (0.28**p * rng.uniform(0.01, 1, layout.padded_rows)).astype(np.float16)
        start = layout.row_scale_offset
        plane[start : start + layout.row_scale_bytes] = torch.from_numpy(row_scales.view(np.uint8))
        gain = np.array([1.0078], np.float32).view(np.uint8)
        plane[layout.gain_offset : layout.gain_offset + 4] = torch.from_numpy(gain)
        planes.append(plane)
    return planes


def random_case(
    n_out: int,
    n_in: int,
    n_planes: int,
    n_tokens: int = 1,
    *,
    code: TrellisCode = DEFAULT_CODE,
    seed: int = 0,
) -> Case:
    rng = np.random.default_rng(seed)
    layout = PlaneLayout(n_out, n_in)
    codes = rng.integers(-127, 128, (n_tokens, layout.padded_columns), np.int8)
    codes[:, n_in:] = 0
    scales = rng.uniform(0.001, 0.1, (n_tokens, -(-n_in // SCALE_COLUMNS))).astype(np.float32)
    planes = random_planes(layout, n_planes, rng)
    return Case(layout=layout, code=code, planes=planes, codes=codes, scales=scales)


def in_groups(values: NDArray[np.generic], size: int, by: int) -> NDArray[np.generic]:
    """The last axis cut into [groups, size], zeros appended; counted in units of `by`."""
    short = -values.shape[-1] % (size // by)
    padded = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, short)])
    return padded.reshape(*values.shape[:-1], -1, size // by)


def fma(a: Floats, b: Floats, c: Floats) -> Floats:
    """The product of two float32 is exact in float64, and the sum is rounded to 53 bits, then 24:
    twice, which differs from once only where those 29 bits are a one and zeros."""
    return (a.astype(np.float64) * b + c).astype(np.float32)


def expected_dot(case: Case) -> Floats:
    """isa.h's arithmetic of dot_block, step by step."""
    layout, x = case.layout, case.codes.astype(np.int64)
    x_blocks = x.reshape(len(x), -1, BLOCK_COLUMNS)
    unit = np.float32(case.code.scale_unit) * np.float32(trellis.gain(case.planes[-1], layout))
    y = np.zeros((len(x), case.rows), np.float32)
    for plane in case.planes:
        values = trellis.table_values(plane, layout, case.code).numpy().astype(np.int64)
        values = values.reshape(case.rows, -1, BLOCK_COLUMNS)
        nibbles = trellis.group_scales(plane, layout).numpy().astype(np.int64)
        of_blocks = np.einsum("rbc,tbc->trb", values, x_blocks) * nibbles
        of_groups = in_groups(of_blocks, SCALE_COLUMNS, BLOCK_COLUMNS).sum(-1)
        assert np.abs(of_groups).max() < 2**24
        total = np.zeros_like(y)
        for g in range(of_groups.shape[-1]):
            total = fma(of_groups[..., g].astype(np.float32), case.scales[:, None, g], total)
        y += total * (trellis.row_scales(plane, layout).numpy().astype(np.float32) * unit)
    return y


def expected_tile(case: Case) -> tuple[Integers, Floats]:
    """trellis_tile.h's codes [rows, padded_columns] and scales [rows, groups of 128]."""
    layout = case.layout
    parts, values = [], []
    for plane in case.planes:
        nibbles = trellis.group_scales(plane, layout).numpy().astype(np.float32)
        parts.append(nibbles * trellis.row_scales(plane, layout).numpy().astype(np.float32)[:, None])
        values.append(trellis.table_values(plane, layout, case.code).numpy().astype(np.int64))
    bounds = parts[0]
    for part in parts[1:]:
        bounds = bounds + part
    bound = in_groups(bounds, SCALE_COLUMNS, BLOCK_COLUMNS).max(-1)
    with np.errstate(divide="ignore"):
        factor = np.where(bound > 0, np.float32(SHARE_SUM) / bound, np.float32(0))
    factor = factor.repeat(2, 1)[:, : layout.column_blocks]
    sums = np.zeros_like(values[0])
    for part, value in zip(parts, values, strict=True):
        shares = np.rint(part * factor).astype(np.int64)
        sums += shares.repeat(BLOCK_COLUMNS, 1) * value
    unit = np.float32(case.code.scale_unit) * np.float32(trellis.gain(case.planes[-1], layout))
    return sums + 64 >> 7, bound * (unit * (np.float32(128) / np.float32(SHARE_SUM)))


def expected_product(case: Case) -> Floats:
    """isa.h's arithmetic of multiply_block, step by step."""
    codes, scales = expected_tile(case)
    w = in_groups(codes, SCALE_COLUMNS, 1)
    x = in_groups(case.codes.astype(np.int64), SCALE_COLUMNS, 1)
    sums = np.einsum("rgc,tgc->trg", w, x).astype(np.float32) * case.scales[:, None]
    y = np.zeros((len(x), case.rows), np.float32)
    for g in range(scales.shape[1]):
        y = fma(sums[..., g], scales[:, g], y)
    return y


SHAPES = [(64, 64), (64, 128), (70, 192), (128, 200), (192, 576), (1, 1)]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("n_planes", [1, 2, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_one_token_s_products_are_the_stated_ones_bit_for_bit(
    isa: str, n_planes: int, shape: tuple[int, int]
) -> None:
    case = random_case(*shape, n_planes, n_tokens=2)
    np.testing.assert_array_equal(case.native("dot_blocks", isa), expected_dot(case))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("n_planes", [1, 2, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_many_tokens_products_are_those_of_the_stated_tile_bit_for_bit(
    isa: str, n_planes: int, shape: tuple[int, int]
) -> None:
    case = random_case(*shape, n_planes, n_tokens=9)
    np.testing.assert_array_equal(case.native("multiply_blocks", isa), expected_product(case))
