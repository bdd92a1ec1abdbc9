"""Keys and values of the tokens so far.

Knows:        one buffer a layer, grown by doubling up to the context.
Ignorant of:  what attention does with them.
"""

import torch
from torch import Tensor

from lowmoe.spec import LayerSpec, ModelSpec

FIRST_ROOM = 256  # tokens


class LayerCache:
    """What one layer keeps of tokens: keys and values, [S, B, D] each, or what they come from.

    capacity: tokens that may be held.
    """

    def __init__(self, layer: LayerSpec, capacity: int, dtype: torch.dtype) -> None:
        self.capacity, self._dtype = capacity, dtype
        of_keys, of_values = layer.attention.kept_shapes
        self._keys = torch.empty(0, *of_keys, dtype=dtype)
        self._values = torch.empty(0, *of_values, dtype=dtype)

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
        new = torch.empty(room, *old.shape[1:], dtype=self._dtype)
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
    shapes = (shape for layer in spec.layers for shape in layer.attention.kept_shapes)
    per_token = sum(n * size for n, size in shapes)
    return per_token * n_tokens * dtype.itemsize
