"""What a model makes of a text, and how far it is from another model.

Knows:        windows of tokens, negative log-likelihood, divergence.
Ignorant of:  where either model came from.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from lowmoe.errors import PromptError
from quant.damage import kl_divergence, top1_agreement

Logits: TypeAlias = Callable[[Sequence[int]], Tensor]  # token ids -> [T, V] float32


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """perplexity over `tokens` predicted tokens; kl: mean nats a token lost against the reference;
    top1: share of tokens on which both models' likeliest token is the same; None without one.
    """

    perplexity: float
    kl: float | None
    top1: float | None
    tokens: int


def evaluate(
    logits: Logits,
    ids: Sequence[int],
    *,
    window: int,
    reference: Logits | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Run a text through in windows that share nothing.

    ids: token ids; window: tokens a window. Every token but a window's first is predicted.
    progress: windows done and in all.  Raises PromptError for less than two tokens.
    """
    windows = [list(ids[i : i + window]) for i in range(0, len(ids), window)]
    windows = [w for w in windows if len(w) > 1]
    if not windows:
        raise PromptError(f"the text has {len(ids)} tokens, but at least 2 are needed.")
    losses, divergences, agreements = [], [], []
    for done, tokens in enumerate(windows, start=1):
        found = logits(tokens)[:-1]
        losses.append(F.cross_entropy(found, torch.tensor(tokens[1:]), reduction="none"))
        if reference is not None:
            wanted = reference(tokens)[:-1]
            divergences.append(kl_divergence(found, wanted))
            agreements.append(top1_agreement(found, wanted).float())
        progress(done, len(windows))
    loss = torch.cat(losses)
    return Evaluation(
        perplexity=math.exp(loss.mean().item()),
        kl=torch.cat(divergences).mean().item() if divergences else None,
        top1=torch.cat(agreements).mean().item() if agreements else None,
        tokens=loss.numel(),
    )
