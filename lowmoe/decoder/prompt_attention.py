"""Attention of many tokens at once over a cache on any device, by torch's fused kernels.

Knows:        which token sees which, how a cache's numbers are read.
Ignorant of:  layers, how queries and keys were made.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from quant.layout import round_up

# Rows of queries that are attended with at once where a mask is needed, which has as many rows.
BLOCK_ROWS = 1024
# Not cuDNN's, which torch prefers on Hopper and Blackwell (its sdp_utils.cpp): it makes a plan for
# each new shape, said to take 20 ms and more, and every prompt and block of one has another.
KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
SCALE_BYTES = 4  # behind the codes of a head, see lowmoe/kernels/cpu/kv_cache.h


def row_numbers(head_size: int, dtype: torch.dtype) -> int:
    """Numbers that a head of one token takes in a cache; of int8, its scale counts as four."""
    return round_up(head_size, SCALE_BYTES) + SCALE_BYTES if dtype == torch.int8 else head_size


def cached_numbers(rows: Tensor, head_size: int) -> Tensor:
    """What rows of a cache [..., row] stand for, [..., D]: float32 of float32, else float16."""
    if rows.dtype != torch.int8:
        return rows
    scales = rows[..., -SCALE_BYTES:].contiguous().view(torch.float32)
    return (rows[..., :head_size] * scales).half()


def attend_prompt(
    queries: Tensor, keys: Tensor, values: Tensor, *, window: int | None, scale: float
) -> Tensor:
    """Attention of the latest tokens.  queries: [T, A, D]; keys, values: [B, S, D] of their dtype.

    The T tokens are the last of the S; each sees those before it and itself, at most `window`.
    scale: of scores.  Returns [T, A, D].
    """
    n_tokens, n_cached = queries.shape[0], keys.shape[1]
    by_head = queries.transpose(0, 1)  # [A, T, D]
    is_whole = n_tokens == n_cached and (window is None or n_tokens <= window)
    if is_whole and keys.dtype == torch.float16:
        # What fused kernels of half precision know. In float32 this would be done by matrices of
        # all scores.
        with sdpa_kernel(KERNELS):
            out = F.scaled_dot_product_attention(
                by_head[None],
                keys[None],
                values[None],
                is_causal=True,
                scale=scale,
                enable_gqa=True,
            )
        return out[0].transpose(0, 1)
    n_groups = queries.shape[1] // keys.shape[0]
    step = max(1, BLOCK_ROWS // n_groups)
    parts = []
    for first in range(0, n_tokens, step):
        end = min(first + step, n_tokens)
        asking = slice(n_cached - n_tokens + first, n_cached - n_tokens + end)
        parts.append(_attend_block(by_head[:, first:end], keys, values, asking, window, scale))
    return torch.cat(parts, dim=1).transpose(0, 1)


def _attend_block(
    queries: Tensor, keys: Tensor, values: Tensor, asking: slice, window: int | None, scale: float
) -> Tensor:
    """Queries [A, n, D] at the positions `asking`.  Returns [A, n, D]."""
    n_heads, n_tokens, head_size = queries.shape
    n_kv_heads = keys.shape[0]
    first = 0 if window is None else max(0, asking.start + 1 - window)
    seen = slice(first, asking.stop)
    mask = _visible(asking, seen, window, queries.device)  # [n, S]
    # Heads that share keys and values become rows of one: fused kernels with a mask want as many
    # heads on either side.
    rows = queries.reshape(n_kv_heads, -1, head_size)  # [B, A / B * n, D]
    mask = mask.expand(n_heads // n_kv_heads, -1, -1).reshape(rows.shape[1], -1)
    with sdpa_kernel(KERNELS):
        out = F.scaled_dot_product_attention(
            rows[None], keys[None, :, seen], values[None, :, seen], attn_mask=mask, scale=scale
        )
    return out[0].reshape(n_heads, n_tokens, head_size)


def _visible(asking: slice, seen: slice, window: int | None, place: torch.device) -> Tensor:
    asks = torch.arange(asking.start, asking.stop, device=place)[:, None]
    asked = torch.arange(seen.start, seen.stop, device=place)[None]
    mask = asked <= asks
    return mask if window is None else mask & (asked > asks - window)


def working_bytes(
    n_tokens: int, n_context: int, n_heads: int, n_kv_heads: int, head_size: int
) -> int:
    """The most memory that `attend_prompt`, and reading a cache for it, takes."""
    of_queries = 3 * 4 * n_tokens * n_heads * head_size  # queries, blocks of outputs, all of them
    of_the_cache = 2 * n_kv_heads * n_context * head_size * (4 + 2)
    mask = (1 + 2 * 4) * min(BLOCK_ROWS, n_tokens * n_heads // n_kv_heads) * n_context
    return of_queries + of_the_cache + mask
