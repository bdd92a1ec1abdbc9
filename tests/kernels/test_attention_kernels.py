"""The native attention over cached heads, beside torch's in float64."""

import itertools
import math
import sys
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowmoe.kernels.cpu import _native
from quant.layout import round_up

ISAS = _native.isas()
FLOAT32, FLOAT16, INT8 = FORMATS = (0, 1, 2)
NO_WINDOW = sys.maxsize
SIZES = st.integers(1, 140) | st.sampled_from([32, 64, 128])
SEEDS = st.integers(0, 2**32 - 1)
HALF_ULP = 2.0**-24


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stored(form: int, heads: Tensor, extra_bytes: int = 0) -> Tensor:
    """heads: [S, D].  Returns [S, stride] uint8."""
    n_bytes = _native.head_bytes(form, heads.shape[1])
    cache = torch.full((heads.shape[0], n_bytes + extra_bytes), 0xFF, dtype=torch.uint8)
    for head, row in zip(heads, cache, strict=True):
        _native.store_head("scalar", form, head, row[:n_bytes])
    return cache


def read(form: int, cache: Tensor, size: int) -> Tensor:
    """What a cache holds, [S, D] float64."""
    cache = cache[:, : _native.head_bytes(form, size)].contiguous()
    if form != INT8:
        return cache.view(torch.float32 if form == FLOAT32 else torch.float16).double()
    scales = cache[:, round_up(size, 4) :].contiguous().view(torch.float32)
    return cache[:, :size].view(torch.int8).double() * scales.double()


@dataclass(frozen=True, slots=True)
class Found:
    """As attend_part leaves it."""

    top: Tensor
    total: Tensor
    out: Tensor

    @classmethod
    def nothing(cls, *shape: int) -> "Found":
        """shape: [..., queries, D]."""
        top = torch.full(shape[:-1], -math.inf)
        return cls(top, torch.zeros(shape[:-1]), torch.zeros(shape))

    def divided(self) -> Tensor:
        return self.out / self.total[..., None]


def attend_part(
    isa: str, form: int, q: Tensor, keys: Tensor, values: Tensor, first: int, last: int
) -> Found:
    to = Found(*(torch.full(s, math.nan) for s in [q.shape[:1], q.shape[:1], q.shape]))
    _native.attend_part(isa, form, q, keys, values, first, last, to.top, to.total, to.out)
    return to


def error_bound(q: Tensor, keys: Tensor, values: Tensor) -> float:
    """How far attention may be off.  q: [..., D], keys, values: [S, D] of what can be seen.

    A score goes through at most size + 2 roundings of the sum of its terms' magnitudes; subtracting
    the largest rounds once more. e^that makes an absolute error a relative one of the weight, which
    rounds by an ulp itself; numerator and denominator are up to S + 1 additions and one product.
    """
    size, n = values.shape[1], values.shape[0]
    magnitude = float((q.double().abs() @ keys.abs().T).max())
    of_score = (size + 4) * HALF_ULP * magnitude
    of_weight = 2 * of_score + 2 * HALF_ULP
    return 2 * (of_weight + (n + 2) * HALF_ULP) * float(values.abs().max())


@pytest.mark.parametrize("isa", ISAS)
@settings(deadline=None, max_examples=120)
@given(
    form=st.sampled_from(FORMATS),
    size=SIZES,
    n_queries=st.integers(1, 9),
    seen=st.tuples(st.integers(0, 150), st.integers(1, 150)),
    extra=st.sampled_from([0, 4, 64]),
    seed=SEEDS,
)
def test_attention_is_torchs(
    isa: str, form: int, size: int, n_queries: int, seen: tuple[int, int], extra: int, seed: int
) -> None:
    first, last = seen[0], sum(seen)
    q = 3 * random(n_queries, size, seed=seed) / size**0.5
    keys, values = (stored(form, random(last, size, seed=seed + i), extra) for i in (1, 2))
    found = attend_part(isa, form, q, keys, values, first, last)
    k, v = (read(form, cache, size)[first:last] for cache in (keys, values))
    wanted = F.scaled_dot_product_attention(q.double(), k, v, scale=1.0)
    assert (found.divided() - wanted).abs().max() <= error_bound(q, k, v)
    scores = q.double() @ k.T
    # A score's own roundings, which the values, however small, do not lessen.
    of_score = (size + 4) * HALF_ULP * float((q.double().abs() @ k.abs().T).max())
    assert (found.top - scores.amax(1)).abs().max() <= of_score
    assert (found.total >= 1).all()


