"""Rotary positions, the cache and attention over it, emulated, against the oracle and torch."""

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from cuda_ext.launches import COUNTER_BYTES, attention
from tests.cuda_emulator.emulated import ORDERS, EmulatedLaunch
from tests.cuda_ext import oracle, samples

FORMATS = [torch.float16, torch.float32, torch.int8]
HALF_ULP = 2.0**-24  # relative, of float32


@pytest.fixture
def op(emulated: EmulatedLaunch) -> Any:
    """torch.ops.lowmoe, whose names mypy cannot know."""
    emulated.n_multiprocessors = 12  # so that a long past is cut into many parts
    return torch.ops.lowmoe


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Tokens of some conversations, and what is in the cache."""

    qkv: Tensor
    positions: Tensor
    sequences: Tensor
    n_heads: int
    keys: Tensor
    values: Tensor
    window: int
    score_scale: float | None = None  # None for the usual one
    sinks: Tensor | None = None

    @property
    def scale(self) -> float:
        return self.score_scale or self.head_size**-0.5

    @property
    def head_size(self) -> int:
        return self.qkv.shape[1] // (self.n_heads + 2 * self.keys.shape[1])


def case(
    dtype: torch.dtype,
    head_size: int,
    heads: tuple[int, int],
    positions: list[int],
    *,
    window: int = 0,
    capacity: int = 700,
    seed: int = 0,
) -> Case:
    """heads: of queries, of keys; token t is of conversation t % 2."""
    n_heads, n_kv_heads = heads
    generator = samples.numbers(seed + 1)
    n_tokens, n_all = len(positions), n_heads + 2 * n_kv_heads
    keys, values = samples.random_cache(2, n_kv_heads, capacity, head_size, dtype, seed=seed)
    return Case(
        qkv=torch.randn(n_tokens, n_all * head_size, generator=generator),
        positions=torch.tensor(positions, dtype=torch.int32),
        sequences=torch.arange(n_tokens, dtype=torch.int32) % 2,
        n_heads=n_heads,
        keys=keys,
        values=values,
        window=window,
    )


def attended(op: Any, emulated: EmulatedLaunch, given: Case) -> Tensor:
    """Through a workspace of garbage, whose counters must come back 0."""
    n_tokens, n_kv_heads = given.qkv.shape[0], given.keys.shape[1]
    workspace = torch.full(
        (
            attention.workspace_bytes(
                emulated.n_multiprocessors, n_tokens, given.n_heads, n_kv_heads, given.head_size
            ),
        ),
        255,
        dtype=torch.uint8,
    )
    workspace[:COUNTER_BYTES] = 0
    out = torch.full((n_tokens, given.n_heads * given.head_size), torch.nan)
    op.attend(
        given.qkv, given.keys, given.values, given.positions, given.sequences,
        given.n_heads, given.window, given.scale, given.sinks, out, workspace,
    )  # fmt: skip
    assert not workspace[:COUNTER_BYTES].any()
    return out


def wanted_of(given: Case) -> Tensor:
    out = torch.empty(given.qkv.shape[0], given.n_heads * given.head_size)
    oracle.attend(
        given.qkv, given.keys, given.values, given.positions, given.sequences,
        given.n_heads, given.window, given.scale, given.sinks, out, torch.empty(0),
    )  # fmt: skip
    return out


def tolerance(given: Case) -> float:
    """How far float32 may be off, anywhere.

    A score adds head_size products in chains of 8 and a tree, after up to 4 roundings of each; what
    it is off by, the weight is off by relatively, and as much again in the sum of weights. Powers
    and sums of values add less than 40 roundings: of 5 parts a chain of up to 11 steps of 4 rows.
    """
    k, v = (oracle.cached_heads(c, given.head_size).abs() for c in (given.keys, given.values))
    q = given.qkv.view(-1, given.head_size)
    score = float(q.norm(dim=1).max() * k.norm(dim=-1).max() * given.scale)
    roundings = 2 * (8 + int(math.log2(given.head_size)) + 4) * score + 40
    return roundings * HALF_ULP * float(v.max())


def assert_attends(op: Any, emulated: EmulatedLaunch, given: Case) -> None:
    found = attended(op, emulated, given)
    torch.testing.assert_close(found, wanted_of(given), rtol=0, atol=tolerance(given))


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("head_size", [8, 64, 80, 96, 128, 136, 256])
def test_heads_of_every_size_attend(
    op: Any, emulated: EmulatedLaunch, dtype: torch.dtype, head_size: int
) -> None:
    assert_attends(op, emulated, case(dtype, head_size, (4, 1), [0, 299, 37]))
    assert_attends(op, emulated, case(dtype, head_size, (2, 2), [130, 5]))


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("group", [1, 2, 3, 5, 7, 8, 12, 16, 32])
def test_any_number_of_queries_may_share_a_key(
    op: Any, emulated: EmulatedLaunch, dtype: torch.dtype, group: int
) -> None:
    assert_attends(op, emulated, case(dtype, 64, (2 * group, 2), [290]))


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("n_tokens", range(1, 9))
def test_each_token_sees_its_own_past_of_its_own_conversation(
    op: Any, emulated: EmulatedLaunch, dtype: torch.dtype, n_tokens: int
) -> None:
    positions = [0, 1, 127, 128, 129, 255, 256, 650][-n_tokens:]
    assert_attends(op, emulated, case(dtype, 32, (4, 2), positions))


@pytest.mark.parametrize("window", [1, 7, 128, 129, 500, 5000])
def test_a_window_hides_what_came_before_it(op: Any, emulated: EmulatedLaunch, window: int) -> None:
    given = case(torch.float16, 64, (4, 2), [0, 6, 7, 130, 400, 699], window=window)
    assert_attends(op, emulated, given)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_what_no_token_sees_is_not_read(
    op: Any, emulated: EmulatedLaunch, dtype: torch.dtype
) -> None:
    given = case(dtype, 64, (4, 2), [399, 10], window=250)
    wanted = attended(op, emulated, given)
    for cache in (given.keys, given.values):
        cache[0, :, :150] = cache[0, :, 400:] = cache[1, :, 11:] = torch.nan
    assert torch.equal(attended(op, emulated, given), wanted)


def test_it_is_torchs_attention(op: Any, emulated: EmulatedLaunch) -> None:
    given = case(torch.float32, 64, (8, 2), [511])
    wanted = torch.nn.functional.scaled_dot_product_attention(
        given.qkv[:, : 8 * 64].view(1, 8, 1, 64),
        given.keys[:1, :, :512],
        given.values[:1, :, :512],
        enable_gqa=True,
    )
    # Both are off by as much.
    torch.testing.assert_close(
        attended(op, emulated, given), wanted.view(1, -1), rtol=0, atol=2 * tolerance(given)
    )


@pytest.mark.parametrize("score_scale", [0.01, 0.5])
def test_scores_may_be_scaled_otherwise(
    op: Any, emulated: EmulatedLaunch, score_scale: float
) -> None:
    given = replace(case(torch.float32, 64, (4, 2), [300, 20]), score_scale=score_scale)
    assert_attends(op, emulated, given)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (64, 8)])
def test_sinks_take_part_and_weigh_nothing(
    op: Any, emulated: EmulatedLaunch, heads: tuple[int, int], dtype: torch.dtype
) -> None:
    # Scores far below, beside and far above those of the cache; one part and several.
    sinks = torch.linspace(-30, 8, heads[0])
    given = replace(case(dtype, 64, heads, [300, 0, 20], window=260), sinks=sinks)
    assert_attends(op, emulated, given)


def test_a_sink_above_all_scores_leaves_nothing(op: Any, emulated: EmulatedLaunch) -> None:
    given = case(torch.float32, 32, (4, 2), [40, 600])
    given = replace(given, sinks=torch.tensor([300.0, -300.0, 300.0, -torch.inf]))
    found = attended(op, emulated, given).view(2, 4, 32)
    wanted = wanted_of(replace(given, sinks=None)).view(2, 4, 32)
    assert not found[:, ::2].any()
    torch.testing.assert_close(found[:, 1::2], wanted[:, 1::2], rtol=0, atol=tolerance(given))


@pytest.mark.parametrize("n_multiprocessors", [1, 3, 100])
def test_parts_are_as_many_as_the_card_wants(
    op: Any, emulated: EmulatedLaunch, n_multiprocessors: int
) -> None:
    emulated.n_multiprocessors = n_multiprocessors
    assert_attends(op, emulated, case(torch.float16, 32, (3, 3), [1999, 600], capacity=2000))


def test_far_behind_scores_weigh_nothing(op: Any, emulated: EmulatedLaunch) -> None:
    given = case(torch.float32, 32, (2, 1), [650])
    given.keys.mul_(1e-3)
    given.keys[0, 0, 300] = given.qkv[0, :32] * 100
    given = replace(given, qkv=torch.cat([given.qkv[:, :32]] * 4, dim=1))
    found = attended(op, emulated, given).view(2, 32)
    assert torch.equal(found, given.values[0, 0, 300].expand(2, 32))


def test_a_key_without_meaning_leaves_its_head_without(op: Any, emulated: EmulatedLaunch) -> None:
    given = case(torch.float16, 64, (4, 2), [300])
    given.keys[0, 1, 20, 3] = torch.nan
    found = attended(op, emulated, given).view(4, 64)
    assert found[2:].isnan().all()
    assert found[:2].isfinite().all()


@pytest.mark.parametrize("dtype", FORMATS)
def test_the_order_of_threads_and_blocks_changes_no_bit(
    op: Any, emulated: EmulatedLaunch, dtype: torch.dtype
) -> None:
    given = case(dtype, 64, (6, 2), [600, 0, 200])
    found = []
    for order in (*ORDERS, ORDERS[0]):
        emulated.order = order
        found.append((attended(op, emulated, given), *placed(op, given, frequencies(64))))
    for results in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results, found[0], strict=True))


def frequencies(head_size: int) -> Tensor:
    return 1 / 10000 ** (torch.arange(0, head_size, 2) / head_size)


def placed(op: Any, given: Case, frequencies: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v [T, heads, D] after rope_store, and the caches it wrote to."""
    qkv, keys, values = given.qkv.clone(), given.keys.clone(), given.values.clone()
    where = (given.positions, given.sequences, given.n_heads)
    plain = (0, None, None, 1.0, math.inf)
    op.rope_store(qkv, frequencies, 1.0, *where, *plain, keys, values)
    return qkv.view(qkv.shape[0], -1, given.head_size), keys, values


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("head_size", [8, 64, 80, 96, 128, 136, 256])
def test_heads_are_turned_and_stored(op: Any, dtype: torch.dtype, head_size: int) -> None:
    given = case(dtype, head_size, (5, 2), [3, 0, 63], capacity=64)
    heads, keys, values = placed(op, given, frequencies(head_size))
    before = given.qkv.view(heads.shape)
    assert torch.equal(heads[:, 7:], before[:, 7:])
    turned = turned_exactly(before[:, :7], given.positions, frequencies(head_size))
    # Two products and their sum are rounded; cos and sin are off by 1e-7, less than 2 roundings.
    pair = before.abs().amax(2, keepdim=True)[:, :7]
    assert ((heads[:, :7] - turned).abs() <= 2 * 5 * HALF_ULP * pair).all()
    at = (given.sequences.long(), slice(None), given.positions.long())
    assert torch.equal(keys[at], oracle.stored_heads(heads[:, 5:7], dtype))
    assert torch.equal(values[at], oracle.stored_heads(heads[:, 7:], dtype))
    keys[at], values[at] = given.keys[at], given.values[at]
    assert torch.equal(keys, given.keys)
    assert torch.equal(values, given.values)


