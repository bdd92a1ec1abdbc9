"""Rotary positions, the cache, attention of a few tokens.

Knows:        grids and blocks of kernels/rope.cu and attention.cu, how its work is cut.
Ignorant of:  what is attended to.
"""

import math

import torch
from torch import Tensor

from cuda_ext.launch import Launch
from cuda_ext.launches import COUNTER_BYTES

LANES = 32
WARPS = 8  # of a block
MOST_WARPS = 16
NORM_OF_ALL_HEADS = 3  # as ops.py counts norms
ROPE_MULTIPLE = 4  # channels
MOST_HEAD = 256  # channels
TILE_QUERIES = 4  # query heads that one warp attends with
MOST_TILES = 8  # of a key-value head: one warp each
MOST_PARTS = 64  # that one block merges
BLOCKS_OF_MULTIPROCESSOR = 2  # of attention, that its registers hold
PART_POSITIONS = 128  # at least, for a block; one step of its warps takes 64

_FORMATS = {torch.float16: "float16", torch.float32: "float32", torch.int8: "int8"}


def rope_store(
    launch: Launch,
    qkv: Tensor,
    frequencies: Tensor,
    rope_length: float,
    positions: Tensor,
    sequences: Tensor,
    n_heads: int,
    norm: int,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    epsilon: float,
    clamp: float,
    keys: Tensor,
    values: Tensor,
) -> None:
    n_kv_heads, capacity = keys.shape[1], keys.shape[2]
    n_all = n_heads + 2 * n_kv_heads
    head_size, rope_size = qkv.shape[1] // n_all, 2 * frequencies.shape[0]
    _refuse_head(head_size)
    if rope_size % ROPE_MULTIPLE or rope_size > head_size:
        raise ValueError(
            f"{rope_size} channels of a head of {head_size} turn, but multiples of "
            f"{ROPE_MULTIPLE} up to all of them are built"
        )
    # A norm of all heads is summed up by one block.
    warps = min(n_all, MOST_WARPS) if norm == NORM_OF_ALL_HEADS else WARPS
    n_blocks = 1 if norm == NORM_OF_ALL_HEADS else -(-n_all // WARPS)
    launch(
        f"rope/rope_store_{_FORMATS[keys.dtype]}",
        (qkv.shape[0], n_blocks, 1),
        warps * LANES,
        *(qkv, frequencies, positions, sequences),
        *(n_heads, n_kv_heads, head_size, rope_size, rope_length),
        *(norm, q_norm, k_norm, epsilon, clamp),
        *(capacity, keys, values),
    )


def attend(
    launch: Launch,
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    sequences: Tensor,
    n_heads: int,
    window: int,
    score_scale: float,
    sinks: Tensor | None,
    out: Tensor,
    workspace: Tensor,
) -> None:
    """The grid is that of a full cache; blocks that a shorter one does not need leave at once."""
    n_tokens, n_kv_heads, capacity = qkv.shape[0], keys.shape[1], keys.shape[2]
    head_size = out.shape[1] // n_heads
    _refuse_head(head_size)
    group = n_heads // n_kv_heads
    n_tiles = -(-group // TILE_QUERIES)
    if n_tiles > MOST_TILES:
        raise ValueError(
            f"{group} query heads share a key-value head, but up to {MOST_TILES * TILE_QUERIES} "
            "are built"
        )
    n_parts = most_parts(launch.n_multiprocessors, n_tokens, n_kv_heads, capacity)
    queries = 1 if group == 1 else TILE_QUERIES
    lanes = 16 if head_size <= 128 else LANES
    launch(
        f"attention/attend_{_FORMATS[keys.dtype]}_{queries}_{lanes}",
        (n_parts, n_kv_heads, n_tokens),
        WARPS // n_tiles * n_tiles * LANES,
        qkv,
        keys,
        values,
        positions,
        sequences,
        n_heads,
        head_size,
        capacity,
        window,
        n_tiles,
        math.log2(math.e) * score_scale,
        sinks,
        out,
        workspace,
        workspace[COUNTER_BYTES:],
    )


def most_parts(n_multiprocessors: int, n_tokens: int, n_kv_heads: int, capacity: int) -> int:
    """Parts that the positions of one token and key-value head are cut into, at most."""
    fill = -(-BLOCKS_OF_MULTIPROCESSOR * n_multiprocessors // (n_tokens * n_kv_heads))
    return min(fill, -(-capacity // PART_POSITIONS), MOST_PARTS)


def workspace_bytes(
    n_multiprocessors: int, n_tokens: int, n_heads: int, n_kv_heads: int, head_size: int
) -> int:
    """What `attend` needs for up to n_tokens tokens and a cache of any capacity."""
    most = max(
        n * most_parts(n_multiprocessors, n, n_kv_heads, MOST_PARTS * PART_POSITIONS)
        for n in range(1, n_tokens + 1)
    )
    return COUNTER_BYTES + 4 * most * n_heads * (head_size + 2)


def _refuse_head(head_size: int) -> None:
    if head_size % 8 or not 0 < head_size <= MOST_HEAD:
        raise ValueError(
            f"a head has {head_size} channels, but multiples of 8 up to {MOST_HEAD} are built"
        )
