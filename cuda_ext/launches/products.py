"""Products with trellis planes: of a few tokens here, of more by the tiles of a prompt.

Knows:        grids and blocks of kernels/linear.cu and kernels/experts.cu, which launches serve how
              many tokens.
Ignorant of:  what is multiplied, and why.
"""

from torch import Tensor

from cuda_ext.launch import Launch
from cuda_ext.launches import COUNTER_BYTES, three, tiles

MOST_DECODED = 8  # tokens, those of one tensor-core product; more take the tiles
FEW_TOKENS = 4  # that one lane's sums have room for half as many of
THREADS = 256
BLOCKS_OF_MULTIPROCESSOR = 2  # kernels/strips.cuh says why
# Dynamic shared memory, by the tokens there is room for: the table of pairs, and with 8 tokens the
# words under way, which with 4 find room between the table's rows.
SHARED_BYTES = {FEW_TOKENS: 64 * 1024, MOST_DECODED: 80 * 1024}
STRIP_ROWS = 128
UNIT_STRIPS = 2  # of gate and up: 128 inner channels


def linear(
    launch: Launch,
    codes: Tensor,
    scales: Tensor,
    planes: list[Tensor],
    table: Tensor,
    scale_unit: float,
    n_out: int,
    n_in: int,
    bias: Tensor | None,
    add: bool,
    y: Tensor,
    workspace: Tensor,
) -> None:
    n_tokens = codes.shape[0]
    if n_tokens > MOST_DECODED:
        tiles.linear(
            launch,
            codes,
            scales,
            planes,
            table,
            scale_unit,
            n_out,
            n_in,
            bias,
            add,
            y,
            workspace,
        )
        return
    launch(
        f"linear/linear_{_room(n_tokens)}",
        (BLOCKS_OF_MULTIPROCESSOR * launch.n_multiprocessors, 1, 1),
        THREADS,
        codes,
        scales,
        n_tokens,
        *three(planes),
        len(planes),
        table,
        scale_unit,
        n_out,
        n_in,
        bias,
        int(add),
        y,
        workspace,
        workspace[COUNTER_BYTES:],
        shared_bytes=SHARED_BYTES[_room(n_tokens)],
    )


def experts_inner(
    launch: Launch,
    codes: Tensor,
    scales: Tensor,
    parts: Tensor,
    n_planes: int,
    table: Tensor,
    scale_unit: float,
    first: Tensor,
    order: Tensor,
    active: Tensor,
    d_inner: Tensor,
    bias: Tensor | None,
    steepness: float,
    shift: float,
    limit: float,
    n_hidden: int,
    n_active: int,
    inner_codes: Tensor,
    inner_scales: Tensor,
    workspace: Tensor,
) -> None:
    """Places of an expert that is not here, whose parts have the address 0, stay as they are."""
    n_tokens = codes.shape[0]
    if n_tokens > MOST_DECODED:
        tiles.experts_inner(
            launch, codes, scales, parts, n_planes, table, scale_unit, first, order, active,
            d_inner, bias, steepness, shift, limit, n_hidden, n_active, inner_codes, inner_scales,
            workspace,
        )  # fmt: skip
        return
    launch(
        f"experts/inner_{_room(n_tokens)}",
        (BLOCKS_OF_MULTIPROCESSOR * launch.n_multiprocessors, 1, 1),
        THREADS,
        codes,
        scales,
        n_tokens,
        parts,
        parts.shape[0],
        n_planes,
        table,
        scale_unit,
        first,
        order,
        active,
        d_inner,
        *(bias, steepness, shift, limit),
        n_hidden,
        d_inner.shape[1],
        n_active,
        inner_codes,
        inner_scales,
        workspace,
        workspace[COUNTER_BYTES:],
        shared_bytes=SHARED_BYTES[_room(n_tokens)],
    )


def experts_down(
    launch: Launch,
    inner_codes: Tensor,
    inner_scales: Tensor,
    parts: Tensor,
    n_planes: int,
    table: Tensor,
    scale_unit: float,
    first: Tensor,
    order: Tensor,
    active: Tensor,
    bias: Tensor | None,
    weights: Tensor,
    n_inner: int,
    x: Tensor,
    workspace: Tensor,
) -> None:
    """An expert that is not here adds nothing."""
    n_tokens, n_hidden = x.shape
    if n_tokens > MOST_DECODED:
        tiles.experts_down(
            launch, inner_codes, inner_scales, parts, n_planes, table, scale_unit, first, order,
            active, bias, weights, n_inner, x, workspace,
        )  # fmt: skip
        return
    n_blocks = BLOCKS_OF_MULTIPROCESSOR * launch.n_multiprocessors
    launch(
        f"experts/down_{_room(n_tokens)}",
        (n_blocks, 1, 1),
        THREADS,
        inner_codes,
        inner_scales,
        parts,
        parts.shape[0],
        n_planes,
        table,
        scale_unit,
        first,
        order,
        active,
        bias,
        weights,
        n_tokens,
        n_hidden,
        n_inner,
        weights.shape[1],
        x,
        workspace,
        workspace[COUNTER_BYTES:],
        workspace[COUNTER_BYTES + _partial_bytes(n_blocks, 1, n_tokens) :],
        shared_bytes=SHARED_BYTES[_room(n_tokens)],
    )


def workspace_bytes(
    n_multiprocessors: int, n_tokens: int, n_hidden: int, n_inner: int, n_active: int
) -> int:
    """What every product of up to n_tokens tokens needs; n_active: experts of a token."""
    n_blocks, decoded = BLOCKS_OF_MULTIPROCESSOR * n_multiprocessors, min(n_tokens, MOST_DECODED)
    inner = _partial_bytes(n_blocks, UNIT_STRIPS, decoded)
    down = _partial_bytes(n_blocks, 1, decoded) + 4 * decoded * n_active * n_hidden
    return max(
        COUNTER_BYTES + max(inner, down),
        tiles.workspace_bytes(n_multiprocessors, n_tokens, n_hidden, n_inner, n_active),
    )


def _room(n_tokens: int) -> int:
    """How many tokens the kernel has room for that takes so many."""
    return FEW_TOKENS if n_tokens <= FEW_TOKENS else MOST_DECODED


def _partial_bytes(n_blocks: int, n_strips: int, n_tokens: int) -> int:
    """Sums of the first and the last strips of each block's share, which others may have too."""
    return 4 * 2 * n_blocks * n_strips * n_tokens * STRIP_ROWS
