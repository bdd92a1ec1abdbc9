"""The parts of a pass that are computed: one protocol, implemented in torch, natively, on a GPU.

Knows:        what a decoder asks for; what a pass that goes layer by layer asks for.
Ignorant of:  how it is computed.
"""

from dataclasses import dataclass
from typing import Protocol, TypeVar

from torch import Tensor

from lowmoe.decoder.moe import Routing
from lowmoe.decoder.preference import Preference
from lowmoe.experts.lender import Lender
from lowmoe.experts.store import ExpertStore

L_contra = TypeVar("L_contra", bound=Lender, contravariant=True)


class Cache(Protocol):
    """What is kept of one conversation: keys and values, or states.

    n_tokens: positions filled; a pass sets it when it is through.  capacity: the most there may be.
    """

    n_tokens: int
    capacity: int

    def keep(self, n_tokens: int) -> int:
        """Forget all but the first n_tokens, of those there are; returns how many are kept, which
        is fewer where something in it can only be set back so far.
        """


@dataclass(frozen=True, slots=True)
class Together:
    """Several conversations, each another one, of which a pass has one token each."""

    caches: tuple[Cache, ...]


class Computation(Protocol[L_contra]):
    """Bound to one model's dense weights at load; nothing here chooses again."""

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

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """ids, positions: [T] int64.  Returns [T, H]."""

    def run_layers(self, x: Tensor, cache: Cache | Together, store: L_contra) -> Tensor:
        """All layers for tokens after those in the cache, or one after those in each.

        x: [T, H], T at most max_tokens, which may be reused.  Returns [T, H].
        """

    def logits(self, x: Tensor) -> Tensor:
        """The scores of the next token, [T, V] float32.  x: [T, H]."""


class LayerParts(Protocol):
    """What `layer_by_layer` asks of a computation.  x: [T, H], which may be reused."""

    @property
    def preference(self) -> Preference | None:
        """Which `route` and `foresee` heed; None for none."""

    def attend(self, x: Tensor, layer_id: int, cache: Cache | Together) -> Tensor:
        """x + attention(norm(x)), [T, H], for tokens after those in the cache, or in each."""

    def route(self, x: Tensor, layer_id: int) -> Routing:
        """The experts of each token of x, [T, H]."""

    def foresee(self, x: Tensor, layer_id: int) -> Routing:
        """What `route` would say if x were this layer's input."""

    def mix(self, x: Tensor, routing: Routing, layer_id: int, store: ExpertStore) -> Tensor:
        """x plus the weighted sum of each token's experts, all wanted from the store before.

        routing: the latest of `route`.
        """


def layer_by_layer(
    parts: LayerParts, n_layers: int, x: Tensor, cache: Cache | Together, store: ExpertStore
) -> Tensor:
    """All layers, asking the store for experts as they are needed and likely to be."""
    prefer = parts.preference
    for layer_id in range(n_layers):
        x = parts.attend(x, layer_id, cache)
        if prefer is not None:
            prefer.look(layer_id, store.has)
        routing = parts.route(x, layer_id)
        # What is sure is read before what is guessed.
        store.want(layer_id, routing.wanted())
        if layer_id + 1 < n_layers and not store.has_all:
            # A residual stream changes slowly, so the next layer's own norm and router, applied one
            # layer early, name most of its experts (benchmarks/read_ahead.py).
            if prefer is not None:
                prefer.look(layer_id + 1, store.has)
            store.prefetch(layer_id + 1, parts.foresee(x, layer_id + 1).by_weight())
        x = parts.mix(x, routing, layer_id, store)
        store.read_on()  # while the next layer attends, the disk would have nothing to do
    return x
