"""The choice of experts and their groups, emulated, against the oracle and lowmoe's routers."""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from cuda_ext.launches import COUNTER_BYTES, routing
from lowmoe.decoder.router import route, route_softmax
from lowmoe.spec import SigmoidRouter, SoftmaxRouter
from quant.activations import round_activations
from tests.cuda_emulator.emulated import ORDERS, EmulatedLaunch
from tests.cuda_ext import oracle, samples

# (tokens, experts, active, hidden)
SHAPES = [
    (1, 8, 2, 4096), (1, 128, 8, 2048), (8, 512, 16, 100), (3, 60, 4, 77), (2, 1, 1, 8),
    (7, 33, 16, 36), (9, 16, 4, 64), (40, 160, 6, 128),
]  # fmt: skip


# bias, choice_bias, sigmoid, renormalize, n_groups, n_groups_active, scale
Kind = tuple[Tensor | None, Tensor | None, bool, bool, int, int, float]


@pytest.fixture
def op(emulated: EmulatedLaunch) -> Any:
    """torch.ops.lowmoe, whose names mypy cannot know."""
    return torch.ops.lowmoe


def softmax(renormalize: bool) -> Kind:
    """From a router's bias to its scale."""
    return None, None, False, renormalize, 1, 1, 1.0


def routed(
    op: Any,
    x: Tensor,
    router: Tensor,
    n_active: int,
    *,
    renormalize: bool = True,
    kind: Kind | None = None,
) -> tuple[Tensor, Tensor]:
    """Weights and ids, through a workspace of garbage, whose counters must come back 0.

    kind: None for a softmax.
    """
    n_tokens, n_experts = x.shape[0], router.shape[0]
    workspace = torch.full((routing.workspace_bytes(n_tokens, n_experts),), 255, dtype=torch.uint8)
    workspace[:COUNTER_BYTES] = 0
    weights = torch.full((n_tokens, n_active), torch.nan)
    ids = torch.full((n_tokens, n_active), -9, dtype=torch.int32)
    op.route(x, router, *(kind or softmax(renormalize)), weights, ids, workspace)
    assert not workspace[:COUNTER_BYTES].any()
    return weights, ids


def routed_by_logits(
    op: Any, logits: Tensor, n_active: int, *, renormalize: bool = True
) -> tuple[Tensor, Tensor]:
    """Of tokens whose scores are exactly these, [T, E]: a token has one column that is not 0."""
    assert logits.shape[0] <= routing.MOST_DECODED
    one_each = torch.eye(logits.shape[0])
    return routed(op, one_each, logits.T.contiguous(), n_active, renormalize=renormalize)


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize(("n_tokens", "n_experts", "n_active", "n_hidden"), SHAPES)
def test_experts_are_the_likeliest(
    op: Any, n_tokens: int, n_experts: int, n_active: int, n_hidden: int, renormalize: bool
) -> None:
    x = samples.random_tokens(n_tokens, n_hidden)
    router = torch.randn(n_experts, n_hidden, generator=samples.numbers(1)) / n_hidden**0.5
    weights, ids = routed(op, x, router, n_active, renormalize=renormalize)
    wanted_weights, wanted_ids = torch.empty_like(weights), torch.empty_like(ids)
    kind = softmax(renormalize)
    oracle.route(x, router, *kind, wanted_weights, wanted_ids, torch.empty(0))
    assert torch.equal(ids, wanted_ids)
    # A score's error is at most that of n_hidden / 8 sums in a row (torch.mm's chains are shorter)
    # on scores of up to |x| |router|, and a weight's relative error is twice a score's.
    most = float(x.norm(dim=1).max() * router.norm(dim=1).max())
    rtol = 2 * (n_hidden / 8 + 20) * 2.0**-24 * most
    torch.testing.assert_close(weights, wanted_weights, rtol=rtol, atol=1e-30)


