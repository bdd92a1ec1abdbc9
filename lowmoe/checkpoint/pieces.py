"""Cutting a role's tensor out of what was read of a file, and refusing numbers that are none.

Knows:        pieces: rows, of heads or of all, columns for rows, pairs of channels for halves,
              heads that lie apart.
Ignorant of:  files, and which family keeps which tensor how.
"""

import torch
from torch import Tensor

from lowmoe.errors import CheckpointError
from lowmoe.spec import Piece


def cut_out(tensor: Tensor, piece: Piece) -> Tensor:
    """What was read of a file, rows first..first+count of it, as the role's tensor."""
    if tensor.dim() > len(piece.wanted):
        tensor = tensor[0] if tensor.shape[0] == 1 else tensor.squeeze(1)
    if piece.transposed:
        tensor = tensor.T
    if piece.n_heads > 1:
        tensor = tensor.unflatten(0, (piece.n_heads, -1))[:, piece.rows].flatten(0, 1)
    else:
        tensor = tensor[piece.rows]
    if piece.less_one:
        tensor = tensor.float() + 1
    if piece.minus_exp:
        tensor = _logarithms(tensor, piece.name)
    assert tensor.shape == piece.wanted, (piece, tensor.shape)
    if piece.tiled is not None:
        tensor = _side_by_side(tensor, *piece.tiled)
    if piece.pairs is not None:
        tensor = _halves_of_pairs(tensor, *piece.pairs)
    return tensor.contiguous()


def _logarithms(tensor: Tensor, name: str) -> Tensor:
    if not bool((tensor < 0).all()):
        raise CheckpointError(
            f"{name} holds {float(tensor.max())}, but how fast a state decays is kept as a number "
            "under 0. The file is damaged; download it again."
        )
    return tensor.float().neg().log()


def _side_by_side(tensor: Tensor, axis: int, first: int, n_groups: int, n_heads: int) -> Tensor:
    """Heads that lay in turns, one of each group, so that those of a group lie together."""
    size = (tensor.shape[axis] - first) // n_heads
    heads = torch.arange(n_heads).view(-1, n_groups).T.reshape(-1, 1)
    moved = first + (heads * size + torch.arange(size)).flatten()
    return tensor.index_select(axis, torch.cat([torch.arange(first), moved]))


def _halves_of_pairs(rows: Tensor, head_size: int, first: int, count: int) -> Tensor:
    """Rows of heads whose channels first..first+count turn in pairs, so that halves turn instead.

    Queries and keys change alike, so their products do not.
    """
    order = torch.arange(head_size)
    turned = order[first : first + count]
    order[first : first + count] = torch.cat([turned[0::2], turned[1::2]])
    heads = rows.view(-1, head_size, *rows.shape[1:])
    return heads[:, order].reshape(rows.shape)


def require_finite(tensor: Tensor, name: str, file: str) -> Tensor:
    """The tensor.  Raises CheckpointError for NaN and infinity."""
    if not _is_finite(tensor):
        raise CheckpointError(
            f"{file}: {name} holds NaN or infinity, but weights are finite numbers. "
            "The file is damaged or the model was trained to pieces; download it again or "
            "choose another."
        )
    return tensor


def _is_finite(tensor: Tensor) -> bool:
    # NaN is the least and the greatest of whatever it is among. At tens of GB/s on one core and
    # without a copy this is no cost beside the disk; isfinite would be twenty times slower.
    return tensor.numel() == 0 or all(bool(t.isfinite()) for t in tensor.aminmax())
