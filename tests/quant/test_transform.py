import math

import pytest
import torch

from quant.transform import (
    CHANNEL_SCALE_LIMIT,
    channel_factors,
    hadamard_matrix,
    hadamard_size,
    restore_weights,
    transform_activations,
    transform_weights,
)

WIDTHS = [(1, 1), (3, 1), (7, 1), (64, 64), (96, 32), (128, 128), (200, 8), (4096, 128)]


@pytest.mark.parametrize(("n_in", "size"), WIDTHS)
def test_blocks_are_the_largest_power_of_two_that_divides_the_width(n_in: int, size: int) -> None:
    assert hadamard_size(n_in) == size


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16, 32, 64, 128])
def test_a_hadamard_entry_is_the_parity_of_what_its_row_and_column_have_in_common(
    size: int,
) -> None:
    signs = [[(-1) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
    wanted = torch.tensor(signs, dtype=torch.float64) / math.sqrt(size)
    torch.testing.assert_close(hadamard_matrix(size).double(), wanted, rtol=2**-23, atol=0)


@pytest.mark.parametrize("size", [1, 2, 8, 64, 128])
def test_the_hadamard_matrix_is_orthonormal_and_symmetric(size: int) -> None:
    matrix = hadamard_matrix(size)
    assert torch.equal(matrix, matrix.T)
    # Rows are exactly orthogonal; only 1 / sqrt(size) rounds, twice in each product.
    torch.testing.assert_close(
        matrix.double() @ matrix.double(), torch.eye(size).double(), rtol=0, atol=2**-22
    )


def unlike_channels(n_in: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights [5, n_in], activations [4, n_in] and d [n_in] of channels a thousandfold apart."""
    generator = torch.Generator().manual_seed(n_in)
    loudness = 10 ** (3 * torch.rand(n_in, generator=generator))
    weights = torch.randn(5, n_in, generator=generator)
    x = torch.randn(4, n_in, generator=generator) * loudness
    rms = weights.square().mean(0).sqrt()
    return weights, x, channel_factors(loudness, rms, seed=n_in)


@pytest.mark.parametrize(("n_in", "size"), WIDTHS)
def test_transformed_weights_times_transformed_activations_are_the_original_product(
    n_in: int, size: int
) -> None:
    weights, x, d = unlike_channels(n_in)
    coded, moved = transform_weights(weights, d), transform_activations(x, d)
    assert coded.shape == weights.shape
    assert moved.shape == x.shape
    # The dot product of n rounded terms is off by at most n * 2^-24 * |a| |b|: size for each
    # Hadamard transform, n_in for the product (here in float64), 4 for d and 1 / sqrt(size).
    bound = (2 * size + 4) * 2**-24 * moved.norm(dim=1)[:, None] * coded.norm(dim=1)
    error = (moved.double() @ coded.double().T - x.double() @ weights.double().T).abs()
    assert (error <= bound).all()


@pytest.mark.parametrize(("n_in", "size"), WIDTHS)
def test_restoring_transformed_weights_gives_them_back(n_in: int, size: int) -> None:
    weights, _, d = unlike_channels(n_in)
    coded = transform_weights(weights, d)
    error = (restore_weights(coded, d) - weights).abs()
    assert (error <= rounding_bound(coded, d, size)).all()


def rounding_bound(coded: torch.Tensor, d: torch.Tensor, size: int) -> torch.Tensor:
    """As above, with the norm of the block a weight shares its transform with, times its own d."""
    norms = coded.reshape(coded.shape[0], -1, size).norm(dim=2).repeat_interleave(size, dim=1)
    bound: torch.Tensor = (2 * size + 4) * 2**-24 * norms * d.float().abs()
    return bound


def test_a_batch_of_any_rank_is_transformed_along_its_last_dimension() -> None:
    _, x, d = unlike_channels(96)
    together = transform_activations(x.view(2, 2, 96), d)
    assert torch.equal(together.view(4, 96), transform_activations(x, d))


def test_no_change_of_channel_scales_lowers_the_output_error() -> None:
    # What d is chosen for: (sum w^2 c^2) * (sum a^2 / c^2), by Cauchy-Schwarz at least
    # (sum w a)^2, with equality where c^2 is proportional to a / w.
    generator = torch.Generator().manual_seed(0)
    a = 10 ** torch.rand(256, generator=generator).double()
    w = 10 ** torch.rand(256, generator=generator).double()

    def product(c: torch.Tensor) -> float:
        return float((w * c).square().sum() * (a / c).square().sum())

    c = 1 / channel_factors(a, w, seed=0).abs().double()
    # d is rounded to 11 bits; a stationary point feels that to second order only.
    assert product(c) == pytest.approx(float((w * a).sum()) ** 2, rel=2**-20)
    for spread in (0.003, 0.1, 1.0):
        for _ in range(50):
            change = (spread * torch.randn(256, generator=generator)).exp()
            assert product(c * change) > product(c)


def test_channel_factors_ignore_the_units_of_activations_and_of_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    a, w = torch.rand(2, 64, generator=generator) + 0.1
    d = channel_factors(a, w, seed=1)
    # Only the logarithms' last bits may move a float16 to its neighbour.
    torch.testing.assert_close(channel_factors(4096 * a, w / 1024, seed=1), d, rtol=2**-10, atol=0)


def test_signs_are_fair_and_come_from_the_seed_alone() -> None:
    ones = torch.ones(4096)
    d = channel_factors(None, ones, seed=1)
    assert d.dtype == torch.float16
    assert torch.equal(d.abs(), ones.half())
    assert abs(float(d.float().sum())) < 5 * math.sqrt(4096)  # 5 standard deviations of a fair coin
    assert torch.equal(d, channel_factors(torch.rand(4096) + 1, ones, seed=1).sign())
    assert not torch.equal(d, channel_factors(None, ones, seed=2))


def test_silent_and_deafening_channels_keep_a_finite_weight() -> None:
    a, w = torch.ones(128), torch.ones(128)
    a[0], a[1], w[2], w[3] = 0.0, 1e30, 0.0, 1e30
    d = channel_factors(a, w, seed=0).abs().float()
    limit = CHANNEL_SCALE_LIMIT
    wanted = torch.tensor([limit, 1 / limit, 1 / limit, limit, 1.0])
    torch.testing.assert_close(d[:5], wanted, rtol=2**-10, atol=0)  # float16, and exp of a log
    coded = transform_weights(torch.ones(3, 128), d)
    assert ((restore_weights(coded, d) - 1).abs() <= rounding_bound(coded, d, 128)).all()
