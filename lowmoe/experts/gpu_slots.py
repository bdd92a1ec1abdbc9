"""The uppermost tier: slots in a GPU's memory, as many as were given, each the size of an expert.

A slot changes hands between passes, in the order of the GPU's work: first its expert disappears
from the table that operations read, then what they may still do with it is awaited by the copy that
overwrites it, and one pass later the new expert enters the table, after that copy. Experts that
leave are dropped, never written back.

Knows:        which expert is in which slot, which deserves one, what is on its way.
Ignorant of:  tokens, routing, what the bits mean, where experts come from.
"""

from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lowmoe.errors import MemoryBudgetError
from lowmoe.experts.pinned_ring import PinnedRing, Sending
from lowmoe.experts.policy import UNKNOWN, Key, Policy, Popularity, UsePolicy
from lowmoe.experts.source import ExpertSource
from lowmoe.experts.to_gpu import ADDRESS_BYTES, ExpertPlaces, Progress, read_to_gpu
from lowmoe.kernels.gpu import Gpu
from quant.layout import MAX_PLANES

MIN_GPU_SLOTS = 2
N_PIECES = 16  # of memory, of which one can be given back
# Layers whose experts are compared between two passes: all of them would cost a large model
# milliseconds a token, and what deserves its place does not change from one token to the next.
LAYERS_COMPARED = 4
# An expert is promoted if it was used so many times as much lately, and so many times more, as the
# one that leaves for it: less would have two alike take turns, a copy each time. A guess, until
# there are recorded routings of large models to fit.
USED_TIMES, USED_MORE = 1.25, 1.0


@dataclass(frozen=True, slots=True)
class _Arrival:
    """An expert being copied to a slot."""

    key: Key
    slot: int
    sending: Sending


