"""Tokens and cached heads rounded by the native kernels: the bits that quant and torch give."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowmoe.kernels.cpu import _native
from quant.activations import SCALE_COLUMNS, SILENCE, RoundedActivations, round_activations
from quant.layout import BLOCK_COLUMNS, round_up

ISAS = _native.isas()
WIDTHS = st.integers(1, 4) | st.integers(1, 700) | st.sampled_from([2048, 2880])
SEEDS = st.integers(0, 2**32 - 1)
FLOAT16, INT8 = 1, 2


def empty_token(n_in: int) -> RoundedActivations:
    """What one token is rounded into, filled with what no rounding gives."""
    padded, groups = round_up(n_in, BLOCK_COLUMNS), -(-n_in // SCALE_COLUMNS)
    return RoundedActivations(
        torch.full((1, padded), -128, dtype=torch.int8),
        torch.full((1, groups), -1.0),
        torch.full((1, padded // BLOCK_COLUMNS), 2**30, dtype=torch.int32),
    )


def round_columns(isa: str, x: Tensor, d: Tensor, first: int, to: RoundedActivations) -> None:
    arrays = (to.codes[0], to.scales[0], to.sums[0])
    _native.round_token(isa, x, d.view(torch.uint16), first, *arrays)


def rounded_by(isa: str, x: Tensor, d: Tensor) -> RoundedActivations:
    """x: [n_in]."""
    to = empty_token(d.shape[0])
    round_columns(isa, x, d, 0, to)
    return to


def assert_same_bits(found: RoundedActivations, wanted: RoundedActivations) -> None:
    assert torch.equal(found.codes, wanted.codes)
    assert torch.equal(found.sums, wanted.sums)
    assert torch.equal(found.scales.isnan(), wanted.scales.isnan())
    assert torch.equal(found.scales.nan_to_num(-2), wanted.scales.nan_to_num(-2))


def loud_and_quiet(n_in: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n_in, generator=generator) * 10 ** (6 * torch.rand(n_in, generator=generator))
    return x, torch.randn(n_in, generator=generator).half()


@pytest.mark.parametrize("isa", ISAS)
@settings(deadline=None, max_examples=100)
@given(n_in=WIDTHS, seed=SEEDS)
def test_a_rounded_token_has_the_bits_that_quant_gives(isa: str, n_in: int, seed: int) -> None:
    x, d = loud_and_quiet(n_in, seed)
    assert_same_bits(rounded_by(isa, x, d), round_activations(x[None], d))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size", [1e-45, 1e-40, SILENCE / 2, SILENCE, 1e-25, 1e30, 3e38])
def test_so_has_one_that_is_hardly_there_or_overflows(isa: str, size: float) -> None:
    x, d = loud_and_quiet(320, 0)
    x = x.sign() * size
    assert_same_bits(rounded_by(isa, x, d), round_activations(x[None], d))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("column", [0, 130, 299])
def test_what_is_not_finite_makes_its_scale_nan(isa: str, bad: float, column: int) -> None:
    x, d = loud_and_quiet(300, 1)
    x[column] = bad
    found = rounded_by(isa, x, d)
    assert_same_bits(found, round_activations(x[None], d))
    assert found.scales[0].isnan().tolist() == [i == column // 128 for i in range(3)]


@pytest.mark.parametrize("isa", ISAS)
@settings(deadline=None, max_examples=40)
@given(n_in=WIDTHS, seed=SEEDS, data=st.data())
def test_some_columns_can_be_rounded_alone(
    isa: str, n_in: int, seed: int, data: st.DataObject
) -> None:
    x, d = loud_and_quiet(n_in, seed)
    groups = -(-n_in // SCALE_COLUMNS)
    first = data.draw(st.integers(0, groups - 1))
    last = data.draw(st.integers(first + 1, groups))
    begin, end = first * SCALE_COLUMNS, min(last * SCALE_COLUMNS, n_in)
    to, wanted = empty_token(n_in), empty_token(n_in)
    round_columns(isa, x[begin:end], d, begin, to)
    whole = round_activations(x[None], d)
    wanted.codes[:, begin : last * 128] = whole.codes[:, begin : last * 128]
    wanted.scales[:, first:last] = whole.scales[:, first:last]
    wanted.sums[:, 2 * first : 2 * last] = whole.sums[:, 2 * first : 2 * last]
    assert_same_bits(to, wanted)


def stored(isa: str, form: int, head: Tensor) -> Tensor:
    to = torch.full((_native.head_bytes(form, head.shape[0]),), 0xA5, dtype=torch.uint8)
    _native.store_head(isa, form, head, to)
    return to


@pytest.mark.parametrize("isa", ISAS)
def test_every_float16_is_stored_as_itself(isa: str) -> None:
    halves = torch.arange(2**16).to(torch.uint16).view(torch.float16)
    found = stored(isa, FLOAT16, halves.float()).view(torch.float16)
    assert torch.equal(found.isnan(), halves.isnan())
    same = found.view(torch.int16) == halves.view(torch.int16)
    assert (same | halves.isnan()).all()


@pytest.mark.parametrize("isa", ISAS)
def test_a_float32_is_stored_as_the_float16_that_torch_rounds_it_to(isa: str) -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (2**16,), generator=generator, dtype=torch.int64)
    anywhere = bits.to(torch.int32).view(torch.float32).nan_to_num()
    halves = torch.arange(0x7BFF).to(torch.uint16).view(torch.float16).float()
    steps = torch.arange(1, 0x7C00).to(torch.uint16).view(torch.float16).float() - halves
    ties = halves + steps / 2  # exact
    edge = torch.tensor([65504.0, 65519.996, 65520.0, 65536.0, float("inf"), -0.0])
    x = torch.cat([anywhere, ties, -ties, ties.nextafter(ties + 1), edge])
    found = stored(isa, FLOAT16, x).view(torch.int16)
    assert torch.equal(found, x.half().view(torch.int16))


@pytest.mark.parametrize("isa", ISAS)
@settings(deadline=None, max_examples=60)
@given(size=st.integers(1, 200), seed=SEEDS)
def test_an_int8_head_is_codes_and_one_scale(isa: str, size: int, seed: int) -> None:
    head = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 3
    found = stored(isa, INT8, head)
    assert found.shape == (round_up(size, 4) + 4,)
    amax, most = head.abs().amax(), torch.tensor(127.0)
    codes = (head * (most / amax)).round().to(torch.int8)
    assert torch.equal(found[:size].view(torch.int8), codes)
    assert not found[size:-4].any()
    assert torch.equal(found[-4:].view(torch.float32), (amax / most)[None])


@pytest.mark.parametrize("isa", ISAS)
def test_an_int8_head_that_is_silent_is_zero_and_one_that_is_not_finite_is_nan(isa: str) -> None:
    for size in (4, 21, 64):
        silent = torch.full((size,), SILENCE / 2)
        assert not stored(isa, INT8, silent).any()
        for bad in (float("nan"), -float("inf")):
            broken = torch.ones(size)
            broken[-1] = bad
            found = stored(isa, INT8, broken)
            assert not found[:-4].any()
            assert found[-4:].view(torch.float32).isnan().all()
