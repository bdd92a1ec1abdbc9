"""Which experts a model uses: shares, repeats, what a cache of so many would have held.

Knows:        the experts that each token chose in each layer.
Ignorant of:  models, text.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lowmoe.experts.policy import Key, UsePolicy


def expert_shares(choices: Tensor, n_experts: int) -> Tensor:
    """Each expert's share of its layer's choices, [L, E].  choices: [L, T, K]."""
    counts = torch.stack([torch.bincount(c.flatten(), minlength=n_experts) for c in choices])
    return counts / counts.sum(-1, keepdim=True)


def repeat_rate(choices: Tensor) -> Tensor:
    """Share of a token's experts that the token before had chosen too, [L].  choices: [L, T, K]."""
    now, before = choices[:, 1:, :, None], choices[:, :-1, None, :]
    return (now == before).any(-1).float().mean((1, 2))


def requests(choices: Tensor) -> Iterator[tuple[int, list[int]]]:
    """(layer, its experts), in the order in which decoding asks.  choices: [L, T, K]."""
    for token in choices.transpose(0, 1).tolist():
        yield from enumerate(token)


def hit_rate(choices: Tensor, n_slots: int) -> float:
    """Share of experts that lie in a cache of n_slots when asked for, under lowmoe's own policy.

    The cache begins empty and is shared by all layers.  choices: [L, T, K], K at most n_slots.
    """
    policy, held = UsePolicy(), set[Key]()
    hits = asked = 0
    for layer_id, expert_ids in requests(choices):
        wanted: Sequence[Key] = [(layer_id, expert_id) for expert_id in expert_ids]
        policy.record(layer_id, expert_ids)
        hits += sum(key in held for key in wanted)
        asked += len(wanted)
        held |= set(wanted)
        while len(held) > n_slots:
            held.remove(min(held - set(wanted), key=policy.worth))
    return hits / asked
