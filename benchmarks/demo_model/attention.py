"""Causal attention within each of the documents that lie behind each other in a batch.

Knows:        queries, keys, values; where documents begin.
Ignorant of:  projections, positions, the rest of the model.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# Scores of 128 queries stay in a core's 1 MB cache up to about 1024 keys, and half of what the
# mask would hide is never computed: 2 to 4 times as fast on a CPU as scaled_dot_product_attention.
QUERIES = 128


def attend(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
    """Let every token see its own document up to itself.

    q: [T, N, D], k and v: [T, G, D], N a multiple of G; lengths: tokens of each document, T in all.
    Returns [T, N, D].
    """
    assert sum(lengths) == len(q)
    if q.is_cuda:
        return attend_padded(q, k, v, lengths)
    return InChunks.apply(q, k, v, tuple(lengths))


def attend_padded(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
    """The same with documents filled up to the longest: few calls, for a GPU."""
    longest, device = max(lengths), q.device
    sizes = torch.tensor(lengths, device=device)
    place = torch.arange(longest, device=device)
    real = place < sizes[:, None]  # [documents, longest]

    def filled(x: Tensor) -> Tensor:
        padded = x.new_zeros(len(lengths), longest, *x.shape[1:])
        return padded.masked_scatter(real[..., None, None], x).transpose(1, 2)

    y = F.scaled_dot_product_attention(
        filled(q), filled(k), filled(v), is_causal=True, enable_gqa=True
    )
    return y.transpose(1, 2)[real]


def chunks(lengths: Sequence[int]) -> list[tuple[int, int, int]]:
    """(the document's first token, first query, end of the queries), a chunk each."""
    found, first = [], 0
    for length in lengths:
        end = first + length
        found += [(first, a, min(a + QUERIES, end)) for a in range(first, end, QUERIES)]
        first = end
    return found


class InChunks(torch.autograd.Function):
    """Forward and backward by hand: autograd would fill a gradient of all keys for each chunk."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> Tensor:
        (n_tokens, n_heads, dim), n_kv = q.shape, k.shape[1]
        group = n_heads // n_kv
        # [G, N / G, T, D] and [G, T, D]
        qs = (q * dim**-0.5).view(n_tokens, n_kv, group, dim).permute(1, 2, 0, 3).contiguous()
        ks, vs = k.transpose(0, 1).contiguous(), v.transpose(0, 1).contiguous()
        out = torch.empty_like(qs)
        later = torch.full((QUERIES, QUERIES), float("-inf"), dtype=q.dtype).triu(1)
        weights = []
        for first, a, b in chunks(lengths):
            chunk = qs[:, :, a:b].reshape(n_kv, -1, dim)
            scores = torch.bmm(chunk, ks[:, first:b].transpose(1, 2))
            scores.view(n_kv, group, b - a, b - first)[..., a - first :] += later[: b - a, : b - a]
            p = scores.softmax(-1)
            out[:, :, a:b] = torch.bmm(p, vs[:, first:b]).view(n_kv, group, b - a, dim)
            weights.append(p)
        ctx.save_for_backward(qs, ks, vs, *weights)
        ctx.lengths = lengths
        return out.permute(2, 0, 1, 3).reshape(n_tokens, n_heads, dim)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        qs, ks, vs, *weights = ctx.saved_tensors
        n_kv, group, n_tokens, dim = qs.shape
        gs = grad.view(n_tokens, n_kv, group, dim).permute(1, 2, 0, 3).contiguous()
        # float32: a document's first keys sum over all its chunks.
        gq = torch.empty_like(qs)
        gk, gv = (torch.zeros_like(x, dtype=torch.float32) for x in (ks, vs))
        for p, (first, a, b) in zip(weights, chunks(ctx.lengths), strict=True):
            g = gs[:, :, a:b].reshape(n_kv, -1, dim)
            gv[:, first:b] += torch.bmm(p.transpose(1, 2), g)
            gp = torch.bmm(g, vs[:, first:b].transpose(1, 2))
            gscores = torch.ops.aten._softmax_backward_data(gp, p, -1, p.dtype)
            gq[:, :, a:b] = torch.bmm(gscores, ks[:, first:b]).view(n_kv, group, b - a, dim)
            chunk = qs[:, :, a:b].reshape(n_kv, -1, dim)
            gk[:, first:b] += torch.bmm(gscores.transpose(1, 2), chunk)
        gq = gq.permute(2, 0, 1, 3).reshape(n_tokens, -1, dim) * dim**-0.5
        return gq, gk.transpose(0, 1).to(grad.dtype), gv.transpose(0, 1).to(grad.dtype), None
