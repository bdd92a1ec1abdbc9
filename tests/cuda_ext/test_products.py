"""Products of up to 8 tokens: linear, experts_inner, experts_down, against plain torch."""

import math

import pytest
import torch
from torch import Tensor

from cuda_ext.launches import COUNTER_BYTES, products
from quant.layout import PlaneLayout
from quant.matrix import TrellisMatrix
from tests.cuda_emulator.emulated import ORDERS, SHUFFLED, EmulatedLaunch
from tests.cuda_ext import oracle, samples
from tests.cuda_ext.samples import SCALE_UNIT, TABLE, Experts, Groups

OPS = torch.ops.lowmoe
ROUNDING = 2.0**-24  # of one operation in float32, relative
# Multiprocessors: shares that cut runs and strips anywhere, or more blocks than cells.
CARDS = (1, 3, 37)


def workspace(n_bytes: int = 1 << 20) -> Tensor:
    return torch.zeros(n_bytes, dtype=torch.uint8)


def bound(codes: Tensor, scales: Tensor, matrix: TrellisMatrix) -> Tensor:
    """How far float32 may be from the exact product, [T, n_out].

    A number on its way into y is rounded once for each cell that is added after it, which are at
    most all of the row's, where it meets its row's scale (3: scale_unit * gain, times the scale,
    times the sum), in the sums of 8 warps and of the blocks, at most one for each cell again, and
    in y itself. Twice the first order bounds what follows.
    """
    layout, n_planes = matrix.layout, len(matrix.planes)
    n_roundings = 2 * layout.column_blocks * n_planes + 8 + 3 + 2
    loud = oracle.values_of(codes, scales).abs()
    sums = sum(
        loud @ oracle.weights_of((plane,), layout, matrix.code).abs().T for plane in matrix.planes
    )
    gains = [oracle.gain(plane, layout) for plane in matrix.planes]
    return 2 * n_roundings * ROUNDING * max(gains) / min(gains) * sums


def check_linear(
    n_tokens: int,
    n_out: int,
    n_in: int,
    n_planes: int,
    *,
    add: bool = False,
    has_bias: bool = False,
    seed: int = 0,
) -> Tensor:
    matrix = samples.random_matrix(n_out, n_in, n_planes, seed=seed)
    rounded = samples.random_rounded(n_tokens, n_in, seed=seed)
    before = torch.randn(n_tokens, n_out, generator=samples.numbers(seed))
    y = before.clone() if add else torch.full_like(before, torch.nan)
    expected = before.clone()
    space = workspace()
    bias = torch.randn(n_out, generator=samples.numbers(seed + 1)) if has_bias else None
    operands = (*rounded, list(matrix.planes), TABLE, SCALE_UNIT, n_out, n_in, bias, add)
    OPS.linear(*operands, y, space)
    oracle.linear(*operands, expected, space)
    limit = bound(*rounded, matrix) + (2 * ROUNDING * before.abs().double() if add else 0)
    limit += 0 if bias is None else 2 * ROUNDING * bias.abs()
    assert ((y.double() - expected.double()).abs() <= limit + ROUNDING * expected.abs()).all()
    assert not space[:COUNTER_BYTES].any(), "the counters are for the next launch"
    return y


@pytest.mark.parametrize("n_planes", [1, 2, 3])
@pytest.mark.parametrize("n_tokens", range(1, 9))
def test_every_number_of_tokens_and_planes_gives_the_product(
    emulated: EmulatedLaunch, n_tokens: int, n_planes: int
) -> None:
    check_linear(
        n_tokens, 200, 320, n_planes, add=n_tokens % 2 == 0, has_bias=n_tokens > 2, seed=n_tokens
    )
    room = 4 if n_tokens <= 4 else 8
    assert f"linear/linear_{room}" in emulated.launched


@pytest.mark.parametrize(
    ("n_out", "n_in"),
    [(1, 1), (3, 64), (64, 65), (65, 128), (128, 127), (129, 200), (192, 1024), (640, 700)],
)
def test_edges_of_blocks_strips_and_scale_groups_are_where_they_are(
    emulated: EmulatedLaunch, n_out: int, n_in: int
) -> None:
    check_linear(3, n_out, n_in, 2, seed=n_out)


