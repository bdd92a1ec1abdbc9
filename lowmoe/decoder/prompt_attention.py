"""Attention of many tokens at once over a cache on any device, by torch's fused kernels.

Knows:        which token sees which, how a cache's numbers are read.
Ignorant of:  layers, how queries and keys were made.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lowmoe.spec import GroupedQueryAttention
from quant.layout import round_up

# Rows of queries that are attended with at once where a mask is needed, which has as many rows.
BLOCK_ROWS = 1024
# Not cuDNN's, which torch prefers on Hopper and Blackwell (its sdp_utils.cpp): it makes a plan for
# each new shape, said to take 20 ms and more, and every prompt and block of one has another.
KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
# Channels more of a head where there are sinks.
SINK_CHANNELS = 8
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
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    window: int | None,
    scale: float,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of the latest tokens.  queries: [T, A, D]; keys, values: [B, S, D] of their dtype.

    The T tokens are the last of the S; each sees those before it and itself, at most `window`.
    scale: of scores; sinks: [A] float32, scores of nothing, which take part in each head's softmax;
    None for none.  Returns [T, A, D].
    """
    head_size, n_sinks = keys.shape[2], 0
    if sinks is not None:
        queries, keys, values = _with_sinks(queries, keys, values, sinks / scale)
        n_sinks = 1
    n_tokens, n_cached = queries.shape[0], keys.shape[1] - n_sinks
    by_head = queries.transpose(0, 1)  # [A, T, D]
    is_whole = n_tokens == n_cached and (window is None or n_tokens <= window)
    if is_whole and keys.dtype == torch.float16 and sinks is None:
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
        visible = _Visible(asking, n_sinks, window)
        parts.append(_attend_block(by_head[:, first:end], keys, values, visible, scale))
    return torch.cat(parts, dim=1).transpose(0, 1)[..., :head_size]


def _with_sinks(
    queries: Tensor, keys: Tensor, values: Tensor, scores: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """A key and value more, before all others, of which query head a has scores[a]; the value is 0.

    The heads get channels for that, in which other keys are 0: two, so that a score of half
    precision has the bits of both, and as many more as keep heads a multiple of what kernels want.
    """
    coarse = scores.to(queries.dtype)
    fine = (scores - coarse.float()).to(queries.dtype)
    more = torch.zeros(
        *queries.shape[:2], SINK_CHANNELS, dtype=queries.dtype, device=queries.device
    )
    more[..., 0], more[..., 1] = coarse, fine
    sink = torch.zeros(keys.shape[0], 1, keys.shape[2] + SINK_CHANNELS).to(keys)
    sink[..., keys.shape[2] : keys.shape[2] + 2] = 1
    wider = [F.pad(cached, (0, SINK_CHANNELS)) for cached in (keys, values)]
    return (
        torch.cat([queries, more], dim=2),
        torch.cat([sink, wider[0]], dim=1),
        torch.cat([torch.zeros_like(sink), wider[1]], dim=1),
    )


@dataclass(frozen=True, slots=True)
class _Visible:
    """What tokens at the positions `asking` see: the sinks, which come first, and their past."""

    asking: slice
    n_sinks: int
    window: int | None

    @property
    def first(self) -> int:
        """The first position that any of them sees."""
        return 0 if self.window is None else max(0, self.asking.start + 1 - self.window)

    def cut(self, cached: Tensor) -> Tensor:
        """Of keys or values [B, sinks and positions, D] those that any of them sees."""
        end = self.n_sinks + self.asking.stop
        if self.first == 0:
            return cached[:, :end]
        seen = cached[:, self.n_sinks + self.first : end]
        return torch.cat([cached[:, : self.n_sinks], seen], dim=1) if self.n_sinks else seen

    def mask(self, place: torch.device) -> Tensor:
        """[tokens, what `cut` leaves]."""
        asks = torch.arange(self.asking.start, self.asking.stop, device=place)[:, None]
        asked = torch.arange(self.first, self.asking.stop, device=place)[None]
        mask = asked <= asks
        mask = mask if self.window is None else mask & (asked > asks - self.window)
        return F.pad(mask, (self.n_sinks, 0), value=True)


def _attend_block(
    queries: Tensor, keys: Tensor, values: Tensor, visible: _Visible, scale: float
) -> Tensor:
    """Queries [A, n, D].  Returns [A, n, D]."""
    n_heads, n_tokens, head_size = queries.shape
    n_kv_heads = keys.shape[0]
    mask = visible.mask(queries.device)  # [n, S]
    # Heads that share keys and values become rows of one: fused kernels with a mask want as many
    # heads on either side.
    rows = queries.reshape(n_kv_heads, -1, head_size)  # [B, A / B * n, D]
    mask = mask.expand(n_heads // n_kv_heads, -1, -1).reshape(rows.shape[1], -1)
    cut = (visible.cut(keys)[None], visible.cut(values)[None])
    with sdpa_kernel(KERNELS):
        out = F.scaled_dot_product_attention(rows[None], *cut, attn_mask=mask, scale=scale)
    return out[0].reshape(n_heads, n_tokens, head_size)


def working_bytes(n_tokens: int, n_context: int, attention: GroupedQueryAttention) -> int:
    """The most memory that `attend_prompt`, and reading a cache for it, takes."""
    n_heads, n_kv_heads = attention.n_heads, attention.n_kv_heads
    head_size, of_number = attention.head_size, 4 + 2
    if attention.sinks:  # wider, put together, cut out
        head_size, of_number = head_size + SINK_CHANNELS, of_number + 3 * 4
    of_queries = 3 * 4 * n_tokens * n_heads * head_size  # queries, blocks of outputs, all of them
    of_the_cache = 2 * n_kv_heads * n_context * head_size * of_number
    mask = (1 + 2 * 4) * min(BLOCK_ROWS, n_tokens * n_heads // n_kv_heads) * n_context
    return of_queries + of_the_cache + mask
