"""Rows of the embedding, norms and rounding, emulated, against quant/."""

from typing import Any

import pytest
import torch
from torch import Tensor

from quant.activations import round_activations
from quant.matrix import TrellisMatrix
from tests.cuda_emulator.emulated import ORDERS, EmulatedLaunch
from tests.cuda_ext import oracle, samples

EPSILON = 1e-6
# (tokens, columns): whole groups, half a group more, Hadamard blocks of every size down to 1, one
# and two groups for a warp, more than a block's warps keep.
SHAPES = [(1, 4096), (3, 192), (2, 130), (4, 33), (2, 4), (3, 1), (1, 6144), (2, 8256), (70, 64)]


@pytest.fixture
def op(emulated: EmulatedLaunch) -> Any:
    """torch.ops.lowmoe, whose names mypy cannot know."""
    return torch.ops.lowmoe


def rounded(op: Any, x: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    codes, scales = samples.empty_rounded(*x.shape)
    op.round_tokens(x, d, codes, scales)
    return codes, scales


def normed(op: Any, x: Tensor, weight: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    normed, (codes, scales) = torch.full_like(x, torch.nan), samples.empty_rounded(*x.shape)
    op.norm_round(x, weight, EPSILON, d, normed, codes, scales)
    return normed, codes, scales


def assert_rounds_as_quant(x: Tensor, d: Tensor, codes: Tensor, scales: Tensor) -> None:
    wanted = round_activations(x, d)
    assert torch.equal(codes, wanted.codes)
    assert torch.equal(scales.view(torch.int32), wanted.scales.view(torch.int32))


@pytest.mark.parametrize(("n_tokens", "n_columns"), SHAPES)
def test_tokens_round_to_the_bits_of_quant(op: Any, n_tokens: int, n_columns: int) -> None:
    x, d = samples.random_tokens(n_tokens, n_columns), samples.random_d(n_columns, seed=1)
    assert_rounds_as_quant(x, d, *rounded(op, x, d))


def test_numbers_at_every_edge_round_to_the_bits_of_quant(op: Any) -> None:
    x = torch.randn(9, 128, generator=samples.numbers(1))
    x[0] = 0
    x[1] *= 2.0**-103  # some of its sums are louder than silence, the largest magnitude is not
    x[2] *= 2.0**-90
    x[3, 5], x[4, 7] = torch.inf, torch.nan
    x[5] *= 1e38  # the transform overflows
    x[6] = 0
    x[6, 0] = 2.0**-100 * 128**0.5  # as loud as silence ends
    x[7] = torch.arange(128) % 2 * 2.0 - 1  # one loud column after the transform
    x[8] *= 2.0**-140
    d = torch.ones(128, dtype=torch.float16)
    codes, scales = rounded(op, x, d)
    wanted = round_activations(x, d)
    assert torch.equal(codes, wanted.codes)
    torch.testing.assert_close(scales, wanted.scales, rtol=0, atol=0, equal_nan=True)
    assert scales[3:5].isnan().all()
    assert not codes[3:5].any()


def test_ties_round_to_even(op: Any) -> None:
    # One column a Hadamard block, so nothing is turned: 127 / amax is 1, and codes are halves.
    x = torch.arange(65.0)[None] / 2
    x[0, 64] = 127
    codes, scales = rounded(op, x, torch.ones(65, dtype=torch.float16))
    assert torch.equal(codes[0, :65], x[0].round().to(torch.int8))  # torch's ties go to even too
    assert scales[0, 0] == 1


@pytest.mark.parametrize(("n_tokens", "n_columns"), SHAPES)
def test_a_norm_is_the_exact_one_and_its_rounding_quants(
    op: Any, n_tokens: int, n_columns: int
) -> None:
    x, d = samples.random_tokens(n_tokens, n_columns), samples.random_d(n_columns, seed=1)
    weight = samples.random_d(n_columns, seed=2).float()
    found, codes, scales = normed(op, x, weight, d)
    wanted = torch.empty_like(x)
    oracle.norm_round(x, weight, EPSILON, d, wanted, *samples.empty_rounded(*x.shape))
    # The sum of squares adds at most 12 numbers in a lane and 10 times pairs of sums; a root halves
    # its relative error, and six roundings follow: 17 of 2^-24.
    torch.testing.assert_close(found, wanted, rtol=17 * 2.0**-24, atol=0)
    assert_rounds_as_quant(found, d, codes, scales)


def test_a_norm_may_be_of_tokens_wider_than_a_block_keeps(op: Any) -> None:
    x, d = samples.random_tokens(1, 16384 + 96), samples.random_d(16384 + 96)
    found, codes, scales = normed(op, x, torch.ones(16384 + 96), d)
    wanted = x / x.double().square().mean().add(EPSILON).sqrt()
    torch.testing.assert_close(found, wanted.float(), rtol=25 * 2.0**-24, atol=0)
    assert_rounds_as_quant(found, d, codes, scales)


def test_a_norm_that_nobody_wants_is_not_written(op: Any) -> None:
    x, weight, d = samples.random_tokens(2, 320), torch.ones(320), samples.random_d(320)
    _, *wanted = normed(op, x, weight, d)
    codes, scales = samples.empty_rounded(2, 320)
    op.norm_round(x, weight, EPSILON, d, torch.empty(0), codes, scales)
    assert torch.equal(codes, wanted[0])
    assert torch.equal(scales, wanted[1])


def test_one_infinite_number_leaves_its_token_without_meaning_and_others_alone(op: Any) -> None:
    x = samples.random_tokens(2, 256)
    x[0, 3] = torch.inf
    found, codes, scales = normed(op, x, torch.ones(256), samples.random_d(256))
    assert found[0, 3].isnan()
    assert scales[0, 0].isnan()
    assert not codes[0, :128].any()
    assert found[1].isfinite().all()
    assert scales[1].isfinite().all()


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize(("n_tokens", "n_inner"), [(1, 1408), (3, 192), (2, 130), (9, 33), (4, 4)])
def test_gate_and_up_are_activated_weighed_and_rounded(
    op: Any, n_tokens: int, n_inner: int, weighed: bool
) -> None:
    generator = samples.numbers(n_inner)
    gate_up = 2 * torch.randn(n_tokens, 2 * n_inner, generator=generator)
    normed = torch.randn(n_tokens, 201, generator=generator)
    router = torch.randn(1, 201, generator=generator) / 14 if weighed else None
    d = samples.random_d(n_inner)
    for kind in ((1.0, 0.0, torch.inf), (1.702, 1.0, 0.9)):
        found, wanted = (samples.empty_rounded(n_tokens, n_inner) for _ in range(2))
        for run, to in ((op, found), (oracle, wanted)):
            run.gate_round(gate_up, *kind, normed, router, d, *to)
        # Some 12 roundings and powers, and the score's; Hadamard's sums of up to 128 such.
        torch.testing.assert_close(found[1], wanted[1], rtol=128 * 20 * 2.0**-24, atol=0)
        moved = (found[0].int() - wanted[0].int()).abs()
        assert moved.max() <= 1  # what is near the middle between two codes may go to either
        assert (moved > 0).float().mean() < 0.005


def test_a_number_that_is_none_is_not_activated_away(op: Any) -> None:
    gate_up = torch.ones(2, 256)
    gate_up[0, 3], gate_up[1, 200] = torch.nan, torch.nan
    codes, scales = samples.empty_rounded(2, 128)
    d = torch.ones(128, dtype=torch.float16)
    op.gate_round(gate_up, 1.0, 0.0, 0.5, torch.ones(2, 8), None, d, codes, scales)
    assert scales.isnan().all()


def embedded(op: Any, ids: list[int], matrix: TrellisMatrix) -> Tensor:
    x = torch.full((len(ids), matrix.layout.n_in), torch.nan)
    rows, planes = torch.tensor(ids, dtype=torch.int32), list(matrix.planes)
    op.embed(rows, planes, samples.TABLE, samples.SCALE_UNIT, matrix.d, x)
    return x


@pytest.mark.parametrize("n_planes", [1, 2, 3])
@pytest.mark.parametrize(
    ("n_rows", "n_columns"), [(200, 128), (65, 576), (64, 70), (130, 1), (3, 36)]
)
def test_rows_of_the_embedding_are_those_of_the_matrix(
    op: Any, n_planes: int, n_rows: int, n_columns: int
) -> None:
    matrix = samples.random_matrix(n_rows, n_columns, n_planes, seed=n_columns)
    ids = [0, n_rows - 1, n_rows // 2, 7 % n_rows, n_rows - 1]
    wanted = matrix.rows(torch.tensor(ids))
    # Both round each plane's weights three times and add them up, sum 128 of them in 7 steps, and
    # multiply three times: 16 roundings of sums that are at most those of the magnitudes.
    loudest = matrix.transformed().abs().max() * 128**0.5 * matrix.d.float().abs().max()
    torch.testing.assert_close(
        embedded(op, ids, matrix), wanted, rtol=0, atol=float(2 * 16 * 2.0**-24 * loudest)
    )


def test_the_order_of_threads_changes_no_bit(op: Any, emulated: EmulatedLaunch) -> None:
    x, weight, d = samples.random_tokens(2, 4416), torch.ones(4416), samples.random_d(4416)
    matrix = samples.random_matrix(64, 320, 2)
    results = []
    for order in (*ORDERS, ORDERS[0]):
        emulated.order = order
        results.append([*normed(op, x, weight, d), *rounded(op, x, d), embedded(op, [3], matrix)])
    for found in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found, results[0], strict=True))
