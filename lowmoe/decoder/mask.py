"""Which token sees which."""

import torch
from torch import Tensor


def visible(
    n_tokens: int, first: int, window: int | None, chunk: int | None = None
) -> Tensor | None:
    """Which cached token each new one sees, [T, S] bool; None where it is all of them."""
    sees_all = (window is None or first < window) and (chunk is None or first < chunk)
    if n_tokens == 1 and sees_all:
        return None
    asking = torch.arange(first, first + n_tokens)[:, None]
    asked = torch.arange(first + n_tokens)[None]
    mask = asked <= asking
    if window is not None:
        mask &= asked > asking - window
    if chunk is not None:
        mask &= asked // chunk == asking // chunk
    return mask
