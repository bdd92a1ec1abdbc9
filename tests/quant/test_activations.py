import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quant.activations import (
    SCALE_COLUMNS,
    SILENCE,
    hadamard_in_order,
    round_activations,
)
from quant.layout import BLOCK_COLUMNS, round_up
from quant.transform import hadamard_size, transform_activations

WIDTHS = st.integers(1, 4) | st.integers(1, 700) | st.sampled_from([2048, 2880])
SEEDS = st.integers(0, 2**32 - 1)


def unlike_columns(n_tokens: int, n_in: int, seed: int) -> tuple[Tensor, Tensor]:
    """Activations a thousandfold apart, and signs with factors, as channel_factors gives."""
    generator = torch.Generator().manual_seed(seed)
    loudness = 10 ** (3 * torch.rand(n_in, generator=generator))
    x = torch.randn(n_tokens, n_in, generator=generator) * loudness
    return x, (torch.randn(n_in, generator=generator).sign() / loudness).half()


@settings(deadline=None, max_examples=60)
@given(n_in=WIDTHS, seed=SEEDS)
def test_no_activation_moves_by_more_than_half_a_step(n_in: int, seed: int) -> None:
    x, d = unlike_columns(3, n_in, seed)
    rounded = round_activations(x, d)
    turned = hadamard_in_order(x * d.float())
    scales = rounded.scales.repeat_interleave(SCALE_COLUMNS, 1)[:, :n_in]
    moved = (rounded.values()[:, :n_in].double() - turned.double()).abs()
    # Half a step; x' times 127 / amax, and code times scale, are up to 127 with 2 roundings each.
    assert (moved <= scales.double() * (0.5 + 127 * 4 * 2.0**-24)).all()


@settings(deadline=None, max_examples=60)
@given(n_in=WIDTHS, seed=SEEDS)
def test_the_ordered_transform_is_that_of_the_weights(n_in: int, seed: int) -> None:
    x, d = unlike_columns(3, n_in, seed)
    found, wanted = hadamard_in_order(x * d.float()), transform_activations(x, d)
    size = hadamard_size(n_in)
    blocks = (x * d.float()).view(3, -1, size).abs().sum(2) / size**0.5
    # Each side is off by `size` roundings of the sum of the block's magnitudes at most.
    bound = 2 * (size + 2) * 2.0**-24 * blocks.repeat_interleave(size, 1)
    assert ((found - wanted).abs() <= bound).all()


@settings(deadline=None, max_examples=60)
@given(n_in=WIDTHS, seed=SEEDS)
def test_codes_fill_their_range_and_are_summed(n_in: int, seed: int) -> None:
    rounded = round_activations(*unlike_columns(2, n_in, seed))
    padded = round_up(n_in, BLOCK_COLUMNS)
    assert rounded.codes.shape == (2, padded)
    assert rounded.scales.shape == (2, -(-n_in // SCALE_COLUMNS))
    assert not rounded.codes[:, n_in:].any()
    blocks = rounded.codes.view(2, -1, BLOCK_COLUMNS)
    assert torch.equal(rounded.sums.long(), blocks.long().sum(2))
    for group in rounded.codes.split(SCALE_COLUMNS, 1):
        assert (group.int().abs().amax(1) == 127).all()


def test_ties_go_to_the_even_code() -> None:
    # With one column in 3 the transform does nothing, and 127 makes the steps 1.
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]])
    codes = round_activations(x, torch.ones(7).half()).codes
    assert codes[0, :7].tolist() == [127, 0, 2, 2, 0, -2, -2]


def test_a_silent_group_is_zero_and_disturbs_no_other() -> None:
    x = torch.randn(1, 384, generator=torch.Generator().manual_seed(0))
    x[:, 128:256] = SILENCE / 256  # 128 of them add up to less than SILENCE
    x[:, 256:] = 0
    rounded = round_activations(x, torch.ones(384).half())
    assert rounded.scales[0, 0] > 0
    assert rounded.scales[0, 1:].tolist() == [0, 0]
    assert not rounded.codes[:, 128:].any()


def test_what_is_not_finite_makes_its_group_nan() -> None:
    for bad in (float("nan"), float("inf"), -float("inf")):
        x = torch.ones(1, 256)
        x[0, 200] = bad
        rounded = round_activations(x, torch.ones(256).half())
        assert rounded.scales.isnan().tolist() == [[False, True]]
        assert not rounded.codes[:, 128:].any()
        assert rounded.values()[:, 128:].isnan().all()