@pytest.mark.parametrize("renormalize", [False, True])
def test_it_chooses_as_lowmoes_router(op: Any, renormalize: bool) -> None:
    logits = torch.randn(8, 64, generator=samples.numbers(2)) * 3
    weights, ids = routed_by_logits(op, logits, 6, renormalize=renormalize)
    wanted = route_softmax(logits, SoftmaxRouter(n_active=6, renormalize=renormalize))
    assert torch.equal(ids, wanted[1].int())
    # Each takes powers within 2 units in the last place, and adds up to 64 of them.
    torch.testing.assert_close(weights, wanted[0], rtol=2 * (4 + 8) * 2.0**-24, atol=0)


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize(("n_tokens", "n_experts", "n_active", "n_hidden"), SHAPES)
def test_experts_that_are_there_are_preferred_and_weigh_as_they_would(
    op: Any, n_tokens: int, n_experts: int, n_active: int, n_hidden: int, renormalize: bool
) -> None:
    x = samples.random_tokens(n_tokens, n_hidden)
    router = torch.randn(n_experts, n_hidden, generator=samples.numbers(1)) / n_hidden**0.5
    parts = torch.zeros(n_experts, 3, dtype=torch.int64)
    parts[torch.rand(n_experts, generator=samples.numbers(9)) < 0.5] = 4096
    found: dict[str, list[Tensor]] = {}
    for name, ops in (("kernel", op), ("oracle", SimpleNamespace(**oracle.OPERATIONS))):
        workspace = torch.zeros(routing.workspace_bytes(n_tokens, n_experts), dtype=torch.uint8)
        weights = torch.full((n_tokens, n_active), torch.nan)
        ids = torch.full((n_tokens, n_active), -9, dtype=torch.int32)
        groups = samples.empty_groups(n_tokens * n_active, n_experts)
        ops.route(x, router, *softmax(renormalize), weights, ids, workspace)
        before = ids.clone()
        ops.prefer(parts, 1.0, renormalize, weights, ids, *groups, workspace)
        assert not workspace[:COUNTER_BYTES].any()
        n_used = int(groups[2][0])
        found[name] = [weights, ids, *groups[:2], groups[2][: n_used + 1]]
    if n_tokens * (n_experts - n_active) > 30:
        assert not torch.equal(before, found["kernel"][1]), "a boost that changes nothing"
    for at in range(1, 5):
        assert torch.equal(found["kernel"][at], found["oracle"][at])
    # As above: weights are those of the scores.
    most = float(x.norm(dim=1).max() * router.norm(dim=1).max())
    rtol = 2 * (n_hidden / 8 + 20) * 2.0**-24 * most
    torch.testing.assert_close(found["kernel"][0], found["oracle"][0], rtol=rtol, atol=1e-30)


def test_a_boost_is_what_lowmoes_router_counts_as_likelier(op: Any) -> None:
    logits = torch.randn(8, 64, generator=samples.numbers(2)) * 3
    parts = torch.zeros(64, 3, dtype=torch.int64)
    parts[::3, 0] = 1
    workspace = torch.zeros(routing.workspace_bytes(8, 64), dtype=torch.uint8)
    routing.scores_in(workspace, 8, 64).copy_(logits)
    weights, ids = torch.empty(8, 6), torch.empty(8, 6, dtype=torch.int32)
    boost = math.log(1 / (1 - 0.4))
    op.prefer(parts, boost, True, weights, ids, *samples.empty_groups(48, 64), workspace)
    factors = torch.where(parts[:, 0] != 0, 1 / (1 - 0.4), 1.0)
    wanted = route_softmax(logits, SoftmaxRouter(n_active=6, renormalize=True), None, factors)
    assert torch.equal(ids, wanted[1].int())
    torch.testing.assert_close(weights, wanted[0], rtol=2 * (4 + 8) * 2.0**-24, atol=0)


def test_ties_go_to_the_lower_id(op: Any) -> None:
    logits = torch.tensor([[0.0, 2.0, -1.0, 2.0, 0.0, -0.0, 2.0, -0.0], [3.0] * 8])
    weights, ids = routed_by_logits(op, logits, 6)
    assert ids.tolist() == [[1, 3, 6, 0, 4, 5], [0, 1, 2, 3, 4, 5]]
    assert torch.equal(weights[0, :3], weights[0, :1].expand(3))
    torch.testing.assert_close(weights[1], torch.full((6,), 1 / 6), rtol=2.0**-22, atol=0)


def test_no_zero_is_less_than_another(emulated: EmulatedLaunch) -> None:
    # The scores of a prompt are torch's: 0 may have either sign.
    logits = torch.tensor([[-0.0, 0.0, -0.0, 0.0, -1e-45]])
    weights, ids = torch.empty(1, 5), torch.empty(1, 5, dtype=torch.int32)
    kind, likely = (None, None, 0, 1, 1, 1, 1.0), torch.empty(5)
    emulated("routing/choose", (1, 1, 1), 256, 1, logits, likely, 5, 5, *kind, weights, ids)
    assert ids.tolist() == [[0, 1, 2, 3, 4]]
    torch.testing.assert_close(weights, torch.full((1, 5), 0.2), rtol=2.0**-22, atol=0)


