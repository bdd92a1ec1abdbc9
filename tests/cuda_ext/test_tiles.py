"""Products of many tokens: the same bits as the CPU's tiles, and near what quant/ says."""

import pytest
import torch
from torch import Tensor

from cuda_ext.launches import COUNTER_BYTES, tiles
from quant.activations import SCALE_COLUMNS, round_activations
from quant.layout import PlaneLayout
from quant.trellis import gain, group_scales, row_scales
from tests.cuda_emulator.emulated import ORDERS, EmulatedLaunch
from tests.cuda_ext import oracle
from tests.cuda_ext.cpu_tiles import FEWEST_TOKENS, cpu_tiles, workspace
from tests.cuda_ext.samples import (
    SCALE_UNIT,
    TABLE,
    numbers,
    random_matrix,
    random_rounded,
    random_tokens,
)

MOST_PLANES = 3
SHAPES = (  # tokens, rows, columns
    (FEWEST_TOKENS, 64, 64),
    (31, 1, 129),  # one column in the second scale group
    (33, 300, 192),  # a second block of rows, half a scale group
    (50, 129, 500),  # padded columns
    (150, 256, 256),  # a second tile of tokens
)


def run_linear(
    codes: Tensor,
    scales: Tensor,
    planes: tuple[Tensor, ...],
    layout: PlaneLayout,
    y: Tensor,
) -> None:
    torch.ops.lowmoe.linear(
        codes, scales, list(planes), TABLE, SCALE_UNIT, layout.n_out, layout.n_in, None, False, y,
        workspace(),
    )  # fmt: skip


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("n_planes", range(1, MOST_PLANES + 1))
@pytest.mark.parametrize(("n_tokens", "n_out", "n_in"), SHAPES)
def test_a_product_is_the_cpus_bit_for_bit(
    emulated: EmulatedLaunch, n_tokens: int, n_out: int, n_in: int, n_planes: int, order: int
) -> None:
    emulated.order, emulated.n_multiprocessors = order, 1  # that has nobody to share a tile with
    matrix = random_matrix(n_out, n_in, n_planes, seed=n_out)
    codes, scales = random_rounded(n_tokens, n_in, seed=n_tokens)
    y = torch.full((n_tokens + 1, n_out), torch.nan)  # the last row is nobody's
    run_linear(codes, scales, matrix.planes, matrix.layout, y[:n_tokens])
    expected = cpu_tiles(matrix.planes, matrix.layout, codes, scales)[:, :n_out]
    assert torch.equal(y[:n_tokens], expected)
    assert y[n_tokens].isnan().all()


@pytest.mark.parametrize("n_planes", range(1, MOST_PLANES + 1))
def test_a_product_is_as_near_to_that_of_the_planes_as_rounding_them_to_int8_allows(
    emulated: EmulatedLaunch, n_planes: int
) -> None:
    matrix = random_matrix(70, 300, n_planes)
    codes, scales = random_rounded(40, 300)
    y = torch.empty(40, 70)
    run_linear(codes, scales, matrix.planes, matrix.layout, y)
    exact = torch.empty(40, 70, dtype=torch.float64)
    oracle.linear(
        codes, scales, matrix.planes, TABLE, SCALE_UNIT, 70, 300, None, False, exact, workspace()
    )
    # In the unit of a scale group's weights, a weight is off by at most half of one for its code
    # and, for each plane, half of 1 / 128 for its share times a value of at most 63; and the sums
    # in float32 of a row's three groups by less than 1e-6 of the sum of their terms.
    steps = weight_steps(matrix.planes, matrix.layout)  # [70, groups]
    loudness = oracle.values_of(codes, scales).abs()
    by_group = torch.nn.functional.pad(loudness, (0, -loudness.shape[1] % SCALE_COLUMNS))
    by_group = by_group.view(40, -1, SCALE_COLUMNS).sum(2)
    each = 0.5 + n_planes * 63 / 256
    allowed = by_group @ (steps * (each + 1e-6 * 127)).T
    assert ((y - exact).abs() <= allowed).all()


def weight_steps(planes: tuple[Tensor, ...], layout: PlaneLayout) -> Tensor:
    """What 1 in a tile's code stands for, [n_out, scale groups] float64."""
    loud = torch.zeros(layout.padded_rows, layout.column_blocks, dtype=torch.float64)
    for plane in planes:
        loud += group_scales(plane, layout).double() * row_scales(plane, layout).double()[:, None]
    halves = torch.nn.functional.pad(loud, (0, layout.column_blocks % 2))
    bound = halves.view(layout.padded_rows, -1, 2).amax(2)[: layout.n_out]
    return bound * (SCALE_UNIT * gain(planes[-1], layout) * 128 / 255)


def test_a_product_is_added_to_what_is_there(emulated: EmulatedLaunch) -> None:
    emulated.n_multiprocessors = 1
    matrix = random_matrix(130, 256, 2)
    codes, scales = random_rounded(20, 256)
    before = torch.randn(20, 130, generator=numbers(1))
    y = before.clone()
    torch.ops.lowmoe.linear(
        codes, scales, list(matrix.planes), TABLE, SCALE_UNIT, 130, 256, None, True, y, workspace()
    )
    product = cpu_tiles(matrix.planes, matrix.layout, codes, scales)[:, :130]
    assert torch.equal(y, before + product)


