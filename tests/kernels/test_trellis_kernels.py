from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from lowmoe.kernels.cpu import _native
from quant import trellis
from quant.encode import encode_planes
from quant.layout import BLOCK_COLUMNS, PlaneLayout
from quant.transform import channel_factors
from quant.trellis import DEFAULT_CODE, TrellisCode

ISAS = _native.isas()
TABLE_OFFSET = 64
SCALE_COLUMNS = 128
SHARE_SUM = 255
FEW_TOKENS = 8  # multiply_block multiplies them as dot_block does

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

    def arguments(self) -> dict[str, object]:
        """What both kernels take, but for the instruction set and where the results go."""
        return {
            "planes": self.planes,
            "n_out": self.layout.n_out,
            "n_in": self.layout.n_in,
            "table": native_table(self.code),
            "scale_unit": self.code.scale_unit,
            "codes": self.codes,
            "scales": self.scales,
            "sums": sums_of(self.codes),
            "first_block": 0,
        }

    def native(self, kernel: str, isa: str, tokens: slice = slice(None)) -> Floats:
        """What a kernel makes of some tokens, [T, padded_rows]."""
        codes, scales = self.codes[tokens], self.scales[tokens]
        y = np.full((len(codes), self.rows), np.nan, np.float32)
        these = {"isa": isa, "codes": codes, "scales": scales, "sums": sums_of(codes), "y": y}
        getattr(_native, kernel)(**(self.arguments() | these))
        return y


def sums_of(codes: NDArray[np.int8]) -> NDArray[np.int32]:
    """Of each 64 columns, [T, column_blocks]."""
    return codes.reshape(len(codes), -1, BLOCK_COLUMNS).sum(-1, dtype=np.int32)


