"""The parts of a pass that are computed: one protocol, an implementation in torch and a native one.

Knows:        what a decoder asks for, layer by layer.
Ignorant of:  how it is computed, the order it is asked in.
"""

from typing import Protocol

from torch import Tensor

from lowmoe.decoder.moe import Routing
from lowmoe.experts.store import ExpertStore


class Cache(Protocol):
    """Keys and values of one conversation.

    n_tokens: positions filled; set it back to forget the latest.  capacity: the most there may be.
    """

    n_tokens: int
    capacity: int


class Computation(Protocol):
    """Bound to one model's dense weights at load; nothing here chooses again.

    T, the tokens of a call, is at most max_tokens in `attend`, `route`, `foresee` and `mix`.
    """

    @property
    def max_tokens(self) -> int:
        """The most tokens that pass through the layers at once."""

    @property
    def working_bytes(self) -> int:
        """The most memory that a call takes beside weights and cache."""

    def new_cache(self, capacity: int) -> Cache:
        """An empty cache for at most `capacity` tokens."""

    def cache_bytes(self, n_tokens: int) -> int:
        """Bytes that keys and values of n_tokens take."""

    def embed(self, ids: Tensor) -> Tensor:
        """ids: [T] int64.  Returns [T, H]."""

    def attend(self, x: Tensor, layer_id: int, cache: Cache) -> Tensor:
        """x + attention(norm(x)), [T, H], for tokens after those in the cache.  x may be reused."""

    def route(self, x: Tensor, layer_id: int) -> Routing:
        """The experts of each token of x, [T, H]."""

    def foresee(self, x: Tensor, layer_id: int) -> Routing:
        """What `route` would say if x were this layer's input."""

    def mix(self, x: Tensor, routing: Routing, layer_id: int, store: ExpertStore) -> Tensor:
        """x plus the weighted sum of each token's experts, all wanted from the store before.

        x: [T, H], which may be reused; routing: the latest of `route`.
        """

    def logits(self, x: Tensor) -> Tensor:
        """The scores of the next token, [T, V] float32.  x: [T, H]."""