@pytest.mark.parametrize("renormalize", [False, True])
def test_a_score_without_meaning_leaves_its_token_without_and_others_alone(
    op: Any, renormalize: bool
) -> None:
    logits = torch.randn(3, 40, generator=samples.numbers(3))
    router = logits.T.contiguous()
    x = torch.eye(3)
    x[1, 1] = torch.nan
    weights, ids = routed(op, x, router, 8, renormalize=renormalize)
    assert weights[1].isnan().all()
    assert len(set(ids[1].tolist())) == 8
    assert weights[[0, 2]].isfinite().all()
    assert ((ids >= 0) & (ids < 40)).all()


def test_one_expert_without_meaning_is_enough(op: Any) -> None:
    logits = torch.randn(1, 40, generator=samples.numbers(4))
    logits[0, 33] = torch.nan
    weights, ids = routed_by_logits(op, logits, 8)
    assert weights.isnan().all()
    assert len(set(ids[0].tolist())) == 8


def test_experts_far_behind_weigh_nothing_and_are_chosen_in_order(op: Any) -> None:
    logits = torch.full((1, 6), -1e30)
    logits[0, 4], logits[0, 2] = 50.0, -300.0
    weights, ids = routed_by_logits(op, logits, 5)
    assert ids.tolist() == [[4, 2, 0, 1, 3]]
    assert weights.tolist() == [[1, 0, 0, 0, 0]]


def test_a_prompt_chooses_as_its_tokens_do(op: Any) -> None:
    # Small whole numbers: every order of sums gives the same scores.
    x = torch.randint(-3, 4, (12, 32), generator=samples.numbers(5)).float()
    router = torch.randint(-3, 4, (24, 32), generator=samples.numbers(6)).float() / 16
    weights, ids = routed(op, x, router, 4)
    for t in range(12):
        alone = routed(op, x[t : t + 1], router, 4)
        assert torch.equal(alone[0], weights[t : t + 1])
        assert torch.equal(alone[1], ids[t : t + 1])


BIASED = SoftmaxRouter(n_active=5, renormalize=True, bias=True)
CHOOSY = SoftmaxRouter(n_active=5, renormalize=True, choice_bias=True)
SIGMOID = SigmoidRouter(n_active=6, renormalize=True, choice_bias=True, scale=2.5)
KINDS = {
    "scores with biases": BIASED,
    "scores with biases, not renormalized": replace(BIASED, renormalize=False),
    "biases of the choice": CHOOSY,
    "biases of scores and of the choice": replace(CHOOSY, bias=True, renormalize=False),
    "sigmoids": SigmoidRouter(n_active=10, renormalize=True),
    "sigmoids, biases of the choice, scaled": SIGMOID,
    "sigmoids, not renormalized": replace(SIGMOID, renormalize=False),
    "sigmoids in 8 groups": replace(SIGMOID, n_groups=8, n_groups_active=3),
    "sigmoids in groups of one": replace(SIGMOID, n_groups=32, n_groups_active=7),
    "sigmoids in a group of 4": replace(SIGMOID, n_groups=4, n_groups_active=1, choice_bias=False),
}


def kind_of(router: SoftmaxRouter | SigmoidRouter, n_experts: int) -> Kind:
    """With random biases where it has some."""
    generator = samples.numbers(11)
    sigmoid = router if isinstance(router, SigmoidRouter) else None
    has_bias = isinstance(router, SoftmaxRouter) and router.bias
    bias = torch.randn(n_experts, generator=generator) if has_bias else None
    choice_bias = 0.3 * torch.randn(n_experts, generator=generator) if router.choice_bias else None
    groups = (1, 1) if sigmoid is None else (sigmoid.n_groups, sigmoid.n_groups_active)
    scale = 1.0 if sigmoid is None else sigmoid.scale
    return bias, choice_bias, sigmoid is not None, router.renormalize, *groups, scale


