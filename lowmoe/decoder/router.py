"""Chooses the experts of each token."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lowmoe.spec import SoftmaxRouter


def route_softmax(logits: Tensor, router: SoftmaxRouter) -> tuple[Tensor, Tensor]:
    """Pick the likeliest experts of each token and weigh them.

    logits: [T, E] router scores, any float dtype; the softmax runs in float32.
    Returns (weights [T, K] float32, expert_ids [T, K] int64), heaviest first.
    Source: Mixtral, arXiv 2401.04088, section 2.1 (renormalize=True).
    """
    weights, expert_ids = torch.softmax(logits.float(), -1).topk(router.n_active, dim=-1)
    if router.renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, expert_ids


def router_logits(x: Tensor, router: Tensor) -> Tensor:
    """Every expert's score for every token, [T, E] of x's dtype.  x: [T, H], router: [E, H]."""
    return F.linear(x, router.to(x.dtype))
