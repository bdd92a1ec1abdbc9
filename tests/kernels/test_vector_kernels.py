"""The native kernels on plain float vectors, beside torch in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowmoe.decoder import norm, rope
from lowmoe.kernels.cpu import _native

ISAS = _native.isas()
SIZES = st.integers(1, 200) | st.sampled_from([2048, 4096])
SEEDS = st.integers(0, 2**32 - 1)
HALF_ULP = 2.0**-24  # of 1; what one rounding changes, relatively, at most


def sum_roundings(n: int) -> int:
    """The most roundings that any term of a sum of n products goes through.

    At least 4 sums are made side by side and added up in pairs: at most n / 4 additions in each,
    6 to add up 64 lanes, and one for the product where there is no fma.
    """
    return n // 4 + 7


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("isa", ISAS)
@settings(deadline=None, max_examples=60)
@given(n=SIZES, seed=SEEDS)
def test_rms_norm_is_that_of_the_reference(isa: str, n: int, seed: int) -> None:
    x, weight = 10 * random(2, n, seed=seed)
    y = torch.empty(n)
    _native.rms_norm(isa, x, weight, 1e-5, y)
    mean_square = x.double().square().mean()
    wanted = x.double() / (mean_square + 1e-5).sqrt() * weight
    # The root halves the sum's error; mean, epsilon, root, quotient and two products add theirs.
    bound = (sum_roundings(n) / 2 + 6) * HALF_ULP * wanted.abs()
    assert ((y - wanted).abs() <= bound).all()
    reference = norm.rms_norm(x[None], weight, 1e-5)[0]
    assert ((y - reference).abs() <= 2 * bound).all()  # torch adds up in at least as many sums


@pytest.mark.parametrize("isa", ISAS)
def test_rms_norm_may_overwrite_its_input(isa: str) -> None:
    x, weight = random(2, 100, seed=0)
    y, same = torch.empty(100), x.clone()
    _native.rms_norm(isa, x, weight, 1e-6, y)
    _native.rms_norm(isa, same, weight, 1e-6, same)
    assert torch.equal(same, y)


@pytest.mark.parametrize("isa", ISAS)
@settings(deadline=None, max_examples=60)
@given(n=SIZES, seed=SEEDS, mean=st.sampled_from([0.0, 3.0]))
def test_layer_norm_is_torchs(isa: str, n: int, seed: int, mean: float) -> None:
    x, weight = random(2, n, seed=seed)
    x += mean
    y, same = torch.empty(n), x.clone()
    _native.layer_norm(isa, x, weight, 1e-2, y)
    wanted = F.layer_norm(x.double(), (n,), weight.double(), None, 1e-2)
    # As of the RMS norm; and the mean, off by its sum's roundings, is taken from every number
    # before what is left is divided by its deviation, at least the root of epsilon.
    spread = float((x.double().var(correction=0) + 1e-2).sqrt())
    off = (
        (sum_roundings(n) + 2) * HALF_ULP * float(x.double().abs().mean() + x.abs().max()) / spread
    )
    bound = (sum_roundings(n) / 2 + 8) * HALF_ULP * wanted.abs() + off * (
        weight.abs() + wanted.abs()
    )
    assert ((y - wanted).abs() <= bound).all()
    _native.layer_norm(isa, same, weight, 1e-2, same)
    assert torch.equal(same, y)


@pytest.mark.parametrize("isa", ISAS)
@settings(deadline=None, max_examples=60)
@given(
    size=st.integers(1, 80) | st.sampled_from([128, 512]),
    n_rows=st.integers(1, 70),
    n_tokens=st.integers(1, 9),
    seed=SEEDS,
)
def test_products_with_int8_rows_are_those_with_what_the_rows_say(
    isa: str, size: int, n_rows: int, n_tokens: int, seed: int
) -> None:
    x, weights = random(n_tokens, size, seed=seed), random(n_rows, size, seed=seed + 1)
    rows = torch.zeros(n_rows, _native.head_bytes(2, size), dtype=torch.uint8)
    for row, weight in zip(rows, weights, strict=True):
        _native.store_head(isa, 2, weight, row)
    y = torch.full((n_tokens, n_rows), torch.nan)
    _native.multiply_rows(isa, x, rows, y)
    codes = rows[:, :size].view(torch.int8).double()
    said = codes * rows[:, -4:].contiguous().view(torch.float32)
    bound = (sum_roundings(size) + 2) * HALF_ULP * (x.double().abs() @ said.abs().T)
    assert ((y - x.double() @ said.T).abs() <= bound).all()


def silu_multiplied(isa: str, gate: Tensor, up: Tensor) -> Tensor:
    y = torch.empty_like(gate)
    _native.silu_multiply(isa, gate, up, y)
    return y


@pytest.mark.parametrize("isa", ISAS)
@settings(deadline=None, max_examples=60)
@given(n=SIZES, seed=SEEDS, spread=st.sampled_from([1e-3, 1.0, 30.0]))
def test_silu_is_torchs(isa: str, n: int, seed: int, spread: float) -> None:
    gate, up = random(2, n, seed=seed)
    gate = gate * spread
    wanted = F.silu(gate.double()) * up
    # exp is off by an ulp, 2 half ones; the sum, the quotient and the product add one each. Below
    # -88.7 exp overflows and silu is 0 instead of less than 3e-37.
    bound = 6 * HALF_ULP * wanted.abs() + 3e-37 * up.abs()
    assert ((silu_multiplied(isa, gate, up) - wanted).abs() <= bound).all()


@pytest.mark.parametrize("isa", ISAS)
def test_silu_neither_overflows_nor_hides_nan(isa: str) -> None:
    far = torch.tensor([0.0, -0.0, 100.0, -100.0, 1e30, -1e30, 3e38, -3e38])
    found = silu_multiplied(isa, far, torch.ones(8))
    assert torch.equal(found, far.clamp_min(0.0))
    for place in (0, 16, 20):  # a whole register, and what is left over
        gate, up = torch.ones(2, 21)
        gate[place] = float("nan")
        for y in (silu_multiplied(isa, gate, up), silu_multiplied(isa, up, gate)):
            assert y.isnan().nonzero().flatten().tolist() == [place]


@pytest.mark.parametrize("isa", ISAS)
def test_silu_may_overwrite_its_gate(isa: str) -> None:
    gate, up = random(2, 100, seed=0)
    wanted = silu_multiplied(isa, gate, up)
    _native.silu_multiply(isa, gate, up, gate)
    assert torch.equal(gate, wanted)


@pytest.mark.parametrize("isa", ISAS)
@settings(deadline=None, max_examples=60)
@given(n=SIZES, seed=SEEDS)
def test_a_dot_product_is_off_by_its_roundings_only(isa: str, n: int, seed: int) -> None:
    a, b = random(2, n, seed=seed)
    terms = a.double() * b.double()
    bound = sum_roundings(n) * HALF_ULP * terms.abs().sum()
    assert abs(_native.dot(isa, a, b) - terms.sum()) <= bound


@pytest.mark.parametrize("isa", ISAS)
@settings(deadline=None, max_examples=60)
@given(n=SIZES, seed=SEEDS)
def test_a_scaled_vector_is_added(isa: str, n: int, seed: int) -> None:
    x, y = random(2, n, seed=seed)
    wanted = y.double() + torch.tensor(0.3).double() * x
    bound = HALF_ULP * (y.abs() + x.abs())  # of the product and of the sum
    _native.add_scaled(isa, x, 0.3, y)
    assert ((y - wanted).abs() <= 2 * bound).all()


@pytest.mark.parametrize("isa", ISAS)
@settings(deadline=None, max_examples=40)
@given(n_rows=st.integers(1, 40), n_columns=st.integers(1, 150), corrects=st.booleans(), seed=SEEDS)
def test_a_state_decays_is_added_to_and_read(
    isa: str, n_rows: int, n_columns: int, corrects: bool, seed: int
) -> None:
    query, key = random(2, n_rows, seed=seed) * n_rows**-0.5
    value = random(n_columns, seed=seed + 1)
    before = random(n_rows, n_columns, seed=seed + 2)
    wide = [x.double() for x in (query, key, value, before)]
    known = 0.7 * wide[1] @ wide[3] if corrects else 0.0
    wanted = 0.7 * wide[3] + torch.outer(wide[1], 0.9 * (wide[2] - known))
    out, found = torch.empty(n_columns), before.clone()
    _native.step_state(isa, query, key, value, 0.7, 0.9, corrects, found.view(-1), out)
    # Sums of at most 40 products of numbers up to 4, one of them inside the other.
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=2e-5)
    torch.testing.assert_close(out.double(), wide[0] @ wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("isa", ISAS)
@settings(deadline=None, max_examples=40)
@given(half=st.integers(1, 80), position=st.integers(0, 100_000), seed=SEEDS)
def test_a_head_is_turned_as_the_decoder_turns_it(
    isa: str, half: int, position: int, seed: int
) -> None:
    head = random(2 * half, seed=seed)
    generator = torch.Generator().manual_seed(position)
    angles = 6.3 * torch.rand(half, generator=generator)
    both = torch.cat([angles, angles])[None]
    wanted = rope.rotate(head[None, None], both.cos(), both.sin())[0, 0]
    found = head.clone()
    _native.rotate(isa, found, angles.cos(), angles.sin())
    # Two products and their sum on either side; neither is larger than both halves together.
    size = (head.view(2, half).abs().sum(0)).repeat(2)
    assert ((found - wanted).abs() <= 6 * HALF_ULP * size).all()


def test_an_instruction_set_that_is_not_here_is_refused() -> None:
    with pytest.raises(ValueError, match="no code for mmx"):
        _native.dot("mmx", torch.ones(2), torch.ones(2))


def test_arrays_that_do_not_fit_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="a and b differ in size"):
        _native.dot("scalar", torch.ones(2), torch.ones(3))
