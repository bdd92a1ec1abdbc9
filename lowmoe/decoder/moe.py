"""A layer of experts: route, borrow, compute, add up.

Knows:        which tokens go to which expert and with what weight.
Ignorant of:  where experts live, what their bits mean.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowmoe.decoder.router import route
from lowmoe.decoder.weights import LayerWeights
from lowmoe.experts.store import ExpertStore
from lowmoe.kernels import Kernels
from lowmoe.spec import ExpertsFeedForward, Router
from quant.expert import Expert, ExpertFormat


@dataclass(frozen=True, slots=True)
class Routing:
    """Which experts each token goes to: weights [T, K] float32, expert_ids [T, K] int64.

    given: what the experts are to be given, [T, H]; None where the computation keeps it itself.
    """

    weights: Tensor
    expert_ids: Tensor
    given: Tensor | None = None

    @classmethod
    def of(
        cls, x: Tensor, weights: LayerWeights, kind: Router, preference: Tensor | None = None
    ) -> "Routing":
        """Route tokens x [T, H].  preference: see route."""
        names = ("router", "router_bias", "choice_bias")
        router, bias, choice_bias = map(weights.optional, names)
        return cls(*route(x, kind, router, bias, choice_bias, preference), given=x)

    def wanted(self) -> list[int]:
        """The experts that any token goes to."""
        return sorted(set(self.expert_ids.flatten().tolist()))

    def by_weight(self) -> list[int]:
        """The same, those with most weight over all tokens first."""
        if not self.expert_ids.numel():
            return []
        mass = torch.zeros(int(self.expert_ids.max()) + 1)
        mass.index_add_(0, self.expert_ids.flatten(), self.weights.flatten())
        return sorted(self.wanted(), key=lambda e: -float(mass[e]))


def mix_experts(
    routing: Routing,
    layer_id: int,
    spec: ExpertsFeedForward,
    *,
    store: ExpertStore,
    format: ExpertFormat,
    weights: LayerWeights,
    kernels: Kernels,
) -> Tensor:
    """The weighted sum of each token's experts, all wanted from the store before.

    Returns [T, H] of the dtype of what they are given.

    Every expert's output is kept apart until the end, so that the order in which experts arrive
    from RAM or disk does not change the rounding of the sum.
    """
    x, n_active = routing.given, routing.expert_ids.shape[1]
    assert x is not None
    outputs = torch.empty(x.shape[0], n_active, x.shape[1], dtype=x.dtype)  # [T, K, H]
    for group in store.portions():
        with store.borrow(layer_id, group) as experts:
            for expert_id, parts in experts.items():
                d_inner = weights.transforms.d_inner[expert_id]
                expert = format.open(parts, weights.transforms.d_in, d_inner)
                token, rank = torch.where(routing.expert_ids == expert_id)
                heard = routing.weights[token, rank][:, None].to(x.dtype)
                outputs[token, rank] = expert_output(
                    x[token], heard, expert, expert_id, spec, weights, kernels
                )
    return outputs.sum(1)


def expert_output(
    x: Tensor,
    heard: Tensor,
    expert: Expert,
    expert_id: int,
    spec: ExpertsFeedForward,
    weights: LayerWeights,
    kernels: Kernels,
) -> Tensor:
    """One expert's part of its tokens' sums, [t, H].  x: [t, H], heard: the weights, [t, 1]."""
    biases = [weights.optional(name) for name in ("gate_up_bias", "down_bias")]
    own = [None if b is None else b[expert_id] for b in biases]
    if spec.weigh_input:
        return kernels.expert(x * heard, expert, spec.activation, *own)
    return kernels.expert(x, expert, spec.activation, *own) * heard


def shared_output(
    x: Tensor, spec: ExpertsFeedForward, weights: LayerWeights, kernels: Kernels
) -> Tensor | None:
    """What the expert of all tokens adds, [T, H]; None where there is none.  x: [T, H]."""
    if spec.shared is None:
        return None
    parts, n_inner = weights.parts, spec.shared.n_inner
    expert = Expert(parts["shared_gate_up"], parts["shared_down"], n_inner, blocked=False)
    output = kernels.expert(x, expert, spec.activation)
    if spec.shared.weighed:
        score = torch.sigmoid(x.float() @ weights.vector("shared_router").T)  # [T, 1]
        output = output * score.to(x.dtype)
    return output