@pytest.mark.parametrize("n_tokens", [1, 7, 20])
@pytest.mark.parametrize("n_experts", [32, 160, 512])
@pytest.mark.parametrize("name", KINDS)
def test_routers_of_every_kind_choose_as_lowmoes(
    op: Any, name: str, n_experts: int, n_tokens: int
) -> None:
    router, kind = KINDS[name], kind_of(KINDS[name], n_experts)
    # Small whole numbers times 1 / 8: every order of sums gives the same scores.
    generator = samples.numbers(n_experts + n_tokens)
    x = torch.randint(-3, 4, (n_tokens, 40), generator=generator).float()
    rows = torch.randint(-3, 4, (n_experts, 40), generator=generator).float() / 8
    weights, ids = routed(op, x, rows, router.n_active, kind=kind)
    wanted_weights, wanted_ids = route(x, router, rows, *kind[:2])
    wanted = torch.empty(n_tokens, router.n_active)
    exact_ids = torch.empty(n_tokens, router.n_active, dtype=torch.int32)
    oracle.route(x, rows, *kind, wanted, exact_ids, torch.empty(0))
    assert torch.equal(ids, exact_ids)
    distinct = (ids == wanted_ids).all(1)
    if kind[0] is not None or kind[1] is not None:
        assert distinct.all()  # else torch takes any among equals
    # Powers within 2 units in the last place, a sum of up to 512 of them in chains of 16,
    # quotients.
    rtol = 2 * (16 + 5 + 8) * 2.0**-24
    torch.testing.assert_close(weights, wanted, rtol=rtol, atol=1e-20)
    torch.testing.assert_close(weights[distinct], wanted_weights[distinct], rtol=rtol, atol=1e-20)


@pytest.mark.parametrize("name", KINDS)
def test_a_score_without_meaning_leaves_its_token_without_whatever_the_kind(
    op: Any, name: str
) -> None:
    router, kind = KINDS[name], kind_of(KINDS[name], 64)
    logits = torch.randn(3, 64, generator=samples.numbers(3))
    rows, x = logits.T.contiguous(), torch.eye(3)
    rows[50] = torch.nan
    x[0] = torch.nan
    weights, ids = routed(op, x, rows, router.n_active, kind=kind)
    assert weights.isnan().all()
    assert all(len(set(of_token)) == router.n_active for of_token in ids.tolist())
    assert ((ids >= 0) & (ids < 64)).all()


def test_groups_of_experts_that_do_not_fit_are_refused(op: Any) -> None:
    for n_groups in (3, 64):
        kind = (None, None, True, True, n_groups, 1, 1.0)
        with pytest.raises(ValueError, match=f"64 experts are in {n_groups} groups, but up to 32"):
            routed(op, torch.ones(1, 4), torch.ones(64, 4), 2, kind=kind)


@pytest.mark.parametrize("n_tokens", [1, 2, 9])
def test_shared_experts_are_given_the_same_norm_in_their_basis(op: Any, n_tokens: int) -> None:
    x, d = samples.random_tokens(n_tokens, 320), samples.random_d(320)
    weight, router = torch.rand(320), torch.randn(48, 320, generator=samples.numbers(1))
    plain = norm_routed(op, x, weight, d, router)
    shared_d, shared = samples.random_d(320, seed=5), samples.empty_rounded(n_tokens, 320)
    found = norm_routed(op, x, weight, d, router, (shared_d, *shared))
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))
    rounded = round_activations(found[0], shared_d)
    assert torch.equal(shared[0], rounded.codes)
    assert torch.equal(shared[1], rounded.scales)


@pytest.mark.parametrize("n_hidden", [36, 77, 2048, 2880, 4096, 7168, 8320])
@pytest.mark.parametrize("n_tokens", [1, 2])
def test_a_norm_a_choice_and_groups_may_be_made_at_once(
    op: Any, emulated: EmulatedLaunch, n_tokens: int, n_hidden: int
) -> None:
    x, d = samples.random_tokens(n_tokens, n_hidden), samples.random_d(n_hidden)
    weight = samples.random_d(n_hidden, seed=1).float()
    router = torch.randn(48, n_hidden, generator=samples.numbers(1)) / n_hidden**0.5
    emulated.launched.clear()
    normed, codes, scales, weights, ids, *groups = norm_routed(op, x, weight, d, router)
    assert (len(emulated.launched) == 1) == (n_tokens == 1 and n_hidden <= 8192)
    wanted = torch.empty_like(x)
    oracle.norm_round(x, weight, 1e-5, d, wanted, *samples.empty_rounded(*x.shape))
    # At most 16 squares in a lane, then 10 sums; a root halves that, and six roundings follow. Five
    # groups of 8320 columns more: 9 such.
    torch.testing.assert_close(normed, wanted, rtol=(19 + 9) * 2.0**-24, atol=0)
    rounded = round_activations(normed, d)
    assert torch.equal(codes, rounded.codes)
    assert torch.equal(scales, rounded.scales)
    alone_weights, alone_ids = routed(op, normed, router, 4)
    assert torch.equal(ids, alone_ids)
    most = float(normed.norm(dim=1).max() * router.norm(dim=1).max())
    rtol = 4 * (n_hidden / 64 + 20) * 2.0**-24 * most  # of two orders of sums, see above
    torch.testing.assert_close(weights, alone_weights, rtol=rtol, atol=1e-30)
    wanted_groups = samples.groups_of_ids(ids, torch.empty(0), 48)
    wanted_ones = (wanted_groups.first, wanted_groups.order, wanted_groups.active)
    assert all(torch.equal(a, b) for a, b in zip(groups, wanted_ones, strict=True))


