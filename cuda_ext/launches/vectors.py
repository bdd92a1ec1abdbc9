"""Rows of the embedding, norms, activations, rounding.

Tokens, weights and d begin at multiples of 16 bytes, as whatever torch allocates does.

Knows:        grids and blocks of kernels/vectors.cu.
Ignorant of:  what an embedding or a norm is for.
"""

from torch import Tensor

from cuda_ext.launch import Launch
from cuda_ext.launches import three
from quant.layout import BLOCK_ROWS, PlaneLayout

GROUP_COLUMNS = 128  # one warp's
LANES = 32
WARPS = 4  # of a block whose warps have nothing to tell each other
MOST_WARPS = 32
GROUPS_OF_WARP = 2  # that norm_round keeps in registers, at most


def embed(
    launch: Launch,
    ids: Tensor,
    planes: list[Tensor],
    table: Tensor,
    scale_unit: float,
    d: Tensor,
    x: Tensor,
) -> None:
    n_tokens, n_hidden = x.shape
    launch(
        "vectors/embed",
        _groups_grid(n_tokens, n_hidden),
        WARPS * LANES,
        ids,
        *three(planes),
        len(planes),
        table,
        scale_unit,
        d,
        _padded_rows(planes[0], n_hidden),
        n_hidden,
        x,
    )


def norm_round(
    launch: Launch,
    x: Tensor,
    weight: Tensor,
    epsilon: float,
    d: Tensor,
    normed: Tensor,
    codes: Tensor,
    scales: Tensor,
) -> None:
    """An empty `normed` is not written."""
    n_tokens, n_hidden = x.shape
    n_groups = -(-n_hidden // GROUP_COLUMNS)
    of_warp = -(-n_groups // MOST_WARPS)
    launch(
        f"vectors/norm_round_{of_warp if of_warp <= GROUPS_OF_WARP else 'wide'}",
        (n_tokens, 1, 1),
        -(-n_groups // of_warp) * LANES,
        x,
        weight,
        epsilon,
        d,
        n_hidden,
        int(normed.numel() > 0),
        normed,
        codes,
        scales,
    )


def round_tokens(launch: Launch, x: Tensor, d: Tensor, codes: Tensor, scales: Tensor) -> None:
    n_tokens, n_in = x.shape
    grid = _groups_grid(n_tokens, n_in)
    launch("vectors/round_tokens", grid, WARPS * LANES, x, d, n_in, codes, scales)


def gate_round(
    launch: Launch,
    gate_up: Tensor,
    steepness: float,
    shift: float,
    limit: float,
    normed: Tensor,
    router: Tensor | None,
    d: Tensor,
    codes: Tensor,
    scales: Tensor,
) -> None:
    n_tokens, n_inner = gate_up.shape[0], d.shape[0]
    launch(
        "vectors/gate_round",
        _groups_grid(n_tokens, n_inner),
        WARPS * LANES,
        *(gate_up, steepness, shift, limit),
        *(normed, router, normed.shape[1]),
        *(d, n_inner, codes, scales),
    )


def _groups_grid(n_tokens: int, n_columns: int) -> tuple[int, int, int]:
    """One warp for each group of each token."""
    return n_tokens, -(-n_columns // (GROUP_COLUMNS * WARPS)), 1


def _padded_rows(plane: Tensor, n_in: int) -> int:
    """The rows, padded, of the matrix that a plane codes: the regions of quant/layout.py."""
    one = PlaneLayout(BLOCK_ROWS, n_in)
    of_row_block = one.code_bytes + one.group_scale_bytes + one.row_scale_bytes
    gain_bytes = one.plane_bytes - one.gain_offset
    # What pads the group scales is less than a row block, so it does not count.
    return (plane.shape[0] - gain_bytes) // of_row_block * BLOCK_ROWS