@pytest.mark.parametrize("isa", ISAS)
@settings(deadline=None, max_examples=60)
@given(
    form=st.sampled_from(FORMATS),
    size=SIZES,
    n_queries=st.integers(1, 9),
    n=st.integers(1, 150),
    cap=st.sampled_from([0.5, 3.0, 30.0]),
    seed=SEEDS,
)
def test_capped_scores_are_those_of_tanh(
    isa: str, form: int, size: int, n_queries: int, n: int, cap: float, seed: int
) -> None:
    q = 3 * random(n_queries, size, seed=seed) / size**0.5
    caches = [stored(form, random(n, size, seed=seed + i)) for i in (1, 2)]
    part, block = Found.nothing(n_queries, size), Found.nothing(1, n_queries, size)
    _native.attend_part(isa, form, q, *caches, 0, n, part.top, part.total, part.out, cap)
    _native.attend_block(
        isa, form, q[None], *caches, 0, n, n, NO_WINDOW, block.top, block.total, block.out, cap
    )
    k, v = (read(form, cache, size) for cache in caches)
    wanted = torch.softmax(cap * torch.tanh(q.double() @ k.T / cap), 1) @ v
    # tanh never widens an error; of its own, power, two sums and two quotients of numbers up to 2
    # round by some 6 units of cap.
    bound = error_bound(q, k, v) + 2 * 12 * HALF_ULP * cap * float(v.abs().max())
    for found in (part.divided(), block.divided()[0]):
        assert (found - wanted).abs().max() <= bound


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("lowest", [-0.01, -1.0, -20.0, -87.3])
def test_weights_are_powers_within_a_unit_in_the_last_place(isa: str, lowest: float) -> None:
    n = 512
    scores = torch.linspace(lowest, 0, n)
    keys = torch.zeros(n, n)
    keys[:, 0] = scores
    caches = [stored(FLOAT32, heads) for heads in (keys, torch.eye(n))]
    # Values that are unit vectors keep the weights apart.
    found = attend_part(isa, FLOAT32, torch.eye(n)[:1], *caches, 0, n)
    wanted = scores.double().exp()
    unit = 2.0**-23 * 2.0 ** wanted.log2().floor()
    assert ((found.out[0] - wanted).abs() <= unit).all()


@pytest.mark.parametrize("isa", ISAS)
def test_a_position_far_below_the_largest_weighs_nothing(isa: str) -> None:
    keys = stored(FLOAT32, torch.tensor([[0.0], [-104.0], [-1e4], [-3e38]]))
    values = stored(FLOAT32, torch.tensor([[1.0], [1e30], [1e30], [1e30]]))
    found = attend_part(isa, FLOAT32, torch.ones(1, 1), keys, values, 0, 4)
    assert (found.top.item(), found.total.item(), found.out.item()) == (0, 1, 1)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("where", ["query", "key", "value"])
def test_nan_comes_out_where_it_went_in(isa: str, form: int, where: str) -> None:
    size, n = 36, 70
    q, keys, values = random(5, size, seed=0), random(n, size, seed=1), random(n, size, seed=2)
    {"query": q[3], "key": keys[65], "value": values[33]}[where][size - 1] = math.nan
    caches = [stored(form, keys), stored(form, values)]
    nan = attend_part(isa, form, q, *caches, 0, n).divided().isnan()
    if where == "query":
        assert nan.all(1).tolist() == [k == 3 for k in range(5)]
        assert not nan[:3].any()
    elif where == "key":
        assert nan.all()
    else:
        assert nan[:, -1].all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("form", FORMATS)
def test_an_empty_range_is_an_empty_part(isa: str, form: int) -> None:
    cache = stored(form, random(3, 20, seed=0))
    found = attend_part(isa, form, random(5, 20, seed=1), cache, cache, 2, 2)
    wanted = Found.nothing(5, 20)
    assert torch.equal(found.top, wanted.top)
    assert torch.equal(found.total, wanted.total)
    assert torch.equal(found.out, wanted.out)


@settings(deadline=None, max_examples=60)
@given(
    cuts=st.lists(st.integers(0, 90), max_size=4),
    size=st.integers(1, 40),
    n_rows=st.integers(1, 5),
    seed=SEEDS,
)
def test_parts_together_are_the_whole(cuts: list[int], size: int, n_rows: int, seed: int) -> None:
    q = random(n_rows, size, seed=seed)
    keys, values = (stored(FLOAT32, 3 * random(90, size, seed=seed + i)) for i in (1, 2))
    ends = sorted({*cuts, 90} - {0})
    merged = attend_part("scalar", FLOAT32, q, keys, values, 0, ends[0])
    for first, last in itertools.pairwise(ends):
        part = attend_part("scalar", FLOAT32, q, keys, values, first, last)
        _native.merge_parts(part.top, part.total, part.out, merged.top, merged.total, merged.out)
    whole = attend_part("scalar", FLOAT32, q, keys, values, 0, 90)
    assert torch.equal(merged.top, whole.top)
    bound = 2 * error_bound(q, read(FLOAT32, keys, size), read(FLOAT32, values, size))
    assert (merged.divided() - whole.divided()).abs().max() <= bound


