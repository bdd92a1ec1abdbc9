"""What layers keep of the tokens so far: keys and values, or states.

Knows:        one buffer a layer, grown by doubling up to the context.
Ignorant of:  what attention does with them.
"""

import torch
from torch import Tensor

from lowmoe.decoder.computation import Cache
from lowmoe.decoder.state_cache import StateCache, StatefulCache, states_bytes
from lowmoe.spec import (
    Attention,
    GatedDeltaNet,
    GroupedQueryAttention,
    LatentAttention,
    LightningAttention,
    ModelSpec,
)

FIRST_ROOM = 256  # tokens


class LayerCache:
    """What one layer keeps of tokens: keys and values, [S, B, D] each, or what they come from.

    capacity: tokens that may be held.
    """

    def __init__(
        self,
        attention: GroupedQueryAttention | LatentAttention,
        capacity: int,
        dtype: torch.dtype,
    ) -> None:
        self.capacity, self._dtype = capacity, dtype
        of_keys, of_values = attention.kept_shapes
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

    @torch.inference_mode()
    def copy_from(self, other: "LayerCache", n_tokens: int) -> None:
        """Have what another has of the first n_tokens."""
        self.append(other._keys[:n_tokens], other._values[:n_tokens], 0)

    def _grow(self, end: int) -> None:
        room = min(self.capacity, max(end, FIRST_ROOM, 2 * self._keys.shape[0]))
        self._keys, self._values = self._moved(self._keys, room), self._moved(self._values, room)

    def _moved(self, old: Tensor, room: int) -> Tensor:
        new = torch.empty(room, *old.shape[1:], dtype=self._dtype)
        new[: old.shape[0]] = old
        return new


def layer_cache(attention: Attention, capacity: int, dtype: torch.dtype) -> LayerCache | StateCache:
    """What a layer of this kind keeps of at most `capacity` tokens."""
    if isinstance(attention, GatedDeltaNet | LightningAttention):
        return StateCache(attention)
    return LayerCache(attention, capacity, dtype)


class KvCache(StatefulCache):
    """All layers' caches."""

    def __init__(self, spec: ModelSpec, capacity: int, dtype: torch.dtype) -> None:
        super().__init__(spec, capacity)
        self.layers = [
            self.states.get(i) or layer_cache(layer.attention, capacity, dtype)
            for i, layer in enumerate(spec.layers)
        ]

    def _copy_rows(self, other: Cache, n_tokens: int) -> None:
        assert isinstance(other, KvCache)
        for layer, of_other in zip(self.layers, other.layers, strict=True):
            if isinstance(layer, LayerCache) and isinstance(of_other, LayerCache):
                layer.copy_from(of_other, n_tokens)


def cache_bytes(spec: ModelSpec, n_tokens: int, dtype: torch.dtype) -> int:
    """Bytes that keys and values of n_tokens take, and states."""
    kinds = (layer.attention for layer in spec.layers)
    keeping = [k for k in kinds if isinstance(k, GroupedQueryAttention | LatentAttention)]
    per_token = sum(n * size for kind in keeping for n, size in kind.kept_shapes)
    return per_token * n_tokens * dtype.itemsize + states_bytes(spec)
