"""A layer of experts: route, borrow, compute, add up.

Knows:        which tokens go to which expert and with what weight.
Ignorant of:  where experts live, what their bits mean.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowmoe.decoder.router import route_softmax, router_logits
from lowmoe.decoder.weights import ExpertTransforms
from lowmoe.experts.store import ExpertStore
from lowmoe.kernels import Kernels
from lowmoe.spec import SoftmaxRouter
from quant.expert import ExpertFormat


@dataclass(frozen=True, slots=True)
class Routing:
    """Which experts each token goes to: weights [T, K] float32, expert_ids [T, K] int64.

    given: what the experts are to be given, [T, H]; None where the computation keeps it itself.
    """

    weights: Tensor
    expert_ids: Tensor
    given: Tensor | None = None

    @classmethod
    def of(cls, x: Tensor, router: Tensor, kind: SoftmaxRouter) -> "Routing":
        """Route tokens x [T, H] by the scores of router [E, H]."""
        return cls(*route_softmax(router_logits(x, router), kind), given=x)

    def wanted(self) -> list[int]:
        """The experts that any token goes to."""
        return sorted(set(self.expert_ids.flatten().tolist()))

    def by_weight(self) -> list[int]:
        """The same, those with most weight over all tokens first."""
        mass = torch.zeros(int(self.expert_ids.max()) + 1)
        mass.index_add_(0, self.expert_ids.flatten(), self.weights.flatten())
        return sorted(self.wanted(), key=lambda e: -float(mass[e]))


def mix_experts(
    x: Tensor,
    routing: Routing,
    layer_id: int,
    *,
    store: ExpertStore,
    format: ExpertFormat,
    transforms: ExpertTransforms,
    kernels: Kernels,
) -> Tensor:
    """The weighted sum of each token's experts, all wanted from the store before.

    x: [T, H].  Returns [T, H] of x's dtype.

    Every expert's output is kept apart until the end, so that the order in which experts arrive
    from RAM or disk does not change the rounding of the sum.
    """
    n_active = routing.expert_ids.shape[1]
    outputs = torch.empty(x.shape[0], n_active, x.shape[1], dtype=x.dtype)  # [T, K, H]
    for group in store.portions():
        with store.borrow(layer_id, group) as experts:
            for expert_id, parts in experts.items():
                d_inner = transforms.d_inner[expert_id]
                expert = format.open(parts, transforms.d_in, d_inner)
                token, rank = torch.where(routing.expert_ids == expert_id)
                outputs[token, rank] = kernels.expert(x[token], expert)
    return (outputs * routing.weights[:, :, None].to(x.dtype)).sum(1)