def turned_exactly(heads: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    """Angles are float32, as lowmoe/decoder/rope.py has them; all else float64."""
    angles = torch.outer(positions.float(), frequencies).double()[:, None]
    first, second = heads.double().chunk(2, dim=2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=2)


def test_positions_may_be_far(op: Any) -> None:
    positions = [105615, 105616, 2**20 - 1, 777777, 131071, 355, 710, 103993]
    ones = torch.ones(4)  # radians a token: the fastest that turn
    given = case(torch.float16, 8, (1, 1), positions, capacity=1)
    given = replace(given, keys=torch.zeros(2, 1, 2**20, 8).half())
    given = replace(given, values=given.keys.clone())
    given.qkv.copy_(torch.tensor([1.0] * 4 + [0.0] * 4).repeat(8, 3))
    heads, _, _ = placed(op, given, ones)
    wanted = turned_exactly(given.qkv.view(8, 3, 8), given.positions, ones)
    assert (heads[:, :2] - wanted[:, :2]).abs().max() < 1e-7


@pytest.mark.parametrize("dtype", FORMATS)
def test_numbers_at_every_edge_are_stored(op: Any, dtype: torch.dtype) -> None:
    given = case(dtype, 16, (1, 1), [0, 1, 2, 3, 4], capacity=8)
    values = given.qkv.view(5, 3, 16)[:, 2]
    values[0, :6] = torch.tensor([65519.0, 65520.0, -65520.0, 1e-8, -0.0, 6e-8])
    values[1, 3], values[2, 4] = torch.inf, torch.nan
    values[3] *= 2.0**-104
    values[4] = torch.arange(16) / 2  # codes are ties where 127 / amax is 1
    values[4, 15] = 127
    _, _, cached = placed(op, given, frequencies(16))
    wanted = oracle.stored_heads(values[:, None], dtype)
    found = cached[given.sequences.long(), :, given.positions.long()]
    if dtype == torch.int8:  # one NaN has other bits than another
        assert torch.equal(found[..., :16], wanted[..., :16])
        found, wanted = (
            rows[..., 16:].contiguous().view(torch.float32) for rows in (found, wanted)
        )
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


def test_what_is_not_built_is_refused(op: Any, emulated: EmulatedLaunch) -> None:
    with pytest.raises(ValueError, match="a head has 12 channels, but multiples of 8 up to 256"):
        attended(op, emulated, case(torch.float16, 12, (2, 1), [3]))
    with pytest.raises(ValueError, match="a head has 264 channels"):
        placed(op, case(torch.float16, 264, (2, 1), [3]), frequencies(264))
    with pytest.raises(ValueError, match="33 query heads share a key-value head, but up to 32"):
        attended(op, emulated, case(torch.float16, 8, (33, 1), [3]))