def attend_block(
    isa: str, form: int, q: Tensor, caches: tuple[Tensor, Tensor], cuts: list[int], **seen: int
) -> Found:
    """q: [T, queries, D]. Goes through the positions from one of the cuts to the next."""
    to = Found.nothing(*q.shape)
    for first, last in itertools.pairwise(cuts):
        _native.attend_block(
            isa,
            form,
            q,
            *caches,
            first,
            last,
            seen["end"],
            seen["window"],
            to.top,
            to.total,
            to.out,
        )
    return to


def mask_of(n_tokens: int, n_positions: int, end: int, window: int) -> Tensor:
    """Which position each token sees, [T, S] bool."""
    asking = end - 1 + torch.arange(n_tokens)[:, None]
    asked = torch.arange(n_positions)[None]
    return (asked <= asking) & (asked > asking - window)


@pytest.mark.parametrize("isa", ISAS)
@settings(deadline=None, max_examples=120)
@given(
    form=st.sampled_from(FORMATS),
    size=SIZES,
    n_tokens=st.integers(1, 40),
    n_queries=st.integers(1, 5),
    before=st.integers(0, 150),
    window=st.just(NO_WINDOW) | st.integers(1, 100),
    cuts=st.lists(st.integers(0, 200), max_size=3),
    seed=SEEDS,
)
def test_a_block_of_tokens_attends_as_torch_does(
    isa: str,
    form: int,
    size: int,
    n_tokens: int,
    n_queries: int,
    before: int,
    window: int,
    cuts: list[int],
    seed: int,
) -> None:
    n_positions = before + n_tokens
    q = 3 * random(n_tokens, n_queries, size, seed=seed) / size**0.5
    caches = tuple(stored(form, random(n_positions, size, seed=seed + i), 4) for i in (1, 2))
    ends = sorted({0, *(cut for cut in cuts if cut < n_positions), n_positions})
    found = attend_block(isa, form, q, caches, ends, end=before + 1, window=window)
    k, v = (read(form, cache, size) for cache in caches)
    mask = mask_of(n_tokens, n_positions, before + 1, window)
    wanted = F.scaled_dot_product_attention(
        q.double().transpose(0, 1), k[None], v[None], attn_mask=mask, scale=1.0
    ).transpose(0, 1)
    # What was found before each tile is scaled once more, as are its roundings.
    bound = 2 * error_bound(q, k, v)
    assert (found.divided() - wanted).abs().max() <= bound


@pytest.mark.parametrize("isa", ISAS)
def test_a_token_that_sees_none_of_the_positions_finds_nothing(isa: str) -> None:
    q = random(6, 3, 20, seed=0)
    caches = stored(FLOAT16, random(80, 20, seed=1)), stored(FLOAT16, random(80, 20, seed=2))
    early = attend_block(isa, FLOAT16, q, caches, [3, 80], end=1, window=NO_WINDOW)
    # Token t sees the positions below 1 + t, so 3 is seen from token 3 on.
    assert early.total.ge(1).all(1).tolist() == [False] * 3 + [True] * 3
    assert not early.total[:3].any()
    assert not early.out[:3].any()
    late = attend_block(isa, FLOAT16, q, caches, [0, 78], end=85, window=10)
    # Token t sees those from 75 + t on.
    assert late.total.ge(1).all(1).tolist() == [True] * 3 + [False] * 3
    assert not late.out[3:].any()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("form", FORMATS)
def test_nan_in_a_block_comes_out_where_it_is_seen(isa: str, form: int) -> None:
    q, keys, values = random(8, 5, 32, seed=0), random(90, 32, seed=1), random(90, 32, seed=2)
    q[2, 4, 7] = keys[87, 3] = math.nan
    caches = stored(form, keys), stored(form, values)
    nan = attend_block(isa, form, q, caches, [0, 90], end=83, window=NO_WINDOW).divided().isnan()
    # Token t sees the positions below 83 + t: 87 from token 5 on.
    wanted = torch.zeros(8, 5, dtype=torch.bool)
    wanted[5:] = wanted[2, 4] = True
    assert torch.equal(nan.all(2), wanted)
    assert torch.equal(nan.any(2), wanted)