@pytest.mark.parametrize("n_multiprocessors", CARDS)
@pytest.mark.parametrize("order", ORDERS)
def test_shares_may_end_anywhere_and_blocks_come_in_any_order(
    emulated: EmulatedLaunch, order: int, n_multiprocessors: int
) -> None:
    emulated.order, emulated.n_multiprocessors = order, n_multiprocessors
    check_linear(2, 300, 832, 2, seed=order % 5)
    check_linear(7, 450, 192, 3, seed=order % 7)


def test_the_same_launch_gives_the_same_bits_in_any_order(emulated: EmulatedLaunch) -> None:
    emulated.n_multiprocessors = 5
    found = []
    for order in (*ORDERS, SHUFFLED + 1):
        emulated.order = order
        found.append(check_linear(3, 333, 600, 2))
    assert all(torch.equal(found[0], y) for y in found)


def test_a_token_gives_the_same_bits_whoever_comes_along(emulated: EmulatedLaunch) -> None:
    matrix = samples.random_matrix(200, 512, 2)
    codes, scales = samples.random_rounded(8, 512)
    y = torch.empty(8, 200)
    alone = torch.empty(1, 200)
    operands = (list(matrix.planes), TABLE, SCALE_UNIT, 200, 512, None, False)
    OPS.linear(codes, scales, *operands, y, workspace())
    for token in range(8):
        one = slice(token, token + 1)
        OPS.linear(codes[one].clone(), scales[one].clone(), *operands, alone, workspace())
        assert torch.equal(alone[0], y[token])


def test_integers_are_exact_where_weights_and_codes_are_as_large_as_they_can_be(
    emulated: EmulatedLaunch,
) -> None:
    # All windows of a word of ones are 63, of which the table makes 63; codes of 127; nibbles of
    # 15: nibble * sum is 15 * 64 * 63 * 127, and every product and sum of these powers of two and
    # integers below 2^24 is exact in float32. Two tokens, one of them negative.
    layout, n_in = PlaneLayout(64, 64), 64
    plane = torch.full((layout.plane_bytes,), 255, dtype=torch.uint8)
    plane[layout.row_scale_offset : layout.gain_offset].view(torch.float16).fill_(0.5)
    plane[layout.gain_offset :][:4].view(torch.float32).fill_(2.0)
    table = torch.full((64,), 63, dtype=torch.int8)
    codes = torch.tensor([[127], [-127]], dtype=torch.int8).repeat(1, n_in)
    scales = torch.full((2, 1), 0.25)
    y = torch.empty(2, 64)
    OPS.linear(codes, scales, [plane], table, 0.5, 64, n_in, None, False, y, workspace())
    assert torch.equal(y[0], torch.full((64,), 15 * 64 * 63 * 127 * 0.25 * 0.5))
    assert torch.equal(y[1], -y[0])


def test_every_weight_of_a_block_meets_its_own_column_and_row(emulated: EmulatedLaunch) -> None:
    # A token that is 0 but for one code of 1 reads out a column: 8 columns at once.
    matrix = samples.random_matrix(128, 128, 1)
    weights = oracle.weights_of(matrix.planes, matrix.layout, matrix.code)
    scales = torch.ones(8, 1)
    for first in range(0, 128, 8):
        codes = torch.zeros(8, 128, dtype=torch.int8)
        codes[range(8), range(first, first + 8)] = 1
        y = torch.empty(8, 128)
        operands = (list(matrix.planes), TABLE, SCALE_UNIT, 128, 128, None, False)
        OPS.linear(codes, scales, *operands, y, workspace())
        expected = weights[:, first : first + 8].T
        # scale_unit * gain, times the row's scale, times the integer: three roundings.
        assert ((y - expected).abs() <= 3 * ROUNDING * expected.abs() * 1.01).all()


def test_a_token_that_is_not_finite_gives_no_number_and_spoils_no_other(
    emulated: EmulatedLaunch,
) -> None:
    matrix = samples.random_matrix(128, 256, 1)
    codes, scales = samples.random_rounded(5, 256)
    codes[1], scales[1] = 0, torch.nan
    y = torch.empty(5, 128)
    OPS.linear(
        codes, scales, list(matrix.planes), TABLE, SCALE_UNIT, 128, 256, None, False, y, workspace()
    )
    assert y[1].isnan().all()
    assert y[[0, 2, 3, 4]].isfinite().all()


PLAIN = (None, 1.0, 0.0, math.inf)  # no biases, SwiGLU
Kind = tuple[Tensor | None, float, float, float]


