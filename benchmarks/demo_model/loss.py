"""Cross-entropy over a vocabulary without ever holding all its logits.

Knows:        hidden states, the output matrix, the tokens that should follow.
Ignorant of:  where they come from.
"""

import torch
from torch import Tensor

ROWS = 1024  # tokens whose logits lie in memory at once


class CrossEntropy(torch.autograd.Function):
    """The gradient is taken while the logits are there: no second pass over them."""

    @staticmethod
    def forward(ctx, x: Tensor, matrix: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        losses, gx = [], torch.empty_like(x)
        gmatrix = torch.zeros_like(matrix, dtype=torch.float32)
        for rows, gradient, target, weight in zip(
            *(of.split(ROWS) for of in (x, gx, targets, weights)), strict=True
        ):
            logits = (rows @ matrix.T).float()
            total = logits.logsumexp(-1, keepdim=True)
            losses.append(weight * (total[:, 0] - logits.gather(1, target[:, None])[:, 0]))
            p = logits.sub_(total).exp_()
            p.scatter_add_(1, target[:, None], p.new_full((len(p), 1), -1.0))
            p = p.mul_(weight[:, None]).to(x.dtype)
            torch.mm(p, matrix, out=gradient)
            gmatrix += p.T @ rows
        ctx.save_for_backward(gx, gmatrix)
        ctx.n_tokens = len(x)
        return torch.cat(losses).mean()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        gx, gmatrix = ctx.saved_tensors
        scale = grad / ctx.n_tokens
        return gx * scale.to(gx.dtype), (gmatrix * scale).to(gx.dtype), None, None


def cross_entropy(
    x: Tensor, matrix: Tensor, targets: Tensor, weights: Tensor | None = None
) -> Tensor:
    """Nats a token, mean.  x: [T, H], matrix: [V, H], targets: [T] int64, weights: [T] float32, of
    each token's nats where a gradient is taken; None for 1.
    """
    if torch.is_grad_enabled():
        weights = torch.ones(len(x), device=x.device) if weights is None else weights
        return CrossEntropy.apply(x, matrix, targets, weights)
    losses = [
        torch.nn.functional.cross_entropy((rows @ matrix.T).float(), target, reduction="sum")
        for rows, target in zip(x.split(ROWS), targets.split(ROWS), strict=True)
    ]
    return torch.stack(losses).sum() / len(x)
