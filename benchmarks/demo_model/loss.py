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
    def forward(ctx, x: Tensor, matrix: Tensor, targets: Tensor) -> Tensor:
        losses, gx = [], torch.empty_like(x)
        gmatrix = torch.zeros_like(matrix, dtype=torch.float32)
        for rows, gradient, target in zip(
            x.split(ROWS), gx.split(ROWS), targets.split(ROWS), strict=True
        ):
            logits = (rows @ matrix.T).float()
            total = logits.logsumexp(-1, keepdim=True)
            losses.append(total[:, 0] - logits.gather(1, target[:, None])[:, 0])
            p = logits.sub_(total).exp_()
            p.scatter_add_(1, target[:, None], p.new_full((len(p), 1), -1.0))
            p = p.to(x.dtype)
            torch.mm(p, matrix, out=gradient)
            gmatrix += p.T @ rows
        ctx.save_for_backward(gx, gmatrix)
        ctx.n_tokens = len(x)
        return torch.cat(losses).mean()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        gx, gmatrix = ctx.saved_tensors
        scale = grad / ctx.n_tokens
        return gx * scale.to(gx.dtype), (gmatrix * scale).to(gx.dtype), None


def cross_entropy(x: Tensor, matrix: Tensor, targets: Tensor) -> Tensor:
    """Nats a token, mean.  x: [T, H], matrix: [V, H], targets: [T] int64."""
    if torch.is_grad_enabled():
        return CrossEntropy.apply(x, matrix, targets)
    losses = [
        torch.nn.functional.cross_entropy((rows @ matrix.T).float(), target, reduction="sum")
        for rows, target in zip(x.split(ROWS), targets.split(ROWS), strict=True)
    ]
    return torch.stack(losses).sum() / len(x)