def inner_of(
    experts: Experts,
    groups: Groups,
    rounded: tuple[Tensor, Tensor],
    space: Tensor,
    kind: Kind = PLAIN,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Codes and scales of each place: by the kernel, and by the oracle."""
    format, n_active = experts.format, groups.ids.shape[1]
    found, expected = (
        samples.empty_rounded(groups.order.shape[0], format.n_inner) for _ in range(2)
    )
    operands = (*rounded, *operands_of(experts, groups), experts.d_inner, *kind)
    sizes = (format.n_hidden, n_active)
    OPS.experts_inner(*operands, *sizes, *found, space)
    oracle.experts_inner(*operands, *sizes, *expected, space)
    return found, expected


def operands_of(experts: Experts, groups: Groups) -> tuple[object, ...]:
    of_groups = (groups.first, groups.order, groups.active)
    return (experts.table, experts.format.n_planes, TABLE, SCALE_UNIT, *of_groups)


def check_experts(
    experts: Experts,
    groups: Groups,
    *,
    kind: Kind = PLAIN,
    down_bias: Tensor | None = None,
    seed: int = 0,
) -> tuple[Tensor, ...]:
    """Both operations; returns what they wrote.  kind: biases of gate and up, the activation."""
    format, n_tokens = experts.format, groups.ids.shape[0]
    rounded = samples.random_rounded(n_tokens, format.n_hidden, seed=seed)
    space = workspace()
    (codes, scales), expected = inner_of(experts, groups, rounded, space, kind)
    # Float32 moves what is rounded by some 1e-6 of the group's largest number, 127 steps, so a code
    # changes by 1 where a number is that close to halfway between two: here and there.
    moved = (codes.int() - expected[0].int()).abs()
    assert moved.max() <= 1
    assert (moved > 0).double().mean() < 1e-3
    torch.testing.assert_close(scales, expected[1], rtol=2e-5, atol=0, equal_nan=True)

    x = torch.randn(n_tokens, format.n_hidden, generator=samples.numbers(seed))
    wanted = x.clone()
    rest = (*operands_of(experts, groups), down_bias, groups.weights, format.n_inner)
    OPS.experts_down(*expected, *rest, x, space)
    oracle.experts_down(*expected, *rest, wanted, space)
    # The bound of `linear` for the longest of these sums is 2e-5 of the sum of magnitudes; here of
    # numbers around 1, whose magnitudes add up to a few.
    torch.testing.assert_close(x, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
    assert not space[:COUNTER_BYTES].any()
    return codes, scales, x


@pytest.mark.parametrize("n_planes", [1, 2, 3])
@pytest.mark.parametrize("n_tokens", [1, 2, 4, 5, 8])
def test_experts_of_some_tokens(emulated: EmulatedLaunch, n_tokens: int, n_planes: int) -> None:
    experts = samples.random_experts(6, 192, 320, n_planes, seed=n_tokens)
    check_experts(experts, samples.random_groups(n_tokens, 6, 2, seed=n_tokens), seed=n_planes)


@pytest.mark.parametrize(
    ("n_hidden", "n_inner"), [(64, 64), (64, 1), (200, 100), (130, 192), (256, 257), (320, 448)]
)
def test_sizes_that_fill_no_block_no_strip_and_no_scale_group(
    emulated: EmulatedLaunch, n_hidden: int, n_inner: int
) -> None:
    experts = samples.random_experts(4, n_hidden, n_inner, 2, seed=n_inner)
    check_experts(experts, samples.random_groups(3, 4, 2, seed=n_inner), seed=n_hidden)


@pytest.mark.parametrize("n_multiprocessors", CARDS)
@pytest.mark.parametrize("order", ORDERS)
def test_units_of_experts_may_be_cut_anywhere(
    emulated: EmulatedLaunch, order: int, n_multiprocessors: int
) -> None:
    emulated.order, emulated.n_multiprocessors = order, n_multiprocessors
    experts = samples.random_experts(5, 256, 384, 2)
    check_experts(experts, samples.random_groups(3, 5, 2, seed=order % 11))


def test_experts_give_the_same_bits_in_any_order(emulated: EmulatedLaunch) -> None:
    emulated.n_multiprocessors = 7
    experts, groups = samples.random_experts(5, 256, 384, 2), samples.random_groups(5, 5, 3)
    found = []
    for order in (*ORDERS, SHUFFLED + 1):
        emulated.order = order
        found.append(check_experts(experts, groups))
    assert all(torch.equal(a, b) for one in found for a, b in zip(found[0], one, strict=True))


def test_all_tokens_may_want_the_same_expert_or_each_its_own(emulated: EmulatedLaunch) -> None:
    experts = samples.random_experts(16, 128, 128, 1)
    weights = torch.full((8, 2), 0.5)
    same = torch.tensor([[3, 9]], dtype=torch.int32).repeat(8, 1)
    check_experts(experts, samples.groups_of_ids(same, weights, 16))
    own = torch.arange(16, dtype=torch.int32).flip(0).view(8, 2)
    check_experts(experts, samples.groups_of_ids(own.contiguous(), weights, 16))


@pytest.mark.parametrize("missing", [(0,), (1, 2), (0, 1, 2, 3)])
def test_experts_that_are_not_here_write_nothing_and_add_nothing(
    emulated: EmulatedLaunch, missing: tuple[int, ...]
) -> None:
    experts = samples.random_experts(4, 192, 192, 2, missing=missing)
    groups = samples.random_groups(5, 4, 2)
    codes, scales, _ = check_experts(experts, groups)
    for expert_id in missing:
        places = slice(int(groups.first[expert_id]), int(groups.first[expert_id + 1]))
        assert (codes[places] == 99).all()  # as samples.empty_rounded left it
        assert scales[places].isnan().all()


@pytest.mark.parametrize("n_inner", [100, 320])
@pytest.mark.parametrize("n_tokens", [1, 7])
def test_experts_may_have_biases_and_another_activation(
    emulated: EmulatedLaunch, n_tokens: int, n_inner: int
) -> None:
    experts = samples.random_experts(5, 200, n_inner, 2, missing=(1,), seed=n_tokens)
    groups = samples.random_groups(n_tokens, 5, 2, seed=n_tokens)
    of_inner = torch.randn(5, 2 * n_inner, generator=samples.numbers(1))
    of_down = torch.randn(5, 200, generator=samples.numbers(2))
    check_experts(experts, groups, kind=(of_inner, 1.702, 1.0, 0.8), down_bias=of_down)
    check_experts(experts, groups, kind=(None, 1.0, 0.0, 0.5))
    check_experts(experts, groups, kind=(of_inner, 1.0, 0.0, math.inf))


def test_more_experts_than_a_warp_has_lanes(emulated: EmulatedLaunch) -> None:
    experts = samples.random_experts(64, 64, 64, 1, missing=(5, 40))
    check_experts(experts, samples.random_groups(8, 64, 8))


def test_what_else_the_workspace_held_does_not_matter(emulated: EmulatedLaunch) -> None:
    emulated.n_multiprocessors = 6
    experts, groups = samples.random_experts(4, 256, 256, 2), samples.random_groups(2, 4, 2)
    rounded = samples.random_rounded(2, 256)
    clean, used = workspace(), workspace()
    used[COUNTER_BYTES:] = 255
    found = [inner_of(experts, groups, rounded, space)[0] for space in (clean, used)]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("n_tokens", [1, 8])
def test_workspace_bytes_are_enough(emulated: EmulatedLaunch, n_tokens: int) -> None:
    n_bytes = products.workspace_bytes(emulated.n_multiprocessors, n_tokens, 256, 384, 2)
    guard = torch.full((n_bytes + 4096,), 7, dtype=torch.uint8)
    space = guard[:n_bytes].zero_()
    experts = samples.random_experts(5, 256, 384, 2)
    groups = samples.random_groups(n_tokens, 5, 2)
    rounded = samples.random_rounded(n_tokens, 256)
    inner_of(experts, groups, rounded, space)
    x = torch.zeros(n_tokens, 256)
    inner = samples.random_rounded(2 * n_tokens, 384)
    OPS.experts_down(*inner, *operands_of(experts, groups), None, groups.weights, 384, x, space)
    matrix = samples.random_matrix(700, 256, 3)
    y = torch.empty(n_tokens, 700)
    operands = (list(matrix.planes), TABLE, SCALE_UNIT, 700, 256, None, False)
    OPS.linear(*rounded, *operands, y, space)
    assert (guard[n_bytes:] == 7).all()


def test_nine_tokens_take_the_tiles(emulated: EmulatedLaunch) -> None:
    emulated.launched.clear()
    matrix = samples.random_matrix(128, 128, 1)
    y = torch.empty(9, 128)
    operands = (list(matrix.planes), TABLE, SCALE_UNIT, 128, 128, None, False)
    OPS.linear(*samples.random_rounded(9, 128), *operands, y, workspace())
    assert emulated.launched
    assert not any(kernel.startswith("linear/") for kernel in emulated.launched)
