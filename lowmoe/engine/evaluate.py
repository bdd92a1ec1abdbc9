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
    prefix: Sequence[int] = (),
    reference: Logits | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Run a text through in windows that share nothing.

    ids: token ids; window: tokens a window, those of prefix among them; prefix: what a model saw in
    front of texts when it was trained (Tokenizer.prefix), put in front of every window as others
    who measure perplexity do. Every token is predicted but those in front, or a window's first
    where there are none.  progress: windows done and in all.

    Raises PromptError for a text of too few tokens to predict any, or a window that prefix fills.
    """
    room, n_given = window - len(prefix), max(1, len(prefix))
    if room < 1:
        raise PromptError(
            f"a window has {window} tokens, but {len(prefix)} go in front of every text. "
            "Give larger windows."
        )
    windows = [[*prefix, *ids[i : i + room]] for i in range(0, len(ids), room)]
    windows = [w for w in windows if len(w) > n_given]
    if not windows:
        needed = n_given + 1 - len(prefix)
        raise PromptError(f"the text has {len(ids)} tokens, but at least {needed} are needed.")
    losses, divergences, agreements = [], [], []
    for done, tokens in enumerate(windows, start=1):
        found = logits(tokens)[n_given - 1 : -1]
        losses.append(F.cross_entropy(found, torch.tensor(tokens[n_given:]), reduction="none"))
        if reference is not None:
            wanted = reference(tokens)[n_given - 1 : -1]
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
