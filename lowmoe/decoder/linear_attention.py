"""Attention over a state that decays, many tokens at a time.

Knows:        how a state and a few tokens together give what each of them reads.
Ignorant of:  where queries, keys and values come from, caches.
"""

import torch
from torch import Tensor

# Tokens that meet each other directly: the work on them grows with their square, that on the state
# not. So many are what the makers of both kinds chose or allow, and one is a step of decode.
CHUNK = 64


def attend_state(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    decay: Tensor,
    state: Tensor,
    correction: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What tokens read of a state that each of them first decays and adds to.

    queries, keys: [A, T, K], values: [A, T, D], decay: [A, T] logarithms, at most 0, state:
    [A, K, D], correction: [A, T] or None; all float32. Token t makes of a head's state S

        S = exp(decay_t) S + keys_t^T values_t                               without a correction
        S = exp(decay_t) S + keys_t^T correction_t (values_t - keys_t exp(decay_t) S)    with one

    and reads queries_t S.  Returns ([A, T, D], the last state).
    Source: arXiv 2401.04658, section 3; arXiv 2412.06464, section 3.3.
    """
    read: list[Tensor] = []
    for first in range(0, queries.shape[1], CHUNK):
        some = slice(first, first + CHUNK)
        out, state = _chunk(
            queries[:, some],
            keys[:, some],
            values[:, some],
            decay[:, some],
            state,
            None if correction is None else correction[:, some],
        )
        read.append(out)
    return torch.cat(read, dim=1), state


def _chunk(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    decay: Tensor,
    state: Tensor,
    correction: Tensor | None,
) -> tuple[Tensor, Tensor]:
    # Sums over a chunk reach -1000; in float32 what is between two tokens would be off by 6e-5.
    since_start = decay.double().cumsum(1)  # [A, T]
    between = (since_start[:, :, None] - since_start[:, None]).float()
    later = torch.ones(between.shape[1:], dtype=torch.bool).triu(1)
    between = between.masked_fill(later, -torch.inf).exp()  # [A, T, T], from token to later token
    left = since_start.float().exp()[..., None]  # [A, T, 1], of the state at the start
    added = values
    if correction is not None:
        # What every token adds depends on what those before it added: a triangle of equations.
        weight = correction[..., None]
        known = weight * (keys @ keys.transpose(1, 2)) * between
        added = torch.linalg.solve_triangular(
            known, weight * (values - left * (keys @ state)), upper=False, unitriangular=True
        )
    out = left * (queries @ state) + (queries @ keys.transpose(1, 2) * between) @ added
    remaining = between[:, -1, :, None]  # [A, T, 1], of each token at the end
    state = left[:, -1:] * state + (keys * remaining).transpose(1, 2) @ added
    return out, state
