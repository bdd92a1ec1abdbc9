"""Chooses the experts of each token."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lowmoe.spec import EveryToken, Router, SigmoidRouter, SoftmaxRouter, SparseMixerRouter

# Keeps the sum of sigmoids that are all 0 from dividing by it.
LEAST_SUM = 1e-20


def route(
    x: Tensor,
    kind: Router,
    router: Tensor | None,
    bias: Tensor | None = None,
    choice_bias: Tensor | None = None,
    preference: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Pick the experts of tokens x [T, H] and weigh them.

    router: [E, H], bias and choice_bias: [E]; None where the kind has none.  preference: [E], how
    many times as likely as it is an expert counts for the choice, see preference.py.
    Returns (weights [T, K] float32, expert_ids [T, K] int64), heaviest first.
    """
    if isinstance(kind, EveryToken):
        return _every(x.shape[0], kind.n_active)
    assert router is not None
    if isinstance(kind, SoftmaxRouter):
        return route_softmax(router_logits(x, router, bias), kind, choice_bias, preference)
    if isinstance(kind, SigmoidRouter):
        return route_sigmoid(router_logits(x.float(), router), kind, choice_bias, preference)
    assert preference is None
    return route_sparse_mixer(router_logits(x, router), kind)


def route_softmax(
    logits: Tensor,
    router: SoftmaxRouter,
    choice_bias: Tensor | None = None,
    preference: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Pick the likeliest experts of each token and weigh them.

    logits: [T, E] router scores, any float dtype; the softmax runs in float32.
    Returns (weights [T, K] float32, expert_ids [T, K] int64), heaviest first without a choice_bias
    or a preference.
    Source: Mixtral, arXiv 2401.04088, section 2.1 (renormalize=True).
    """
    scores = logits.float()
    if router.spread is not None:
        scores = scores / (scores.std(-1, keepdim=True) / router.spread)
    probabilities = torch.softmax(scores, -1)
    choice = _counted(probabilities, choice_bias, preference)
    if router.n_groups > router.n_groups_active:
        choice = _within_groups(choice, router, n_counted=1)
    expert_ids = choice.topk(router.n_active, dim=-1).indices
    weights = probabilities.gather(1, expert_ids)
    if router.renormalize:
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(LEAST_SUM)
    return weights * router.scale, expert_ids


def route_sigmoid(
    logits: Tensor,
    router: SigmoidRouter,
    choice_bias: Tensor | None = None,
    preference: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same with a sigmoid of each expert's own, and groups.  Source: see SigmoidRouter."""
    likely = torch.sigmoid(logits.float())
    scores = _counted(likely, choice_bias, preference)
    if router.n_groups > router.n_groups_active:
        scores = _within_groups(scores, router, n_counted=2)
    expert_ids = scores.topk(router.n_active, dim=-1).indices
    weights = likely.gather(1, expert_ids)
    if router.renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + LEAST_SUM)
    return weights * router.scale, expert_ids


def _counted(likely: Tensor, choice_bias: Tensor | None, preference: Tensor | None) -> Tensor:
    """What experts are chosen by."""
    preferred = likely if preference is None else likely * preference
    return preferred if choice_bias is None else preferred + choice_bias


def _within_groups(
    scores: Tensor, router: SoftmaxRouter | SigmoidRouter, *, n_counted: int
) -> Tensor:
    """Scores with -inf for experts of groups that are not chosen.

    n_counted: how many of a group's highest are added up for it.
    """
    groups = scores.view(scores.shape[0], router.n_groups, -1)
    best = groups.topk(min(n_counted, groups.shape[2]), dim=-1).values.sum(-1)
    chosen = best.topk(router.n_groups_active, dim=-1).indices
    closed = torch.ones_like(best, dtype=torch.bool).scatter(1, chosen, False)
    return groups.masked_fill(closed[:, :, None], -torch.inf).view(scores.shape)


def route_sparse_mixer(logits: Tensor, router: SparseMixerRouter) -> tuple[Tensor, Tensor]:
    """The highest, then the highest of the others, each weighed among those close to it."""
    scores = logits.float()
    weights, expert_ids, left = [], [], scores
    for _ in range(router.n_active):
        best, expert_id = left.max(dim=-1, keepdim=True)
        distance = (best - scores) / scores.abs().maximum(best)
        near = left.masked_fill(distance > 2 * router.jitter, -torch.inf)
        weights.append(torch.softmax(near, -1).gather(1, expert_id))
        expert_ids.append(expert_id)
        left = left.scatter(1, expert_id, -torch.inf)
    return torch.cat(weights, 1), torch.cat(expert_ids, 1)


def _every(n_tokens: int, n_active: int) -> tuple[Tensor, Tensor]:
    ids = torch.arange(n_active).expand(n_tokens, n_active)
    return torch.ones(n_tokens, n_active), ids.contiguous()


def router_logits(x: Tensor, router: Tensor, bias: Tensor | None = None) -> Tensor:
    """Every expert's score for every token, [T, E] of x's dtype.  x: [T, H], router: [E, H]."""
    return F.linear(x, router.to(x.dtype), None if bias is None else bias.to(x.dtype))