@pytest.mark.parametrize("n_multiprocessors", [1, 9])  # of 9, some would idle and share columns
@pytest.mark.parametrize("n_planes", range(1, MOST_PLANES + 1))
def test_a_bias_is_added_once(
    emulated: EmulatedLaunch, n_planes: int, n_multiprocessors: int
) -> None:
    emulated.n_multiprocessors = n_multiprocessors
    matrix = random_matrix(300, 500, n_planes)
    codes, scales = random_rounded(20, 500)
    bias = torch.randn(300, generator=numbers(1))
    y = torch.empty(20, 300)
    space = workspace(n_multiprocessors=n_multiprocessors)
    torch.ops.lowmoe.linear(
        codes, scales, list(matrix.planes), TABLE, SCALE_UNIT, 300, 500, bias, False, y, space
    )
    product = cpu_tiles(matrix.planes, matrix.layout, codes, scales)[:, :300]
    # Sums begin with the bias, or its part's do: each of 4 scale groups, and the parts' sums, may
    # be rounded otherwise, by half a unit in the last place of what is at most 4 times the largest.
    allowed = 2 * 5 * 2.0**-24 * 4 * float(product.abs().max() + bias.abs().max())
    torch.testing.assert_close(y, product + bias, rtol=0, atol=allowed)


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("order", ORDERS)
def test_multiprocessors_that_would_idle_share_a_tiles_columns(
    emulated: EmulatedLaunch, order: int, add: bool
) -> None:
    emulated.order, emulated.n_multiprocessors = order, 9
    emulated.launched.clear()
    matrix = random_matrix(300, 1100, 2)  # two tiles of rows, nine scale groups
    codes, scales = random_rounded(40, 1100)
    before = torch.randn(40, 300, generator=numbers(1))
    y = before.clone()
    space = workspace(n_multiprocessors=9)
    torch.ops.lowmoe.linear(
        codes, scales, list(matrix.planes), TABLE, SCALE_UNIT, 300, 1100, None, add, y, space
    )
    assert emulated.launched == {"tiles_2/linear_128", "tiles/add_parts"}
    expected = cpu_tiles(matrix.planes, matrix.layout, codes, scales)[:, :300]
    # The same terms in another order. A term is what a scale group adds, of which a product and a
    # sum are rounded, here and there: nine and a few more units in the last place of their sum.
    loudness = oracle.values_of(codes, scales).abs()
    by_group = torch.nn.functional.pad(loudness, (0, -loudness.shape[1] % SCALE_COLUMNS))
    by_group = by_group.view(40, -1, SCALE_COLUMNS).sum(2)
    terms = by_group @ (127 * weight_steps(matrix.planes, matrix.layout)).T
    if add:
        expected, terms = before + expected, before.abs() + terms
    assert ((y - expected).abs() <= 2 * (9 + 4) * 2.0**-24 * terms).all()
    assert not space[:COUNTER_BYTES].any()


def test_tiles_are_small_where_that_is_sooner_done(emulated: EmulatedLaunch) -> None:
    matrix = random_matrix(64, 64, 1)  # one scale group, so nothing to share
    codes, scales = random_rounded(64, 64)
    for n_multiprocessors, tokens in ((1, 128), (64, 32)):
        emulated.n_multiprocessors = n_multiprocessors
        emulated.launched.clear()
        y = torch.empty(64, 64)
        run_linear(codes, scales, matrix.planes, matrix.layout, y)
        assert emulated.launched == {f"tiles_1/linear_{tokens}"}
        assert torch.equal(y, cpu_tiles(matrix.planes, matrix.layout, codes, scales))


def test_an_infinite_token_is_nan_and_alone(emulated: EmulatedLaunch) -> None:
    x = random_tokens(16, 128)
    x[5, 3] = torch.inf
    rounded = round_activations(x, torch.ones(128).half())
    matrix = random_matrix(64, 128, 1)
    y = torch.empty(16, 64)
    run_linear(rounded.codes, rounded.scales, matrix.planes, matrix.layout, y)
    assert y.isnan().all(1).tolist() == [t == 5 for t in range(16)]


@pytest.mark.parametrize("n_planes", range(1, MOST_PLANES + 1))
def test_every_instance_fits_the_shared_memory_of_a_4090(n_planes: int) -> None:
    # 99 KiB for a block on compute capability 8.6, 8.9 and 12.0 (CUDA C++ Programming Guide, table
    # of technical specifications); find_tile has up to 16 bytes of it.
    for each in tiles.TOKENS:
        assert tiles._shared_bytes(n_planes, each) + 16 <= 99 * 1024


def test_small_tiles_fit_a_multiprocessor_of_an_h100_twice() -> None:
    # 228 KiB, of which each block takes 1 KiB for the system. Two planes: with three, registers
    # leave no room for a second block.
    assert 2 * (tiles._shared_bytes(2, min(tiles.TOKENS)) + 1040) <= 228 * 1024
