"""The experts of each token, and the tokens of each expert.

Knows:        grids and blocks of kernels/routing.cu.
Ignorant of:  what experts compute.
"""

from typing import TypeAlias

import torch
from torch import Tensor

from cuda_ext.launch import Argument, Launch
from cuda_ext.launches import COUNTER_BYTES, vectors

LANES = 32
THREADS = 256
MOST_DECODED = 8  # tokens of a block that also scores: a warp each
MOST_EXPERTS = 512
MOST_ACTIVE = 16
MOST_GROUPS = 32
MOST_ASSIGNMENTS = 65536  # counts of one warp have 16 bits
MOST_THREADS = 1024
NORM_THREADS = 512  # of a block that norms and scores
NORM_COLUMNS = 4  # of each of its threads, so many times as it has registers for:
NORM_GROUPS = (1, 2, 4)

# What a router is, see ops.py, from bias to scale.
_Kind: TypeAlias = tuple[Tensor | None, Tensor | None, bool, bool, int, int, float]


def norm_route(
    launch: Launch,
    x: Tensor,
    weight: Tensor,
    epsilon: float,
    d: Tensor,
    router: Tensor,
    bias: Tensor | None,
    choice_bias: Tensor | None,
    sigmoid: bool,
    renormalize: bool,
    n_groups: int,
    n_groups_active: int,
    scale: float,
    normed: Tensor,
    codes: Tensor,
    scales: Tensor,
    weights: Tensor,
    ids: Tensor,
    first: Tensor,
    order: Tensor,
    active: Tensor,
    shared_d: Tensor | None,
    shared_codes: Tensor | None,
    shared_scales: Tensor | None,
    workspace: Tensor,
) -> None:
    """norm_round, route and group, and round_tokens for shared experts; for one token one launch,
    not three or four.
    """
    n_tokens, n_hidden = x.shape
    kind = (bias, choice_bias, sigmoid, renormalize, n_groups, n_groups_active, scale)
    at_once = [n for n in NORM_GROUPS if n_hidden <= n * NORM_THREADS * NORM_COLUMNS]
    if n_tokens > 1 or not at_once:
        vectors.norm_round(launch, x, weight, epsilon, d, normed, codes, scales)
        route(launch, normed, router, *kind, weights, ids, workspace)
        group(launch, ids, router.shape[0], first, order, active)
        if shared_d is not None:
            assert shared_codes is not None
            assert shared_scales is not None
            vectors.round_tokens(launch, normed, shared_d, shared_codes, shared_scales)
        return
    n_experts, n_active = _sizes(router, ids, n_groups)
    launch(
        f"routing/norm_route_{at_once[0]}",
        (n_experts + (1 if shared_d is None else 2), 1, 1),
        NORM_THREADS,
        *(x, weight, epsilon, d, n_hidden, normed, codes, scales, router),
        *(workspace[COUNTER_BYTES:], n_experts, n_active, *_numbers(kind), weights, ids),
        *(first, order, active, shared_d, shared_codes, shared_scales, workspace),
    )


def route(
    launch: Launch,
    normed: Tensor,
    router: Tensor,
    bias: Tensor | None,
    choice_bias: Tensor | None,
    sigmoid: bool,
    renormalize: bool,
    n_groups: int,
    n_groups_active: int,
    scale: float,
    weights: Tensor,
    ids: Tensor,
    workspace: Tensor,
) -> None:
    n_tokens, n_hidden = normed.shape
    n_experts, n_active = _sizes(router, ids, n_groups)
    logits = workspace[COUNTER_BYTES:]
    kind = (bias, choice_bias, sigmoid, renormalize, n_groups, n_groups_active, scale)
    choice = (n_experts, n_active, *_numbers(kind), weights, ids)
    if n_tokens <= MOST_DECODED:
        kernel = "routing/route_1" if n_tokens == 1 else f"routing/route_{MOST_DECODED}"
        grid = (n_experts, 1, 1)
        launch(
            kernel, grid, THREADS, normed, router, n_tokens, n_hidden, logits, *choice, workspace
        )
        return
    scores = scores_in(workspace, n_tokens, n_experts)
    likely = logits[scores.nbytes : 2 * scores.nbytes].view(torch.float32)
    # Plain float32 matrices in float32: the one product that is not ours.
    torch.mm(normed, router.T, out=scores)
    warps = THREADS // LANES
    launch(
        "routing/choose", (-(-n_tokens // warps), 1, 1), THREADS, n_tokens, scores, likely, *choice
    )


def prefer(
    launch: Launch,
    parts: Tensor,
    boost: float,
    renormalize: bool,
    weights: Tensor,
    ids: Tensor,
    first: Tensor,
    order: Tensor,
    active: Tensor,
    workspace: Tensor,
) -> None:
    n_tokens, n_experts = ids.shape[0], parts.shape[0]
    scores = scores_in(workspace, n_tokens, n_experts)
    warps = THREADS // LANES
    choice = (n_experts, ids.shape[1], int(renormalize), weights, ids)
    grid = (-(-n_tokens // warps), 1, 1)
    launch("routing/choose_near", grid, THREADS, n_tokens, scores, parts, boost, *choice)
    group(launch, ids, n_experts, first, order, active)


def scores_in(workspace: Tensor, n_tokens: int, n_experts: int) -> Tensor:
    """[T, E] float32, which `route` leaves in its workspace, before biases."""
    n_bytes = 4 * n_tokens * n_experts
    scores = workspace[COUNTER_BYTES : COUNTER_BYTES + n_bytes].view(torch.float32)
    return scores.view(n_tokens, n_experts)


def group(
    launch: Launch, ids: Tensor, n_experts: int, first: Tensor, order: Tensor, active: Tensor
) -> None:
    n_assignments = ids.numel()
    if n_assignments > MOST_ASSIGNMENTS or n_experts > MOST_EXPERTS:
        raise ValueError(
            f"{n_assignments} assignments to {n_experts} experts cannot be grouped: up to "
            f"{MOST_ASSIGNMENTS} to {MOST_EXPERTS} are built; give fewer tokens at once"
        )
    # A thread for each expert, and for each assignment as far as a block goes.
    threads = min(max(n_assignments, n_experts), MOST_THREADS)
    block = -(-threads // LANES) * LANES
    launch("routing/group", (1, 1, 1), block, n_assignments, n_experts, ids, first, order, active)


def workspace_bytes(n_tokens: int, n_experts: int) -> int:
    """What `route` and `norm_route` need: behind the counters scores, then what is likely."""
    return COUNTER_BYTES + 2 * 4 * n_tokens * n_experts


def _numbers(kind: _Kind) -> tuple[Argument, ...]:
    """As kernels take them."""
    bias, choice_bias, sigmoid, renormalize, *others = kind
    return bias, choice_bias, int(sigmoid), int(renormalize), *others


def _sizes(router: Tensor, ids: Tensor, n_groups: int) -> tuple[int, int]:
    """How many experts there are, and how many a token goes to."""
    n_experts, n_active = router.shape[0], ids.shape[1]
    if not 1 <= n_active <= n_experts <= MOST_EXPERTS or n_active > MOST_ACTIVE:
        raise ValueError(
            f"a router chooses {n_active} of {n_experts} experts, but up to {MOST_ACTIVE} of up "
            f"to {MOST_EXPERTS} are built"
        )
    if n_experts % n_groups or n_groups > MOST_GROUPS:
        raise ValueError(
            f"{n_experts} experts are in {n_groups} groups, but up to {MOST_GROUPS} of one size "
            "are built"
        )
    return n_experts, n_active