class GpuSlots:
    """tables: [L, E, 3] int64 on the GPU, where each expert's parts are, 0 for none.

    n_parts: of an expert; expert_bytes: of all of them.
    """

    def __init__(
        self,
        part_bytes: tuple[int, ...],
        n_experts: Sequence[int],
        gpu: Gpu,
        ring: PinnedRing,
        *,
        n_slots: int,
        popularity: Popularity = UNKNOWN,
        policy: Policy | None = None,
    ) -> None:
        """n_experts: of each layer; policy: None for the one that has proved best.

        Raises MemoryBudgetError for too few slots.
        """
        if n_slots < MIN_GPU_SLOTS:
            raise MemoryBudgetError(
                f"{n_slots} experts fit on the GPU, but {MIN_GPU_SLOTS} must. Give more vram or "
                "fewer bits."
            )
        self.n_parts, self.expert_bytes = len(part_bytes), sum(part_bytes)
        self._n_experts, self._gpu, self._ring = tuple(n_experts), gpu, ring
        self._places, self._popularity = ExpertPlaces(part_bytes), popularity
        self._policy: Policy = policy or UsePolicy(start=popularity)
        n_slots = min(n_slots, sum(n_experts))
        stride, in_piece = self._places.stride, -(-n_slots // N_PIECES)
        sizes = [min(in_piece, n_slots - first) for first in range(0, n_slots, in_piece)]
        self._pieces = [torch.empty(n, stride, dtype=torch.uint8, device=gpu.place) for n in sizes]
        self._free = list(reversed(range(n_slots)))
        self._slot_of: dict[Key, int] = {}
        self._arrival: _Arrival | None = None
        self._next_layer = 0
        self._missed: list[list[Key]] = [[] for _ in n_experts]
        shape = (len(n_experts), max(n_experts), MAX_PLANES)
        self.tables = torch.zeros(shape, dtype=torch.int64, device=gpu.place)
        # What the tables will be once the GPU has done all that was asked for; copied from.
        mirror = gpu.staging(self.tables.nbytes)
        self._mirror = mirror.view(torch.int64).view(shape).zero_()

    @staticmethod
    def slot_bytes(part_bytes: tuple[int, ...]) -> int:
        """GPU memory of one slot."""
        return ExpertPlaces(part_bytes).stride

    @staticmethod
    def table_bytes(n_experts: Sequence[int]) -> int:
        """GPU memory of the tables."""
        return len(n_experts) * max(n_experts) * MAX_PLANES * ADDRESS_BYTES

    @property
    def n_slots(self) -> int:
        """How many experts there is room for."""
        return sum(piece.shape[0] for piece in self._pieces)

    def residents(self) -> list[Key]:
        """The experts that a pass finds there."""
        return sorted(self._slot_of)

    def keys(self) -> Set[Key]:
        """The same, as they change."""
        return self._slot_of.keys()

    def has(self, layer_id: int, expert_id: int) -> bool:
        """Whether a pass that is asked for now finds this expert there."""
        return (layer_id, expert_id) in self._slot_of

    def fill(self, source: ExpertSource, progress: Progress) -> None:
        """Read experts into all slots: the popular ones, and where nobody knows which those are, of
        every layer the first, then the second, and so on: every layer misses as dearly.

        progress: of bytes.  Raises what reading raises.
        """
        most = max(self._n_experts)
        layers = list(enumerate(self._n_experts))
        in_turn = ((layer_id, e) for e in range(most) for layer_id, n in layers if e < n)
        order = self._popularity.ordered(in_turn)

        def put(key: Key, buffers: list[Tensor]) -> None:
            slot = self._free.pop()
            for part, buffer in zip(self._places.of(self._memory(slot)), buffers, strict=True):
                part.copy_(buffer[: part.shape[0]])
            self._settle(key, slot)

        def tell(done: int, total: int) -> None:
            progress(done * self.expert_bytes, total * self.expert_bytes)

        read_to_gpu(source, order[: self.n_slots], put, self._gpu, tell)
        self._gpu.copy(self.tables, self._mirror)

    def record(self, layer_id: int, expert_ids: list[int]) -> None:
        """These experts of a layer are used by a pass, wherever they are."""
        self._policy.record(layer_id, expert_ids)
        keys = [(layer_id, expert_id) for expert_id in expert_ids]
        self._missed[layer_id] = [key for key in keys if key not in self._slot_of]

    def give_back(self) -> int:
        """Leave the last piece of memory to others, once the GPU has done what it was asked for.

        Returns how many slots that were, 0 where too few would be left.
        """
        first = self.n_slots - self._pieces[-1].shape[0]
        if first < MIN_GPU_SLOTS:
            return 0
        if self._arrival is not None:  # whose copy must not go on when the memory is another's
            arrival, self._arrival = self._arrival, None
            arrival.sending.event().wait()
            self._free.append(arrival.slot)
        for key in [key for key, slot in self._slot_of.items() if slot >= first]:
            self._evict(key)
        self._free = [slot for slot in self._free if slot < first]
        self._gpu.event().wait()
        n_slots = self._pieces.pop().shape[0]
        self._gpu.release_unused()  # graphs and cuBLAS do not take theirs from where tensors do
        return n_slots

    # --- promotion, between passes

    def welcome(self) -> Key | None:
        """Let the expert that was on its way take its place; returns it, if there is one.

        Raises what sending it raised.
        """
        if self._arrival is None:
            return None
        arrival, self._arrival = self._arrival, None
        try:
            arrived = arrival.sending.event()
        except BaseException:
            self._free.append(arrival.slot)
            raise
        self._gpu.wait_for(arrived)
        self._settle(arrival.key, arrival.slot)
        self._copy_row(arrival.key)
        return arrival.key

    def candidate(self, can_come: Callable[[Key], bool]) -> Key | None:
        """An expert missed by the last pass that deserves a slot more than one that has it, if any.

        can_come: which of those may be named.
        """
        if self._arrival is not None:
            return None
        n_layers = len(self._n_experts)
        for _ in range(min(LAYERS_COMPARED, n_layers)):
            layer_id = self._next_layer
            self._next_layer = (layer_id + 1) % n_layers
            key = self._best_absent(layer_id, can_come)
            if key is not None and self._may_replace(key):
                return key
        return None

    def promote(self, key: Key, parts: Iterable[Tensor]) -> tuple[Key | None, Sending]:
        """Begin to copy an expert, named by `candidate`, from its parts in RAM.

        Returns the one that leaves for it, and the copy, which reads these parts for a while.
        """
        assert self._arrival is None
        leaving = None if self._free else self._worth_least(key[0])
        slot = self._free.pop() if leaving is None else self._evict(leaving)
        # Whatever may still read from the slot was asked for before now.
        send = partial(self._ring.send, self._places.of(self._memory(slot)), parts)
        sending = self._ring.begin(send, after=self._gpu.event())
        self._arrival = _Arrival(key, slot, sending)
        return leaving, sending

    def _best_absent(self, layer_id: int, can_come: Callable[[Key], bool]) -> Key | None:
        absent = [k for k in self._missed[layer_id] if k not in self._slot_of and can_come(k)]
        return max(absent, key=self._policy.worth) if absent else None

    def _may_replace(self, key: Key) -> bool:
        if self._free:
            return True
        leaving = self._worth_least(key[0])
        if leaving is None:
            return False
        used, used_there = (self._policy.worth(k)[0] for k in (key, leaving))
        return used >= used_there * USED_TIMES + USED_MORE

    def _worth_least(self, layer_id: int) -> Key | None:
        """Of one layer, so that layers keep their shares."""
        keys = [(layer_id, e) for e in range(self._n_experts[layer_id])]
        there = [key for key in keys if key in self._slot_of]
        return min(there, key=self._policy.worth) if there else None

    def _memory(self, slot: int) -> Tensor:
        in_piece = self._pieces[0].shape[0]
        return self._pieces[slot // in_piece][slot % in_piece]

    def _evict(self, key: Key) -> int:
        slot = self._slot_of.pop(key)
        self._mirror[key] = 0
        self._copy_row(key)
        return slot

    def _settle(self, key: Key, slot: int) -> None:
        self._slot_of[key] = slot
        addresses = self._places.addresses(self._memory(slot))
        self._mirror[key][: self.n_parts] = torch.tensor(addresses)

    def _copy_row(self, key: Key) -> None:
        # The row of the mirror stays as it is until the GPU has read it: it changes again after a
        # pass at the earliest, and every pass waits for the GPU.
        self._gpu.copy(self.tables[key], self._mirror[key])
