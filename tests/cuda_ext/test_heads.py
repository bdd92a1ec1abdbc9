"""What becomes of queries and keys before they meet, emulated, against the oracle and torch."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.cuda_emulator.emulated import ORDERS, EmulatedLaunch
from tests.cuda_ext import oracle, samples

EPSILON = 1e-5
CAPACITY = 70
POSITIONS = torch.tensor([3, 0, 63], dtype=torch.int32)
SEQUENCES = torch.tensor([0, 1, 1], dtype=torch.int32)
NONE, BEFORE_ROPE, AFTER_ROPE, OF_ALL_HEADS = range(4)
# What a channel is off by, in units of 2^-24 of the largest of its head: a norm takes up to 6 steps
# of sums in a lane, 10 of a warp and a block, half of which a root leaves, a division and two
# products; turning is two products and their sum with a cosine off by 2 units, and a length; a norm
# after that as many as one before.
UNITS = 2 * (8 + 3 + 5)


@pytest.fixture
def op(emulated: EmulatedLaunch) -> Any:
    """torch.ops.lowmoe, whose names mypy cannot know."""
    return torch.ops.lowmoe


class Heads:
    """Some tokens' heads, and what is asked for them."""

    def __init__(
        self,
        head_size: int,
        heads: tuple[int, int] = (5, 2),
        *,
        norm: int = NONE,
        weighted: bool = True,
        clamp: float = math.inf,
        rope_size: int | None = None,
        rope_length: float = 1.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.head_size, (self.n_heads, self.n_kv_heads), self.dtype = head_size, heads, dtype
        n_all = self.n_heads + 2 * self.n_kv_heads
        self.qkv = torch.randn(3, n_all * head_size, generator=samples.numbers(head_size))
        size = head_size if rope_size is None else rope_size
        self.frequencies = 1 / 1000 ** (torch.arange(0, size, 2) / max(size, 1))
        widths = [head_size] * 2
        if norm == OF_ALL_HEADS:
            widths = [n * head_size for n in heads]
        self.weights: list[Tensor | None] = [
            torch.empty(n).uniform_(0.5, 1.5, generator=samples.numbers(n)) if weighted else None
            for n in widths
        ]
        self.rope_length = rope_length
        self.kind = (norm, *self.weights, EPSILON, clamp)

    def placed(self, operation: Any) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v [T, heads, D], and keys and values of the cache."""
        qkv = self.qkv.clone()
        keys, values = samples.random_cache(
            2, self.n_kv_heads, CAPACITY, self.head_size, self.dtype
        )
        where = (POSITIONS, SEQUENCES, self.n_heads)
        operation(qkv, self.frequencies, self.rope_length, *where, *self.kind, keys, values)
        return qkv.view(3, -1, self.head_size), keys, values

    def assert_placed(self, op: Any) -> None:
        heads, keys, values = self.placed(op.rope_store)
        wanted, *_ = self.placed(oracle.rope_store)
        loudest = wanted.abs().amax(2, keepdim=True)
        assert ((heads - wanted).abs() <= UNITS * 2.0**-24 * loudest + 1e-30).all()
        at = (SEQUENCES.long(), slice(None), POSITIONS.long())
        n = self.n_heads + self.n_kv_heads
        stored = oracle.stored_heads(heads[:, self.n_heads :], self.dtype)
        assert torch.equal(keys[at], stored[:, : self.n_kv_heads])
        assert torch.equal(values[at], stored[:, self.n_kv_heads :])
        if math.isinf(self.kind[4]):
            assert torch.equal(heads[:, n:], self.qkv.view(heads.shape)[:, n:])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("norm", [BEFORE_ROPE, AFTER_ROPE, OF_ALL_HEADS])
@pytest.mark.parametrize("head_size", [8, 64, 80, 128, 256])
def test_heads_are_normed(op: Any, head_size: int, norm: int, weighted: bool) -> None:
    Heads(head_size, norm=norm, weighted=weighted).assert_placed(op)


@pytest.mark.parametrize("norm", [BEFORE_ROPE, AFTER_ROPE, OF_ALL_HEADS])
@pytest.mark.parametrize("heads", [(1, 1), (12, 4), (48, 8), (64, 64)])
def test_so_they_are_however_many_they_are(op: Any, heads: tuple[int, int], norm: int) -> None:
    Heads(16, heads, norm=norm).assert_placed(op)


@pytest.mark.parametrize("dtype", [torch.float16, torch.int8])
@pytest.mark.parametrize("norm", range(4))
def test_what_is_cached_is_what_became_of_them(op: Any, norm: int, dtype: torch.dtype) -> None:
    Heads(48, norm=norm, clamp=1.2, rope_size=24, rope_length=1.3, dtype=dtype).assert_placed(op)


@pytest.mark.parametrize("norm", range(4))
@pytest.mark.parametrize(("head_size", "rope_size"), [(16, 4), (128, 64), (96, 24), (256, 252)])
def test_a_part_of_a_head_turns(op: Any, head_size: int, rope_size: int, norm: int) -> None:
    Heads(head_size, norm=norm, rope_size=rope_size, rope_length=0.8).assert_placed(op)


def test_channels_that_do_not_turn_keep_their_bits(op: Any) -> None:
    given = Heads(64, rope_size=20, rope_length=3.0)
    heads, *_ = given.placed(op.rope_store)
    before = given.qkv.view(heads.shape)
    assert torch.equal(heads[..., 20:], before[..., 20:])
    assert not torch.equal(heads[..., :20], before[..., :20])


def test_nothing_turns_without_frequencies(op: Any) -> None:
    given = Heads(32, rope_size=0)
    heads, *_ = given.placed(op.rope_store)
    assert torch.equal(heads, given.qkv.view(heads.shape))


@pytest.mark.parametrize("norm", range(4))
def test_queries_keys_and_values_are_kept_within_bounds_before_they_turn(
    op: Any, norm: int
) -> None:
    Heads(64, norm=norm, clamp=0.7).assert_placed(op)
    heads, *_ = Heads(64, clamp=0.7).placed(op.rope_store)
    assert heads[:, 7:].abs().max() == torch.tensor(0.7)


def test_norms_are_torchs(op: Any) -> None:
    given = Heads(64, norm=BEFORE_ROPE, rope_size=0)
    heads, *_ = given.placed(op.rope_store)
    before = given.qkv.view(heads.shape)
    for these, weight in ((slice(5), given.weights[0]), (slice(5, 7), given.weights[1])):
        wanted = F.rms_norm(before[:, these], (64,), weight, EPSILON)
        torch.testing.assert_close(heads[:, these], wanted, rtol=2 * UNITS * 2.0**-24, atol=0)


def test_what_is_no_number_leaves_its_head_without_and_others_alone(op: Any) -> None:
    given = Heads(32, norm=BEFORE_ROPE, clamp=1.0)
    given.qkv.view(3, 9, 32)[1, 2, 5] = torch.nan
    heads, *_ = given.placed(op.rope_store)
    assert heads[1, 2].isnan().all()
    heads[1, 2] = 0
    assert heads.isfinite().all()


@pytest.mark.parametrize("norm", range(4))
def test_the_order_of_threads_and_blocks_changes_no_bit(
    op: Any, emulated: EmulatedLaunch, norm: int
) -> None:
    given, found = Heads(80, (20, 3), norm=norm, clamp=1.5), []
    for order in (*ORDERS, ORDERS[0]):
        emulated.order = order
        found.append(given.placed(op.rope_store))
    for results in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results, found[0], strict=True))


def test_what_is_not_built_is_refused(op: Any) -> None:
    with pytest.raises(ValueError, match="6 channels of a head of 16 turn, but multiples of 4"):
        Heads(16, rope_size=6).placed(op.rope_store)
    with pytest.raises(ValueError, match="20 channels of a head of 16 turn"):
        Heads(16, rope_size=20).placed(op.rope_store)
