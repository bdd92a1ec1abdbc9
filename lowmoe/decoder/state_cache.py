"""What layers keep that cannot forget their latest tokens: states, at a few positions.

Knows:        at which positions states are worth keeping, and how many of them.
Ignorant of:  what is in a state.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from lowmoe.decoder.computation import Cache
from lowmoe.spec import GatedDeltaNet, LightningAttention, ModelSpec, Recurrent

# A prompt that goes on from the last one often differs from it by how the answer begins, such as a
# mark for thoughts, so that a state is kept so many tokens before the end of every pass as well.
TAIL_TOKENS = 16
DECODE_TOKENS = 256  # of an answer, from one kept position to the next
MARKS_BYTES = 512 * 2**20  # what kept positions may take, but for MIN_MARKS
MIN_MARKS, MAX_MARKS = 3, 16  # a prompt has two, and one more is where an answer has come to

State = tuple[Tensor, ...]


class StateCache:
    """One layer's states by position: what it had made of all tokens before."""

    def __init__(self, attention: Recurrent) -> None:
        self._shapes = attention.state_shapes
        self._states: dict[int, State] = {}

    def at(self, position: int) -> State:
        """What was put there; at the beginning, zeros."""
        if position == 0:
            return tuple(torch.zeros(shape) for shape in self._shapes)
        return self._states[position]

    def empty(self) -> State:
        """Memory for one, not set to anything."""
        return tuple(torch.empty(shape) for shape in self._shapes)

    def put(self, position: int, state: State) -> None:
        """Keep a state, which nobody changes any more."""
        assert tuple(tuple(t.shape) for t in state) == self._shapes
        self._states[position] = state

    def share(self, other: "StateCache", positions: Iterable[int]) -> None:
        """Have another's states of these positions, of those that it kept, and no others."""
        self._states = {p: s for p in positions if (s := other._states.get(p)) is not None}

    def keep_only(self, positions: Iterable[int]) -> None:
        """Forget the states of all others."""
        self._states = {p: s for p in positions if (s := self._states.get(p)) is not None}


def stops(n_tokens: int) -> list[int]:
    """After how many of its tokens a pass keeps states: always after the last."""
    early = n_tokens - TAIL_TOKENS
    return [early, n_tokens] if early > 0 else [n_tokens]


def stretches(n_tokens: int) -> Iterator[slice]:
    """A pass's tokens from stop to stop."""
    begin = 0
    for end in stops(n_tokens):
        yield slice(begin, end)
        begin = end


class Marks:
    """Positions that a cache can be set back to."""

    def __init__(self, most: int) -> None:
        """most: at least MIN_MARKS."""
        self.positions: list[int] = []
        self._most = most
        self._of_prompt: list[int] = []  # the latest, where the next most often begins to differ

    def passed(self, first: int, end: int) -> None:
        """A pass went from first to end."""
        new: list[int] = []
        if end - first > 1:
            new = self._of_prompt = [first + n for n in stops(end - first)]
        elif end % DECODE_TOKENS == 0:
            new = [end]
        self.positions = sorted({*self.positions, *new})
        while len(self.positions) > self._most:
            self._drop_one()

    def copy_from(self, other: "Marks", position: int) -> None:
        """Have another's up to a position."""
        self.positions = [p for p in other.positions if p <= position]
        self._of_prompt = [p for p in other._of_prompt if p <= position]

    def at_most(self, position: int) -> int:
        """Go back to the last that is not after this; returns it."""
        self.positions = [p for p in self.positions if p <= position]
        return self.positions[-1] if self.positions else 0

    def _drop_one(self) -> None:
        """Of those that are neither the latest prompt's nor the last, the one between the nearest
        neighbours.
        """
        spared = {*self._of_prompt, self.positions[-1]}
        around = [0, *self.positions]
        gaps = {
            position: after - before
            for before, position, after in zip(around, around[1:], around[2:], strict=False)
            if position not in spared
        }
        self.positions.remove(min(gaps, key=gaps.__getitem__))


class StatefulCache(ABC):
    """A conversation some of whose layers may keep states; how far it can be taken back.

    n_tokens: positions filled. A pass that is interrupted leaves it as it was; what it left in some
    layers is not seen again: keys and values are written over, and the next pass begins from the
    states that this one began from.  states: by the layer's id.
    """

    def __init__(self, spec: ModelSpec, capacity: int) -> None:
        """capacity: tokens that may be held, at most."""
        self.capacity = capacity
        self.states = {
            i: StateCache(layer.attention)
            for i, layer in enumerate(spec.layers)
            if isinstance(layer.attention, GatedDeltaNet | LightningAttention)
        }
        self._marks = Marks(n_marks(spec))
        self._n_tokens = 0

    @property
    def n_tokens(self) -> int:
        return self._n_tokens

    @n_tokens.setter
    def n_tokens(self, end: int) -> None:
        """A pass filled the positions up to `end`.  To go back, see `keep`."""
        first, self._n_tokens = self._n_tokens, end
        assert first <= end, (first, end)
        if self.states:
            self._marks.passed(first, end)
            self._forget_others()

    def keep(self, n_tokens: int) -> int:
        """Forget all but the first n_tokens, and of those what came after the last position that
        states were kept at; returns how many are kept.
        """
        assert n_tokens <= self._n_tokens, (n_tokens, self._n_tokens)
        if self.states and n_tokens < self._n_tokens:
            n_tokens = self._marks.at_most(n_tokens)
        self._n_tokens = n_tokens
        self._forget_others()
        return n_tokens

    def copy_from(self, other: Cache, n_tokens: int) -> int:
        """Have what another has of its first n_tokens, up to the last position of them that states
        were kept at; returns how many.
        """
        assert isinstance(other, type(self))
        assert n_tokens <= other._n_tokens, (n_tokens, other._n_tokens)
        if self.states and n_tokens < other._n_tokens:
            n_tokens = max((p for p in other._marks.positions if p <= n_tokens), default=0)
        self._copy_rows(other, n_tokens)
        self._marks.copy_from(other._marks, n_tokens)
        for layer_id, layer in self.states.items():
            layer.share(other.states[layer_id], {*self._marks.positions, n_tokens})
        self._n_tokens = n_tokens
        return n_tokens

    @abstractmethod
    def _copy_rows(self, other: Cache, n_tokens: int) -> None:
        """What layers without states keep of tokens.  other: of the same class."""

    def _forget_others(self) -> None:
        for layer in self.states.values():
            layer.keep_only({*self._marks.positions, self._n_tokens})


def n_marks(spec: ModelSpec) -> int:
    """How many positions are kept of a model's states."""
    one = state_bytes(spec)
    return min(max(MARKS_BYTES // one, MIN_MARKS), MAX_MARKS) if one else 0


def state_bytes(spec: ModelSpec) -> int:
    """Bytes of all layers' states at one position."""
    kinds = (layer.attention for layer in spec.layers)
    shapes = (s for k in kinds if isinstance(k, GatedDeltaNet | LightningAttention)
              for s in k.state_shapes)  # fmt: skip
    return sum(math.prod(shape) for shape in shapes) * torch.float32.itemsize


def states_bytes(spec: ModelSpec) -> int:
    """The most that all of them take: those kept, the latest, and those that a pass adds."""
    return state_bytes(spec) * (n_marks(spec) + 3)