def norm_routed(
    op: Any,
    x: Tensor,
    weight: Tensor,
    d: Tensor,
    router: Tensor,
    shared: tuple[Tensor | None, ...] = (None, None, None),
) -> tuple[Tensor, ...]:
    """normed, codes, scales, weights, ids, first, order, active; of 4 experts a token."""
    n_tokens, n_experts = x.shape[0], router.shape[0]
    workspace = torch.full((routing.workspace_bytes(n_tokens, n_experts),), 255, dtype=torch.uint8)
    workspace[:COUNTER_BYTES] = 0
    made = (
        torch.full_like(x, torch.nan),
        *samples.empty_rounded(*x.shape),
        torch.full((n_tokens, 4), torch.nan),
        torch.full((n_tokens, 4), -9, dtype=torch.int32),
        *samples.empty_groups(4 * n_tokens, n_experts),
    )
    op.norm_route(x, weight, 1e-5, d, router, *softmax(True), *made, *shared, workspace)
    assert not workspace[:COUNTER_BYTES].any()
    return made


def grouped(op: Any, ids: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    first, order, active = samples.empty_groups(ids.numel(), n_experts)
    op.group(ids, n_experts, first, order, active)
    return first, order, active


@pytest.mark.parametrize(
    ("n_tokens", "n_experts", "n_active"),
    [(1, 8, 2), (1, 128, 8), (8, 512, 16), (5, 7, 3), (100, 60, 4), (1, 1, 1), (4096, 512, 16)],
)
def test_groups_are_those_of_a_stable_sort(
    op: Any, n_tokens: int, n_experts: int, n_active: int
) -> None:
    ids = torch.randint(
        0, n_experts, (n_tokens, n_active), generator=samples.numbers(7), dtype=torch.int32
    )
    assert_groups(op, ids, n_experts)


@pytest.mark.parametrize("expert", [0, 31, 32, 511])
def test_all_may_go_to_one_expert(op: Any, expert: int) -> None:
    # A warp's beginnings are up to 65504 then.
    assert_groups(op, torch.full((4096, 16), expert, dtype=torch.int32), 512)


def test_experts_may_come_in_runs(op: Any) -> None:
    runs = torch.arange(96, dtype=torch.int32).repeat_interleave(33)
    assert_groups(op, runs.flip(0).view(-1, 1), 97)


def assert_groups(op: Any, ids: Tensor, n_experts: int) -> None:
    wanted = samples.groups_of_ids(ids, torch.empty(0), n_experts)
    first, order, active = grouped(op, ids, n_experts)
    assert torch.equal(first, wanted.first)
    assert torch.equal(order, wanted.order)
    assert torch.equal(active, wanted.active)  # and nothing after them


def test_the_order_of_threads_and_blocks_changes_no_bit(op: Any, emulated: EmulatedLaunch) -> None:
    x, router = samples.random_tokens(5, 260), samples.random_tokens(40, 260, seed=1)
    found = []
    for order in (*ORDERS, ORDERS[0]):
        emulated.order = order
        weights, ids = routed(op, x, router, 6)
        at_once = norm_routed(op, x[:1], torch.ones(260), samples.random_d(260), router)
        found.append((weights, ids, *grouped(op, ids.repeat(30, 1), 40), *at_once))
    for results in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results, found[0], strict=True))


def test_what_is_not_built_is_refused(op: Any) -> None:
    with pytest.raises(ValueError, match="chooses 2 of 513 experts, but up to 16 of up to 512"):
        routed(op, torch.ones(1, 4), torch.ones(513, 4), 2)
    with pytest.raises(ValueError, match="chooses 17 of 32 experts"):
        routed(op, torch.ones(1, 4), torch.ones(32, 4), 17)
    with pytest.raises(ValueError, match="chooses 3 of 2 experts"):
        routed(op, torch.ones(1, 4), torch.ones(2, 4), 3)
    with pytest.raises(ValueError, match="65544 assignments to 8 experts cannot be grouped"):
        grouped(op, torch.zeros(8193, 8, dtype=torch.int32), 8)
