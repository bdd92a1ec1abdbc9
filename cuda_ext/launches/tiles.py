"""Products of many tokens with trellis planes, by tensor cores: tiles of tokens and rows.

Knows:        grids, blocks and shared memory of kernels/tiles*.cu, how long a tile takes.
Ignorant of:  what is multiplied, and why.
"""

from torch import Tensor

from cuda_ext.launch import Launch
from cuda_ext.launches import COUNTER_BYTES, three

ROWS = 256  # of a tile; of gate and up, 128 inner channels
TOKENS = (32, 128)  # of a tile; the first where both take as long
THREADS = 256
# How long things take, in the time that a tile takes for one token of one scale group. By count of
# instructions, with two planes: a warp has 690 for the words of a group, 4.5 for each token. What
# comes before a block's first group and after its last takes as long as two groups, another launch
# to add up parts as long as two more.
DECODE_TOKENS = 150
GROUPS_OF_ENDS = 2
GROUPS_OF_ADDING = 2


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
    (n_tokens, n_groups), n_planes, row_tiles = scales.shape, len(planes), -(-n_out // ROWS)
    each, n_parts = _cut(n_tokens, row_tiles, n_groups, launch.n_multiprocessors)
    parts = workspace[COUNTER_BYTES:]
    launch(
        f"tiles_{n_planes}/linear_{each}",
        (-(-n_tokens // each), row_tiles, n_parts),
        THREADS,
        codes,
        scales,
        n_tokens,
        *three(planes),
        table,
        scale_unit,
        n_out,
        n_in,
        bias,
        int(add),
        y,
        parts,
        shared_bytes=_shared_bytes(n_planes, each),
    )
    if n_parts > 1:
        launch(
            "tiles/add_parts",
            (n_tokens, row_tiles, 1),
            THREADS,
            *(parts, n_parts, each, n_out, int(add), y),
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
    """Places of an expert that is not here stay as they are; workspace is not needed."""
    n_experts, n_inner = d_inner.shape
    row_tiles = -(-n_inner // (ROWS // 2))
    each, slots = _expert_tiles(n_experts, order.shape[0], row_tiles, launch.n_multiprocessors)
    launch(
        f"tiles_{n_planes}/inner_{each}",
        (slots, row_tiles, 1),
        THREADS,
        codes,
        scales,
        parts,
        table,
        scale_unit,
        first,
        order,
        active,
        d_inner,
        *(bias, steepness, shift, limit),
        n_hidden,
        n_inner,
        n_active,
        inner_codes,
        inner_scales,
        shared_bytes=_shared_bytes(n_planes, each),
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
    (n_tokens, n_hidden), n_active = x.shape, weights.shape[1]
    row_tiles = -(-n_hidden // ROWS)
    each, slots = _expert_tiles(parts.shape[0], order.shape[0], row_tiles, launch.n_multiprocessors)
    outputs = workspace[COUNTER_BYTES:]
    launch(
        f"tiles_{n_planes}/down_{each}",
        (slots, row_tiles, 1),
        THREADS,
        inner_codes,
        inner_scales,
        parts,
        table,
        scale_unit,
        first,
        order,
        active,
        bias,
        n_hidden,
        n_inner,
        outputs,
        shared_bytes=_shared_bytes(n_planes, each),
    )
    launch(
        "tiles/add_experts",
        (n_tokens, -(-n_hidden // THREADS), 1),
        THREADS,
        outputs,
        weights,
        n_active,
        n_hidden,
        x,
    )


def workspace_bytes(
    n_multiprocessors: int, n_tokens: int, n_hidden: int, n_inner: int, n_active: int
) -> int:
    """What every product of up to n_tokens tokens needs.

    An output of each assignment; or the parts of a product, a tile for each multiprocessor.
    """
    parts = n_multiprocessors * max(TOKENS) * ROWS
    return COUNTER_BYTES + 4 * max(parts, n_tokens * n_active * n_hidden)


def _cut(n_tokens: int, row_tiles: int, n_groups: int, n_multiprocessors: int) -> tuple[int, int]:
    """Tokens of a tile, and parts of its scale groups, so that a product is soon done.

    Several parts only where all their blocks run at once.
    """

    def time(cut: tuple[int, int]) -> int:
        each, n_parts = cut
        blocks = -(-n_tokens // each) * row_tiles * n_parts
        groups = -(-n_groups // n_parts) + GROUPS_OF_ENDS + GROUPS_OF_ADDING * (n_parts > 1)
        return -(-blocks // n_multiprocessors) * groups * (DECODE_TOKENS + min(each, n_tokens))

    cuts = []
    for each in TOKENS:
        n_tiles = -(-n_tokens // each) * row_tiles
        most = min(n_multiprocessors // n_tiles, n_groups)
        cuts += [(each, n_parts) for n_parts in range(1, max(most, 1) + 1)]
    return min(cuts, key=time)


def _expert_tiles(
    n_experts: int, n_places: int, row_tiles: int, n_multiprocessors: int
) -> tuple[int, int]:
    """Tokens of a tile where all experts are asked alike, and tiles that there may be at most.

    How many tokens each expert has only the card knows.
    """
    n_groups = min(n_experts, n_places)
    n_tokens = -(-n_places // n_groups)

    def time(each: int) -> int:
        blocks = n_groups * -(-n_tokens // each) * row_tiles
        return -(-blocks // n_multiprocessors) * (DECODE_TOKENS + min(each, n_tokens))

    each = min(TOKENS, key=time)
    return each, n_places // each + n_groups


def _shared_bytes(n_planes: int, n_tokens: int) -> int:
    """kTileBytes of kernels/tiles.cuh."""
    return 65536 + 12 * n_tokens + 8 * (640 + 1088 * n_planes)
