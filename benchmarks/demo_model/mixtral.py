"""A Mixtral that learns: float32 parameters, arithmetic in bfloat16, documents behind each other.

Knows:        Mixtral's mathematics, arXiv 2401.04088; the two losses that keep its router honest.
Ignorant of:  files, optimizers, processes.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.demo_model.attention import attend
from benchmarks.demo_model.loss import cross_entropy
from benchmarks.demo_model.shape import Shape


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """In x's dtype, whatever the weight is kept in."""
    return F.linear(x, weight.to(x.dtype))


class RmsNorm(nn.Module):
    """With a weight."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(shape.hidden)), shape.norm_eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Grouped queries, rotated."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = s = shape
        self.q_proj = nn.Linear(s.hidden, s.n_heads * s.head_dim, bias=False)
        self.k_proj = nn.Linear(s.hidden, s.n_kv_heads * s.head_dim, bias=False)
        self.v_proj = nn.Linear(s.hidden, s.n_kv_heads * s.head_dim, bias=False)
        self.o_proj = nn.Linear(s.n_heads * s.head_dim, s.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, lengths: Sequence[int]) -> Tensor:
        dim = self.shape.head_dim
        q, k, v = (
            linear(x, p.weight).view(len(x), -1, dim)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = attend(rotate(q, cos, sin), rotate(k, cos, sin), v, lengths)
        return linear(y.reshape(len(x), -1), self.o_proj.weight)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: [T, N, D], cos and sin: [T, 1, D / 2], halves rotated against each other."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Experts(nn.Module):
    """Two of eight small networks for each token, and the losses of choosing them.

    After a forward pass: balance, 1 where every expert is used alike (Switch Transformer, arXiv
    2101.03961, equation 4); z, the mean squared logsumexp of the router's scores (ST-MoE, arXiv
    2202.08906, equation 5); ids: [T, K], the choices; share: [E], each expert's share of them.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.n_experts, self.n_active = shape.n_experts, shape.n_active
        self.gate = nn.Linear(shape.hidden, shape.n_experts, bias=False)
        self.w13 = nn.Parameter(torch.empty(shape.n_experts, 2 * shape.inner, shape.hidden))
        self.w2 = nn.Parameter(torch.empty(shape.n_experts, shape.hidden, shape.inner))

    def forward(self, x: Tensor) -> Tensor:
        logits = F.linear(x.float(), self.gate.weight)
        p = logits.softmax(-1)
        weights, ids = p.topk(self.n_active, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        self.ids = ids
        counts = torch.bincount(ids.view(-1), minlength=self.n_experts)
        self.share = counts.float() / ids.numel()
        self.balance = self.n_experts * (self.share * p.mean(0)).sum()
        self.z = logits.logsumexp(-1).square().mean()
        order = ids.view(-1).argsort(stable=True)
        token = order // self.n_active
        outputs = []
        groups = x.index_select(0, token).split(counts.tolist())
        # unbind: a subscript's gradient would be as large as all experts, once for each.
        ups, downs = self.w13.to(x.dtype).unbind(0), self.w2.to(x.dtype).unbind(0)
        for group, up, down in zip(groups, ups, downs, strict=True):
            a, b = F.linear(group, up).chunk(2, -1)
            outputs.append(F.linear(F.silu(a) * b, down))
        y = torch.cat(outputs) * weights.view(-1)[order][:, None].to(x.dtype)
        return torch.zeros_like(x).index_add(0, token, y)


class Block(nn.Module):
    """Attention, then experts."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm, self.self_attn = RmsNorm(shape), Attention(shape)
        self.post_attention_layernorm, self.block_sparse_moe = RmsNorm(shape), Experts(shape)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, lengths: Sequence[int], dropout: float
    ) -> Tensor:
        y = self.self_attn(self.input_layernorm(x), cos, sin, lengths)
        x = x + (F.dropout(y, dropout) if dropout else y)
        y = self.block_sparse_moe(self.post_attention_layernorm(x))
        return x + (F.dropout(y, dropout) if dropout else y)


class Mixtral(nn.Module):
    """Parameters are named as Hugging Face names them, but for the stacked experts."""

    def __init__(self, shape: Shape, *, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.shape, self.dtype = shape, dtype
        self.embed_tokens = nn.Embedding(shape.n_vocab, shape.hidden)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.n_layers))
        self.norm = RmsNorm(shape)
        for name, p in self.named_parameters():
            if p.dim() > 1:
                into_stream = name.endswith(("o_proj.weight", "w2"))
                nn.init.normal_(p, 0, 0.02 / math.sqrt(2 * shape.n_layers) if into_stream else 0.02)

    def forward(self, ids: Tensor, lengths: Sequence[int], *, dropout: float = 0.0) -> Tensor:
        """Hidden states [T, H] of ids [T], whose documents have these lengths."""
        cos, sin = self.rotations(lengths, ids.device)
        x = self.embed_tokens(ids).to(self.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin, lengths, dropout)
        return self.norm(x)

    def loss(
        self,
        ids: Tensor,
        targets: Tensor,
        lengths: Sequence[int],
        *,
        weights: Tensor | None = None,
        dropout: float = 0.0,
    ) -> Tensor:
        """Nats a token, weighted where a gradient is taken."""
        x = self(ids, lengths, dropout=dropout)
        return cross_entropy(x, self.embed_tokens.weight.to(x.dtype), targets, weights)

    def router_losses(self) -> tuple[Tensor, Tensor]:
        """Balance and z of the last forward pass, mean over layers."""
        moes = [layer.block_sparse_moe for layer in self.layers]
        return (
            torch.stack([m.balance for m in moes]).mean(),
            torch.stack([m.z for m in moes]).mean(),
        )

    def shares(self) -> Tensor:
        """[layers, E] of the last forward pass."""
        return torch.stack([layer.block_sparse_moe.share for layer in self.layers])

    def choices(self) -> Tensor:
        """[layers, T, K] expert ids of the last forward pass."""
        return torch.stack([layer.block_sparse_moe.ids for layer in self.layers])

    def rotations(self, lengths: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosines and sines, [T, 1, D / 2]; positions begin anew with each document."""
        half = torch.arange(0, self.shape.head_dim, 2, device=device) / self.shape.head_dim
        places = torch.cat([torch.arange(n, device=device) for n in lengths])
        angles = torch.outer(places, self.shape.rope_theta**-half)[:, None]
        return angles.cos().to(self.dtype), angles.sin().to(self.dtype)
