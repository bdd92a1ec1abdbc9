import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import quant.encode
import quant.viterbi
from quant import nf4
from quant.damage import relative_squared_error
from quant.encode import ScaleFit, encode_planes
from quant.layout import PlaneLayout
from quant.transform import channel_factors, hadamard_size, restore_weights, transform_weights
from quant.trellis import (
    TrellisCode,
    decode_plane,
    decode_planes,
    gain,
    group_scales,
    row_scales,
    table_values,
)
from quant.viterbi import Trellis

CODE = TrellisCode()
SHAPE = (512, 1024)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def student_t(*shape: int, seed: int = 0) -> Tensor:
    """5 degrees of freedom: tails as heavy as those of trained weights."""
    generator = np.random.default_rng(seed)
    return torch.from_numpy(generator.standard_t(5, shape)).float()


def encoded(weights: Tensor, n_planes: int, covariance: Tensor | None = None) -> list[Tensor]:
    layout, d = PlaneLayout(*weights.shape), torch.ones(weights.shape[1])
    return encode_planes(weights, d, layout, CODE, n_planes, covariance)


def some_covariance(n_in: int) -> Tensor:
    """[blocks, h, h] of channels alike in neighbours: .9 to the power of their distance."""
    size = hadamard_size(n_in)
    at = torch.arange(size)
    return (0.9 ** (at[:, None] - at).abs()).expand(n_in // size, size, size)


def coded(weights: Tensor, n_planes: int) -> Tensor:
    """What comes back, in the basis it is coded in and with its padding."""
    return decode_planes(tuple(encoded(weights, n_planes)), PlaneLayout(*weights.shape), CODE)


def wanted(weights: Tensor) -> Tensor:
    """What should come back.  A matrix of odd width is coded as it is."""
    return transform_weights(weights, torch.ones(weights.shape[1]))


# The error of weights


@functools.lru_cache(maxsize=2)
def errors_of_one_to_three_planes(name: str) -> list[float]:
    weights = {"gaussian": gaussian, "student_t": student_t}[name](*SHAPE, seed=1)
    d = channel_factors(None, torch.ones(SHAPE[1]), seed=1)
    layout = PlaneLayout(*SHAPE)
    planes = tuple(encode_planes(weights, d, layout, CODE, 3))
    decoded = (decode_planes(planes[:n], layout, CODE) for n in (1, 2, 3))
    return [relative_squared_error(restore_weights(w, d), weights) for w in decoded]


@pytest.mark.parametrize("name", ["gaussian", "student_t"])
def test_each_plane_leaves_a_thirteenth_of_the_error_before_it(name: str) -> None:
    # The rate-distortion bound of a Gaussian is 1/16 for each plane of 2 bits. With ideal scales
    # this trellis reaches .0752, .0057, .00044; 4-bit scales and two seams of 16 cost 3 to
    # 9 % of that.
    one, two, three = errors_of_one_to_three_planes(name)
    assert 1 / 16 < one <= 0.079
    assert 1 / 16**2 < two <= 0.0062
    assert 1 / 16**3 < three <= 0.0005


@pytest.mark.parametrize("name", ["gaussian", "student_t"])
def test_two_planes_beat_nf4_at_the_same_bits(name: str) -> None:
    weights = {"gaussian": gaussian, "student_t": student_t}[name](*SHAPE, seed=1)
    nf4_layout = nf4.Nf4Layout(*SHAPE)
    layout = PlaneLayout(*SHAPE)
    peer = relative_squared_error(nf4.decode(nf4.encode(weights), nf4_layout), weights)
    assert 2 * layout.plane_bytes <= 1.01 * nf4_layout.matrix_bytes
    assert peer > 1.3 * errors_of_one_to_three_planes(name)[1]


# The codes


@pytest.mark.parametrize("feedback", [False, True])
def test_the_decoder_reads_what_the_search_chose(feedback: bool) -> None:
    weights, layout = gaussian(128, 192, seed=40), PlaneLayout(128, 192)
    trellis = Trellis.of(CODE)
    stack = quant.encode._Stack.of(weights, trellis, 2)
    if feedback:
        factors = quant.encode.feedback_factors(some_covariance(192))
        before = stack
        stack = stack.with_feedback(weights, trellis, layout, factors)
        assert not torch.equal(stack.windows[0], before.windows[0])
    for windows, scales in zip(stack.windows, stack.scales, strict=True):
        plane = quant.encode._pack(windows, scales, layout)
        values = trellis.values[quant.encode._from_words(windows, 128, 192)]
        wanted = values * scales.products().repeat_interleave(64, dim=1)
        # The same four factors multiplied in another order: three roundings on either side.
        torch.testing.assert_close(decode_plane(plane, layout, CODE), wanted, rtol=2**-21, atol=0)


@pytest.mark.parametrize("chunk_words", [128, 1000, 65536])
@pytest.mark.parametrize("n_in", [192, 300])
def test_the_words_searched_at_once_leave_no_trace(
    monkeypatch: pytest.MonkeyPatch, chunk_words: int, n_in: int
) -> None:
    weights = gaussian(200, n_in, seed=50)
    before = encoded(weights, 2, some_covariance(n_in))
    monkeypatch.setattr(quant.viterbi, "CHUNK_WORDS", chunk_words)
    assert all(map(torch.equal, encoded(weights, 2, some_covariance(n_in)), before))


@pytest.mark.parametrize("chunk_weights", [1, 64 * 320, 2 * 64 * 320])
def test_the_rows_coded_at_once_show_only_in_the_rounding_of_the_gain(
    monkeypatch: pytest.MonkeyPatch, chunk_weights: int
) -> None:
    # 300 = 4 * 75: rotating blocks of 4 rounds alike however many rows there are.
    weights, layout = gaussian(200, 300, seed=52), PlaneLayout(200, 300)
    before = encoded(weights, 2)
    monkeypatch.setattr(quant.encode, "CHUNK_WEIGHTS", chunk_weights)
    rows = 64 * max(1, chunk_weights // (64 * 320))
    chunks = [(first, min(first + rows, 200)) for first in range(0, 200, rows)]
    assert list(quant.encode.row_chunks(layout)) == chunks
    for plane, whole in zip(encoded(weights, 2), before, strict=True):
        assert torch.equal(plane[: layout.gain_offset], whole[: layout.gain_offset])
        # Sums in float64 of numbers that are the same: the float32 may fall to its neighbour.
        assert gain(plane, layout) == pytest.approx(gain(whole, layout), rel=2**-22)


def test_blocks_coded_apart_are_those_coded_together() -> None:
    weights, layout = gaussian(200, 300, seed=51), PlaneLayout(200, 300)
    together = encoded(weights, 2)
    for block in range(layout.row_blocks):
        rows = weights[64 * block : 64 * block + 64]
        for plane, whole in zip(encoded(rows, 2), together, strict=True):
            for part, region in zip(regions(plane, rows), regions(whole, weights), strict=True):
                assert torch.equal(part[0], region[block])


def regions(plane: Tensor, weights: Tensor) -> list[Tensor]:
    """Codes, group scales and row scales, [row_blocks, bytes] each."""
    layout = PlaneLayout(*weights.shape)
    starts = [0, layout.group_scale_offset, layout.row_scale_offset]
    sizes = [layout.code_bytes, layout.group_scale_bytes, layout.row_scale_bytes]
    return [
        plane[s : s + n].view(layout.row_blocks, -1) for s, n in zip(starts, sizes, strict=True)
    ]


# Scales


def test_a_plane_has_the_best_row_scales_for_its_codes() -> None:
    weights, layout = gaussian(64, 257, seed=60), PlaneLayout(64, 257)
    (plane,) = encoded(weights, 1)
    nibbles = group_scales(plane, layout).repeat_interleave(64, dim=1)
    shape = (nibbles * table_values(plane, layout, CODE)).double() * CODE.scale_unit
    best = (weights.double() * shape[:, :257]).sum(1) / shape.square().sum(1)  # least squares
    # float16 keeps 11 bits: half a step is 2^-12 to 2^-11 of a number; float32 sums add little.
    torch.testing.assert_close(row_scales(plane, layout).double(), best, rtol=2**-10.9, atol=0)


def test_the_loudest_group_of_a_row_has_nibble_15_and_a_quiet_one_is_not_silenced() -> None:
    fit = ScaleFit.of(torch.tensor([[1.0, 0.6, 1e-6, 0.0], [0.0, 0.0, 0.0, 0.0]]))
    assert fit.nibble.tolist() == [[15, 9, 1, 0], [0, 0, 0, 0]]
    assert fit.row.tolist() == [1.0, 0.0]


# Shapes and extremes


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    n_out=st.integers(1, 200),
    n_in=st.integers(1, 200),
    exponent=st.floats(-5, 4),
    power=st.sampled_from([0, 1, 5]),  # of Gaussians: +-1, Gaussian, a few outliers among zeros
    n_planes=st.integers(1, 3),
)
def test_any_shape_comes_back_padded_with_no_row_worse_than_zeros(
    n_out: int, n_in: int, exponent: float, power: int, n_planes: int
) -> None:
    normal = gaussian(n_out, n_in, seed=n_out + 1000 * n_in)
    weights = (normal.abs() ** power * normal.sign()).clamp(-20, 20) / 20**power * 10**exponent
    decoded = coded(weights, n_planes)
    layout = PlaneLayout(n_out, n_in)
    assert decoded.shape == (layout.padded_rows, layout.padded_columns)
    assert (decoded[n_out:] == 0).all()
    # A row scale fitted by least squares, rounded or not, leaves no more than there was; the fit
    # counts the padded columns too. 2^-20 covers sums of 200 float32 squares.
    padded = torch.zeros_like(decoded)
    padded[:n_out, :n_in] = wanted(weights)
    left = (decoded - padded).double().square().sum(1)
    assert (left <= padded.double().square().sum(1) * (1 + 2**-20)).all()


# .0773 in the mean of whole groups, and as good beside a little padding: 4000 weights vary by 3 %.
# Where most of a group is padding, its zeros cost a quarter of that; 1280 weights vary by 5 %.
@pytest.mark.parametrize(
    ("n_in", "bound"), [(20, 0.11), (63, 0.082), (64, 0.082), (65, 0.082), (130, 0.082)]
)
@pytest.mark.parametrize("n_out", [64, 70])
def test_gaussian_weights_keep_their_error_whatever_the_padding(
    n_out: int, n_in: int, bound: float
) -> None:
    weights = gaussian(n_out, n_in, seed=n_in)
    decoded = restore_weights(coded(weights, 1)[:n_out, :n_in], torch.ones(n_in))
    assert relative_squared_error(decoded, weights) < bound


def test_rows_of_zeros_stay_zero_among_others_and_alone() -> None:
    weights = gaussian(64, 128, seed=70)
    weights[5] = 0
    assert (coded(weights, 3)[5] == 0).all()
    assert (coded(torch.zeros(70, 70), 3) == 0).all()


def test_groups_of_zeros_stay_zero_beside_others_in_the_row() -> None:
    weights = gaussian(64, 191, seed=71)  # an odd width, so that nothing rotates into the group
    weights[:, 64:128] = 0
    assert (coded(weights, 3)[:, 64:128] == 0).all()


@pytest.mark.parametrize("size", [1e-6, 1e-3, 1.0, 1e4])
def test_small_and_large_weights_are_coded_as_well_as_others(size: float) -> None:
    weights = gaussian(64, 256, seed=80) * size
    # 1e-6 is 17 of float16's smallest steps. The second plane's rows, .28 of that, have 5, so their
    # scales are off by up to 10 %, 3 % in the root mean square: .0773 * .03^2 = .00007.
    assert relative_squared_error(coded(weights, 2), wanted(weights)) < 0.0062 + 0.0001


def test_an_outlier_is_bounded_and_leaves_rows_that_share_no_word_with_it_alone() -> None:
    weights = gaussian(64, 127, seed=90)
    calm = coded(weights, 1)
    weights[3, 5] = 1e4
    decoded = coded(weights, 1)
    assert decoded.isfinite().all()
    assert (
        relative_squared_error(decoded[:, :127], weights) < 0.25
    )  # found .15; 1 would be all zeros
    sharing = [row for row in range(64) if row % 16 // 2 == 3 // 2]  # word 1: rows 2, 3, 18, 19, ..
    others = [row for row in range(64) if row not in sharing]
    assert torch.equal(decoded[others], calm[others])
    assert relative_squared_error(coded(weights, 3)[:, :127], weights) < 0.001


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_coded_like_their_float32_values(dtype: torch.dtype) -> None:
    weights = gaussian(64, 64, seed=100).to(dtype)
    assert all(map(torch.equal, encoded(weights, 1), encoded(weights.float(), 1)))
