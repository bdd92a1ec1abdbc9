"""What a code has cost: error of weights, divergence of predictions.

Knows:        the measures and their units.
Ignorant of:  which code made the damage.
"""

import torch
from torch import Tensor


def relative_squared_error(coded: Tensor, original: Tensor) -> float:
    """sum (coded - original)^2 / sum original^2, without unit."""
    original = original.float()
    return float((coded.float() - original).square().sum() / original.square().sum())


def kl_divergence(logits: Tensor, reference: Tensor) -> Tensor:
    """How many nats of information the coded model loses on each token.

    logits, reference: [T, V] of the coded and the original model.
    Returns KL(reference || logits) [T] float64, at least 0 up to rounding.
    """
    wanted = torch.log_softmax(reference.double(), -1)
    given = torch.log_softmax(logits.double(), -1)
    return (wanted.exp() * (wanted - given)).sum(-1)


def top1_agreement(logits: Tensor, reference: Tensor) -> Tensor:
    """Whether both models name the same likeliest token, [T] bool."""
    return logits.argmax(-1) == reference.argmax(-1)
