"""Muon for the matrices, AdamW for the rest.

Knows:        which parameter is learnt how; how processes divide the work.
Ignorant of:  what the parameters compute.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

MOMENTUM, WEIGHT_DECAY = 0.95, 0.1
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Muon, kellerjordan.github.io/posts/muon
ITERATIONS = 5


def orthogonalized(matrices: Tensor) -> Tensor:
    """Nearest orthogonal matrices, roughly: singular values come out between 0.7 and 1.2.

    matrices: [..., M, N] of any dtype; returns bfloat16.
    """
    x = matrices.bfloat16()
    if flip := x.shape[-2] > x.shape[-1]:
        x = x.mT
    x = x / (x.float().norm(dim=(-2, -1), keepdim=True) + 1e-7).bfloat16()
    a, b, c = NEWTON_SCHULZ
    for _ in range(ITERATIONS):
        g = x @ x.mT
        x = a * x + (b * g + c * (g @ g)) @ x
    return x.mT if flip else x


def matrices_of(name: str, p: Tensor) -> Tensor:
    """[B, M, N]: an expert's two upper matrices lie in one tensor and are two."""
    if name.endswith("w13"):
        return p.view(-1, p.shape[1] // 2, p.shape[2])
    return p if p.dim() == 3 else p[None]


class Muon:
    """Momentum, orthogonalized.  Each process does its share of the matrices and sends it around.

    The step is scaled to the root mean square of AdamW's (arXiv 2502.16982, equation 4), so that
    one learning rate serves both.
    """

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]]) -> None:
        self.named = list(named)
        self.momenta = [torch.zeros_like(p) for _, p in self.named]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Take one, with every parameter's gradient."""
        directions = []
        for (name, p), momentum in zip(self.named, self.momenta, strict=True):
            momentum.lerp_(p.grad, 1 - MOMENTUM)
            directions.append(matrices_of(name, p.grad.lerp(momentum, MOMENTUM)))
        for (_, p), update in zip(self.named, shared(directions), strict=True):
            p.mul_(1 - lr * WEIGHT_DECAY)
            p.add_(update.view_as(p), alpha=-lr * 0.2 * max(update.shape[-2:]) ** 0.5)

    def state_dict(self) -> dict[str, Tensor]:
        """Momenta by the parameters' names."""
        return {name: m for (name, _), m in zip(self.named, self.momenta, strict=True)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """The inverse."""
        for (name, _), momentum in zip(self.named, self.momenta, strict=True):
            momentum.copy_(state[name])


def shared(directions: list[Tensor]) -> list[Tensor]:
    """All of them orthogonalized, every process having computed its part."""
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    if world == 1:
        return [orthogonalized(d) for d in directions]
    # Those of one size lie together, so that dealing them out like cards is fair.
    owner = [0] * len(directions)
    by_size = sorted(range(len(directions)), key=lambda i: directions[i].numel())
    for turn, i in enumerate(by_size):
        owner[i] = turn % world
    found = [
        orthogonalized(d).contiguous() if owner[i] == rank else torch.empty_like(d).bfloat16()
        for i, d in enumerate(directions)
    ]
    for i, d in enumerate(found):
        dist.broadcast(d, owner[i])
    return found


class Optimizer:
    """Both, under one learning rate."""

    def __init__(self, model: nn.Module) -> None:
        def is_matrix(name: str, p: Tensor) -> bool:
            # Embeddings and the router's rows stand for tokens and experts, each for itself.
            return p.dim() > 1 and "embed" not in name and not name.endswith("gate.weight")

        named = list(model.named_parameters())
        self.muon = Muon((n, p) for n, p in named if is_matrix(n, p))
        rest = [p for n, p in named if not is_matrix(n, p)]
        self.adam = torch.optim.AdamW(rest, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def step(self, lr: float) -> None:
        """Take one."""
        self.muon.step(lr)
        for group in self.adam.param_groups:
            group["lr"] = lr
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        for _, p in self.muon.named:
            p.grad = None

    def state_dict(self) -> dict[str, object]:
        """All that the next step depends on."""
        return {"muon": self.muon.state_dict(), "adam": self.adam.state_dict()}

    def load_state_dict(self, state: dict[str, dict]) -> None:
        """The inverse."""
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])
