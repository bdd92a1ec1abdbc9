"""Keys and values of the tokens so far.

Knows:        one buffer a layer, grown by doubling up to the context.
Ignorant of:  what attention does with them.
"""

import torch
from torch import Tensor

from lowmoe.spec import LayerSpec, ModelSpec

FIRST_ROOM = 256  # tokens


class LayerCache:
    """The keys and values of one layer, [S, B, D] each.  capacity: tokens that may be held."""

    def __init__(self, layer: LayerSpec, capacity: int, dtype: torch.dtype) -> None:
        self._shape = (layer.attention.n_kv_heads, layer.attention.head_size)
        self.capacity, self._dtype = capacity, dtype
        self._keys = self._values = torch.empty(0, *self._shape, dtype=dtype)

    def append(self, keys: Tensor, values: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """Store keys and values of positions first on, [T, B, D] each.

        Returns those of all positions up to them, [S, B, D] each.
        """
        end = first + keys.shape[0]
        assert end <= self.capacity, (end, self.capacity)
        if end > self._keys.shape[0]:
            self._grow(end)
        self._keys[first:end], self._values[first:end] = keys, values
        return self._keys[:end], self._values[:end]

    def _grow(self, end: int) -> None:
        room = min(self.capacity, max(end, FIRST_ROOM, 2 * self._keys.shape[0]))
        self._keys, self._values = self._moved(self._keys, room), self._moved(self._values, room)

    def _moved(self, old: Tensor, room: int) -> Tensor:
        new = torch.empty(room, *self._shape, dtype=self._dtype)
        new[: old.shape[0]] = old
        return new


class KvCache:
    """All layers' caches.  n_tokens: positions filled; set it back to forget the latest."""

    def __init__(self, spec: ModelSpec, capacity: int, dtype: torch.dtype) -> None:
        """capacity: tokens that may be held, at most."""
        self.capacity = capacity
        self.n_tokens = 0
        self.layers = [LayerCache(layer, capacity, dtype) for layer in spec.layers]


def cache_bytes(spec: ModelSpec, n_tokens: int, dtype: torch.dtype) -> int:
    """Bytes that keys and values of n_tokens take."""
    per_token = sum(2 * layer.attention.kv_size for layer in spec.layers)
    return per_token * n_tokens * dtype.itemsize