def native_table(code: TrellisCode) -> NDArray[np.uint8]:
    """64 values + 64: a narrower window's are repeated, so that bits above it change nothing."""
    values = np.array(code.table * (64 // len(code.table)))
    return (values + TABLE_OFFSET).astype(np.uint8)


def set_region(plane: Tensor, start: int, values: NDArray[np.generic]) -> None:
    plane[start : start + values.nbytes] = torch.from_numpy(values.view(np.uint8))


def random_planes(layout: PlaneLayout, n_planes: int, rng: np.random.Generator) -> list[Tensor]:
    """Any bits are a plane, but for the scales and the gain."""
    planes = []
    for p in range(n_planes):
        plane = torch.from_numpy(rng.integers(0, 256, layout.plane_bytes, np.uint8)).clone()
        row_scales = 0.28**p * rng.uniform(0.01, 1, layout.padded_rows)
        set_region(plane, layout.row_scale_offset, row_scales.astype(np.float16))
        set_region(plane, layout.gain_offset, np.array([1.0 + 0.01 * p], np.float32))
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
        parts.append(
            nibbles * trellis.row_scales(plane, layout).numpy().astype(np.float32)[:, None]
        )
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


def assert_as_stated(case: Case, isa: str) -> None:
    """Both kernels do what their headers say, bit for bit, for few tokens and for all."""
    exact = expected_dot(case)
    np.testing.assert_array_equal(case.native("dot_blocks", isa), exact)
    few = case.native("multiply_blocks", isa, slice(FEW_TOKENS))
    np.testing.assert_array_equal(few, exact[:FEW_TOKENS])
    assert len(case.codes) > FEW_TOKENS
    np.testing.assert_array_equal(case.native("multiply_blocks", isa), expected_product(case))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("n_planes", [1, 2, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_the_stated_ones_bit_for_bit(
    isa: str, n_planes: int, shape: tuple[int, int]
) -> None:
    assert_as_stated(random_case(*shape, n_planes, n_tokens=9), isa)


@settings(max_examples=40, deadline=None)
@given(
    n_out=st.integers(1, 130),
    n_in=st.integers(1, 400),
    n_planes=st.integers(1, 3),
    n_tokens=st.integers(1, 20),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_instruction_set_says_the_same(
    n_out: int, n_in: int, n_planes: int, n_tokens: int, seed: int
) -> None:
    case = random_case(n_out, n_in, n_planes, n_tokens, seed=seed)
    for kernel in ("dot_blocks", "multiply_blocks"):
        first = case.native(kernel, ISAS[0])
        for isa in ISAS[1:]:
            np.testing.assert_array_equal(case.native(kernel, isa), first)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("pattern", ["alike", "alternating"])
def test_the_largest_sums_are_exact(isa: str, sign: int, pattern: str) -> None:
    """Every table value and code at its limit: 15 * 63 * 127 * 128 is just below 2^24, and all
    the sums of two products that AVX2 holds in 16 bits are the largest there are."""
    values = (63,) * 64 if pattern == "alike" else (63, -63) * 32
    code = TrellisCode(table=tuple(sign * value for value in values))
    case = random_case(64, 256, 2, 9, code=code)
    case.codes[:] = 127
    case.codes[1] = -127
    case.codes[2, ::2] = -127
    for plane in case.planes:
        layout = case.layout
        plane[layout.group_scale_offset : layout.row_scale_offset] = 255  # nibbles of 15
    assert_as_stated(case, isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("window_bits", [4, 5])
def test_a_narrower_window_s_table_repeated_gives_its_weights(isa: str, window_bits: int) -> None:
    rng = np.random.default_rng(3)
    table = tuple(rng.integers(-63, 64, 2**window_bits).tolist())
    code = TrellisCode(window_bits=window_bits, table=table)
    assert_as_stated(random_case(64, 192, 2, 9, code=code), isa)


@pytest.mark.parametrize("isa", ISAS)
def test_groups_and_rows_of_scale_0_give_0(isa: str) -> None:
    case = random_case(64, 256, 2, 9)
    layout = case.layout
    for plane in case.planes:
        plane[layout.group_scale_offset : layout.row_scale_offset] = 0
        plane[layout.group_scale_offset + 40] = 7  # row 8 of columns 64 to 127
        row_scales = np.arange(layout.padded_rows, dtype=np.float16)
        set_region(plane, layout.row_scale_offset, row_scales)
    assert_as_stated(case, isa)
    case.scales[:] = 1
    y = case.native("multiply_blocks", isa)
    assert (y[:, 8] != 0).all()
    assert (np.delete(y, 8, axis=1) == 0).all()


@pytest.mark.parametrize("isa", ISAS)
def test_subnormal_row_scales_count(isa: str) -> None:
    case = random_case(64, 128, 1, 9)
    tiny = np.arange(64, dtype=np.uint16).view(np.float16)  # multiples of 2^-24
    set_region(case.planes[0], case.layout.row_scale_offset, tiny)
    assert_as_stated(case, isa)


@pytest.mark.parametrize("isa", ISAS)
def test_a_token_s_products_do_not_depend_on_which_come_with_it(isa: str) -> None:
    """Registers hold 4 or 6 tokens at a time, so 13 are cut in several ways."""
    case = random_case(64, 320, 3, n_tokens=13)
    of_tiles = case.native("multiply_blocks", isa)
    exact = case.native("dot_blocks", isa)
    for first in range(13):
        for last in range(first + 1, 14):
            some = case.native("multiply_blocks", isa, slice(first, last))
            expected = exact if last - first <= FEW_TOKENS else of_tiles
            np.testing.assert_array_equal(some, expected[first:last])


@pytest.mark.parametrize("isa", ISAS)
def test_row_blocks_can_be_had_one_by_one(isa: str) -> None:
    case = random_case(256, 128, 2, 2)
    for kernel in ("dot_blocks", "multiply_blocks"):
        of_two = np.zeros((2, 128), np.float32)
        these = {"isa": isa, "first_block": 1, "y": of_two}
        getattr(_native, kernel)(**(case.arguments() | these))
        np.testing.assert_array_equal(of_two, case.native(kernel, isa)[:, 64:192])


# What trellis_tile.h promises, relative to the energy of the weights, for 1 to 3 planes.
TILE_ERRORS = [2.9e-5, 7.5e-5, 8.7e-5]


@pytest.mark.parametrize("n_planes", [1, 2, 3])
def test_a_tile_s_weights_are_nearly_the_planes(n_planes: int) -> None:
    """Tokens that are columns of the unit matrix show the weights a tile stands for."""
    n_out, n_in = 64, 512
    layout = PlaneLayout(n_out, n_in)
    weights = torch.randn(n_out, n_in, generator=torch.Generator().manual_seed(0))
    d = channel_factors(None, torch.ones(n_in), seed=0)
    planes = encode_planes(weights, d, layout, DEFAULT_CODE, n_planes)
    case = Case(
        layout=layout,
        code=DEFAULT_CODE,
        planes=[plane.clone() for plane in planes],
        codes=np.eye(n_in, dtype=np.int8),
        scales=np.ones((n_in, n_in // SCALE_COLUMNS), np.float32),
    )
    found = case.native("multiply_blocks", ISAS[0]).T
    meant = trellis.decode_planes(tuple(planes), layout, DEFAULT_CODE).numpy()
    meant = meant * trellis.gain(planes[-1], layout)
    wrong = found - meant
    # A code is rounded by 1/2 at most; a share by 1/2, of which 2^7 times a table value of 63
    # makes 63 / 256. Both in units of the tile's scale; 1e-3 covers what float32 rounds.
    _, scales = expected_tile(case)
    limit = (0.5 + n_planes * 63 / 256 + 1e-3) * scales.repeat(SCALE_COLUMNS, 1)
    assert (np.abs(wrong) <= limit).all()
    assert (wrong**2).sum() / (meant**2).sum() < TILE_ERRORS[n_planes - 1]


@pytest.mark.parametrize("kernel", ["dot_blocks", "multiply_blocks"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"isa": "mmx"}, "no code for mmx on this processor"),
        ({"n_in": 192}, r"a plane has \d+ bytes, but must have \d+"),
        ({"planes": []}, "0 planes, but a stack has 1 to 3"),
        ({"table": np.ones(32, np.uint8)}, "the table has 32 values, but must have 64"),
        ({"codes": np.zeros((2, 64), np.int8)}, r"codes is \[2, 64\], but must be \[2, 128\]"),
        ({"scales": np.ones((1, 1), np.float32)}, r"scales is \[1, 1\], but must be \[2, 1\]"),
        ({"sums": np.ones((2, 1), np.int32)}, r"sums is \[2, 1\], but must be \[2, 2\]"),
        ({"y": np.ones((2, 192), np.float32)}, "y has rows up to 192, but the matrix 128"),
        ({"first_block": 1}, "y has rows up to 192, but the matrix 128"),
        ({"first_block": 2**58}, "the matrix 128"),
        ({"y": np.ones((2, 96), np.float32)}, r"y is \[2, 96\], but must be \[2, 64\]"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(
    kernel: str, change: dict[str, object], message: str
) -> None:
    case = random_case(128, 128, 1, 2)
    arguments = case.arguments() | {"isa": ISAS[-1], "y": np.zeros((2, 128), np.float32)}
    with pytest.raises(ValueError, match=message):
        getattr(_native, kernel)(**(arguments | change))


def test_a_plane_that_is_not_aligned_is_refused() -> None:
    case = random_case(64, 64, 1)
    longer = torch.zeros(case.layout.plane_bytes + 1, dtype=torch.uint8)
    case.planes[0] = longer[1:]
    with pytest.raises(ValueError, match="aligned to 64 bytes"):
        case.native("dot_blocks", ISAS[0])
