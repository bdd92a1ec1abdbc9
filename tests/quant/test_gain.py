import struct

import pytest
import torch
from torch import Tensor

from quant.damage import relative_squared_error
from quant.encode import encode_planes
from quant.layout import PlaneLayout
from quant.matrix import TrellisMatrix, dequantize
from quant.transform import (
    channel_factors,
    hadamard_size,
    restore_weights,
    transform_activations,
    transform_weights,
)
from quant.trellis import TrellisCode, decode_planes, gain

CODE = TrellisCode()
# Hadamard blocks of 128, two of 128, 32, 8 and none; only the first two fill their last group.
WIDTHS = [128, 256, 96, 200, 97]


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stack_of(weights: Tensor, d: Tensor, covariance: Tensor | None) -> TrellisMatrix:
    layout = PlaneLayout(*weights.shape)
    return TrellisMatrix(
        layout, CODE, tuple(encode_planes(weights, d, layout, CODE, 3, covariance)), d
    )


def first_planes(matrix: TrellisMatrix, n_planes: int) -> TrellisMatrix:
    return TrellisMatrix(matrix.layout, matrix.code, matrix.planes[:n_planes], matrix.d)


def some_factors(n_in: int) -> Tensor:
    """Signs and channel scales that differ by up to 3."""
    loudness = torch.rand(n_in, generator=torch.Generator().manual_seed(n_in)) + 0.1
    return channel_factors(loudness, torch.ones(n_in), seed=n_in)


def inputs_of_one_block_each(n_in: int) -> Tensor:
    """[T, n_in] correlated inside Hadamard blocks; a different block each, so never across."""
    size = hadamard_size(n_in)
    n_blocks = n_in // size
    mixed = randn(n_blocks, 2 * size, size, seed=1) @ randn(n_blocks, size, size, seed=2)
    x = torch.zeros(n_blocks, 2 * size, n_blocks, size)
    for block in range(n_blocks):
        x[block, :, block] = mixed[block]
    return x.view(-1, n_in)


def covariance_of(x: Tensor) -> Tensor:
    """E[x x^T] inside each Hadamard block, [blocks, h, h] float32."""
    size = hadamard_size(x.shape[1])
    blocks = x.double().view(x.shape[0], -1, size).transpose(0, 1)
    return (blocks.transpose(1, 2) @ blocks / x.shape[0]).float()


def projection(weights: Tensor, matrix: TrellisMatrix, x: Tensor) -> float:
    """<W x, coded W x> / <W x, W x> over all inputs x [T, n_in]."""
    exact = x.double() @ weights.double().T
    coded = transform_activations(x, matrix.d).double() @ matrix.transformed().double().T
    return float((exact * coded).sum() / exact.square().sum())


# Roundings of float32 in products of up to 128 terms and in d H, on both sides: 2^-24 * 256.
ROUNDED = 2**-16


@pytest.mark.parametrize("n_in", WIDTHS[:4])  # blocks too small for feedback ignore covariances
def test_the_coded_output_is_as_strong_as_the_exact_one_at_every_depth(n_in: int) -> None:
    weights, d, x = randn(130, n_in, seed=3), some_factors(n_in), inputs_of_one_block_each(n_in)
    matrix = stack_of(weights, d, covariance_of(x))
    for n_planes in (1, 2, 3):
        found = projection(weights, first_planes(matrix, n_planes), x)
        assert found == pytest.approx(1, abs=ROUNDED)


@pytest.mark.parametrize("n_in", WIDTHS)
def test_without_a_covariance_it_is_as_strong_for_inputs_white_in_the_basis_of_the_codes(
    n_in: int,
) -> None:
    weights, d = randn(130, n_in, seed=4), some_factors(n_in)
    x = restore_weights(torch.eye(n_in), 1 / d)  # H (d * x) runs through the units
    matrix = stack_of(weights, d, None)
    for n_planes in (1, 2, 3):
        found = projection(weights, first_planes(matrix, n_planes), x)
        assert found == pytest.approx(1, abs=ROUNDED)


def test_undoing_the_loss_of_strength_costs_no_more_than_its_square() -> None:
    weights, d = randn(256, 512, seed=5), some_factors(512)
    matrix = stack_of(weights, d, None)
    exact = transform_weights(weights, d)
    for n_planes in (1, 2, 3):
        part = first_planes(matrix, n_planes)
        error = relative_squared_error(decode_planes(part.planes, part.layout, CODE), exact)
        # Where the error is orthogonal to the code, D becomes D / (1 - D). Under a stack that is
        # nearly so: later planes take a little from what the first ones coded.
        found = relative_squared_error(part.transformed(), exact)
        assert error < found < 1.02 * error / (1 - error)
        assert part.gain > 1


def test_one_plane_of_error_d_is_raised_by_1_over_1_minus_d() -> None:
    weights, d = randn(256, 512, seed=5), some_factors(512)
    one = first_planes(stack_of(weights, d, None), 1)
    exact = transform_weights(weights, d)
    error = relative_squared_error(decode_planes(one.planes, one.layout, CODE), exact)
    # Scales of least squares leave an error orthogonal to the code; their 11 bits cost little.
    assert one.gain - 1 == pytest.approx(error / (1 - error), rel=0.01)


@pytest.mark.parametrize("n_planes", [1, 2, 3])
def test_the_last_plane_that_is_there_says_the_gain(n_planes: int) -> None:
    matrix = stack_of(randn(130, 70, seed=6), some_factors(70), None)
    for plane, power in zip(matrix.planes, (2.0, 4.0, 8.0), strict=True):
        plane[matrix.layout.gain_offset :][:4] = torch.tensor([power]).view(torch.uint8)
    part = first_planes(matrix, n_planes)
    assert part.gain == 2.0**n_planes
    plain = decode_planes(part.planes, matrix.layout, CODE)[:130, :70]
    assert torch.equal(part.transformed(), 2**n_planes * plain)  # powers of two round nothing
    restored = 2**n_planes * restore_weights(plain, matrix.d)
    assert torch.equal(dequantize(part), restored)
    row_ids = torch.tensor([129, 0, 64])
    assert torch.equal(part.rows(row_ids), restored[row_ids])


def test_what_follows_the_gain_is_zero_so_that_files_are_reproducible() -> None:
    matrix = stack_of(randn(64, 128, seed=7), some_factors(128), None)
    for plane in matrix.planes:
        region = bytes(plane[matrix.layout.gain_offset :].numpy())
        assert struct.unpack("<f", region[:4]) == (gain(plane, matrix.layout),)
        assert region[4:] == bytes(60)


def test_a_matrix_of_zeros_has_gain_1() -> None:
    matrix = stack_of(torch.zeros(64, 64), torch.ones(64).half(), None)
    assert [gain(plane, matrix.layout) for plane in matrix.planes] == [1.0, 1.0, 1.0]
