"""Hands out experts, wherever they live.

Knows:        tiers (RAM, disk), byte budgets, which expert was used last, what is on its way.
Ignorant of:  tokens, routing, model families, what the bits mean.
"""

import contextlib
import itertools
from collections.abc import Callable, Collection, Iterator, Sequence, Set
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait

from torch import Tensor

from lowmoe.errors import MemoryBudgetError
from lowmoe.experts.foresight import Foresight
from lowmoe.experts.ledger import Ledger, Traffic
from lowmoe.experts.lender import NoLongerWanted, Tier
from lowmoe.experts.policy import UNKNOWN, Key, Policy, Popularity, UsePolicy
from lowmoe.experts.source import CoarseFirst, ExpertSource
from lowmoe.experts.tier import RamTier, Slot
from lowmoe.experts.uses import Uses

MIN_SLOTS = 2  # one to compute with, one to read into
# Reads under way at once: with reads as large as experts, four reach the speed of plain reads
# (benchmarks/disk_reads.py; which has as many of those).
N_READERS = 4


class ExpertStore:
    """Lends experts as bytes.  One thread asks; reads run beside it.

    Laws, held by tests: RAM never above the budget; what is lent is never moved or dropped; what
    is lent does not depend on the budget.
    """

    def __init__(
        self,
        source: ExpertSource,
        *,
        ram_budget_bytes: int,
        n_experts_total: int,
        popularity: Popularity = UNKNOWN,
        coarse: CoarseFirst | None = None,
        policy: Policy | None = None,
        uses: Uses | None = None,
        readers: Executor | None = None,
    ) -> None:
        """coarse: reads what is missed, whose other parts are read when it is wanted again;
        policy: None for the one that has proved best (docs/plan.md); uses: None to count none;
        readers: None for threads.

        Raises MemoryBudgetError where the budget cannot hold two experts.
        """
        slot_bytes = sum(source.buffer_bytes)
        if ram_budget_bytes < MIN_SLOTS * slot_bytes:
            raise MemoryBudgetError(
                f"{max(ram_budget_bytes, 0)} bytes of RAM are left for experts, but two of "
                f"{slot_bytes} bytes must fit. Give at least "
                f"{MIN_SLOTS * slot_bytes - ram_budget_bytes} bytes more."
            )
        n_slots = min(ram_budget_bytes // slot_bytes, max(n_experts_total, MIN_SLOTS))
        self._n_experts_total = n_experts_total
        self._tier = RamTier(source.buffer_bytes, n_slots)
        self._source, self._coarse = source, coarse
        self._policy: Policy = policy or UsePolicy(start=popularity)
        self._popularity, self.uses = popularity, uses
        self._foresight = Foresight()
        self._guesses: list[tuple[int, Key]] = []  # of the latest prefetch, with their ranks
        self._ledger = Ledger()
        self._wanted: list[Key] = []
        self._is_wanted: Callable[[], bool] | None = None
        self._is_complete = self._is_closed = False
        self._rest: Iterator[Key] | None = None  # what read_rest has not come to yet
        self._readers = readers or ThreadPoolExecutor(N_READERS, thread_name_prefix="lowmoe-read")

    def __enter__(self) -> "ExpertStore":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def tier(self) -> Tier:
        """Experts are computed from RAM."""
        return "ram"

    @property
    def n_slots(self) -> int:
        """How many experts RAM can hold at once."""
        return self._tier.n_slots

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert in RAM."""
        return self._tier.slot_bytes

    @property
    def resident_bytes(self) -> int:
        """Bytes of RAM taken for experts so far."""
        return self._tier.used_bytes

    @property
    def unfilled_bytes(self) -> int:
        """Bytes of RAM that it has been given and will yet take."""
        if self._is_closed:
            return 0
        return self._tier.n_slots * self._tier.slot_bytes - self.resident_bytes

    @property
    def has_all(self) -> bool:
        """Whether every expert is in RAM or on its way there, so that none need be foreseen."""
        return len(self._tier.residents) == self._n_experts_total

    @property
    def has_room_for_all(self) -> bool:
        """Whether the budget holds every expert, read yet or not."""
        return self._tier.n_slots >= self._n_experts_total

    @property
    def is_complete(self) -> bool:
        """Whether every expert is in RAM, where each then has a slot of its own for good."""
        if not self._is_complete:
            slots = self._tier.residents.values()
            self._is_complete = self.has_all and all(slot.is_whole for slot in slots)
        return self._is_complete

    def lend_all(self, n_layers: int) -> list[list[tuple[Tensor, ...]]]:
        """Every expert's buffers by layer and id, until the store closes; it must be complete."""
        assert self.is_complete
        layers: list[list[tuple[Tensor, ...]]] = [[] for _ in range(n_layers)]
        for layer_id, expert_id in sorted(self._tier.residents):
            slot = self._tier.residents[layer_id, expert_id]
            slot.lent += 1
            layers[layer_id].append(tuple(slot.buffers))
        return layers

    def count_used(self, n_experts: int) -> None:
        """Count experts that were used since `lend_all`; `uses` says which, if whoever computed
        added to it.
        """
        self._ledger.lent(in_ram=n_experts, on_disk=0, expert_bytes=self._tier.slot_bytes)

    def traffic(self) -> Traffic:
        """What was lent and read so far."""
        return self._ledger.traffic()

    def give_back(self) -> bool:
        """RAM is within its budget."""
        return False

    def residents(self) -> dict[int, list[int]]:
        """The experts in RAM now, by layer; not those still being read."""
        layers: dict[int, list[int]] = {}
        for layer_id, expert_id in sorted(filter(self._is_ready, self._tier.residents)):
            layers.setdefault(layer_id, []).append(expert_id)
        return layers

    def in_memory(self) -> dict[Tier, Collection[Key]]:
        """Those in RAM."""
        return {"ram": [key for key, slot in self._tier.residents.items() if slot.is_ready]}

    def keys(self) -> Set[Key]:
        """The experts in RAM or on their way there."""
        return self._tier.residents.keys()

    def has(self, layer_id: int, expert_id: int) -> bool:
        """Whether an expert is in RAM now."""
        return self._is_ready((layer_id, expert_id))

    def has_whole(self, layer_id: int, expert_id: int) -> bool:
        """Whether all parts of an expert are in RAM now."""
        slot = self._tier.residents.get((layer_id, expert_id))
        return slot is not None and slot.is_whole

    @contextlib.contextmanager
    def while_wanted(self, is_wanted: Callable[[], bool]) -> Iterator[None]:
        """A block in which `want` raises NoLongerWanted once is_wanted says so: of a prompt, a pass
        reads nearly every expert, which may be minutes of a slow disk.
        """
        self._is_wanted = is_wanted
        try:
            yield
        finally:
            self._is_wanted = None

    def require_wanted(self) -> None:
        """Raises NoLongerWanted where `while_wanted` asks for it."""
        is_wanted = self._is_wanted
        if is_wanted is not None and not is_wanted():
            raise NoLongerWanted

    def want(self, layer_id: int, expert_ids: Collection[int]) -> None:
        """Say which experts a layer needs now: counts them as used and starts reading.

        They stay in place until `portions` has handed them out.  Raises NoLongerWanted instead.
        """
        self.require_wanted()
        wanted = sorted(set(expert_ids))
        self._policy.record(layer_id, wanted)
        if self.uses is not None:
            self.uses.add(layer_id, wanted)
        self._learn(layer_id, wanted)
        ready: list[Key] = []
        others: list[Key] = []
        for expert_id in wanted:
            key = (layer_id, expert_id)
            slot = self._tier.residents.get(key)
            (ready if slot is not None and slot.is_ready else others).append(key)
            if slot is not None and slot.guessed and not slot.has_failed:
                slot.guessed = False
                self._ledger.guess(right=True)
        self._ledger.lent(
            in_ram=len(ready), on_disk=len(others), expert_bytes=self._tier.slot_bytes
        )
        self._wanted = ready + others
        if others:
            self._forget_failures(others)
            self._read_wanted()
        if self._coarse is not None:  # behind what this layer waits for
            self._refine(self._coarse.rest, ready)

    def _refine(self, rest: ExpertSource, keys: list[Key]) -> None:
        """Begin to read what is missing of experts that are wanted again."""
        for slot in [self._tier.residents[key] for key in keys]:
            if not slot.is_whole and slot.refining is None and slot.key is not None:
                buffers = slot.buffers[-len(rest.buffer_bytes) :]
                slot.refining = self._readers.submit(self._read, rest, slot.key, buffers)

    def portions(self) -> Iterator[list[int]]:
        """The experts wanted, in groups to borrow one after the other, reads running ahead.

        Those in RAM come first, so that the others' reads hide behind their computation.
        """
        while self._wanted:
            ready = [key for key in self._wanted[: self.n_slots] if self._is_ready(key)]
            group = ready or self._wanted[:1]
            yield [expert_id for _, expert_id in group]
            if len(group) == len(self._wanted):
                self._wanted = []
                return
            self._wanted = [key for key in self._wanted if key not in group]
            self._read_wanted()

    def portions_in_order(self, n_most: int) -> Iterator[list[int]]:
        """The same in the order of their ids, n_most at a time: for whoever's sums are rounded
        otherwise in another order, which here does not depend on what is in RAM.
        """
        self._wanted.sort()
        while self._wanted:
            group = self._wanted[: min(n_most, self.n_slots)]
            self._read_wanted()
            yield [expert_id for _, expert_id in group]
            self._wanted = self._wanted[len(group) :]

    def _read_wanted(self) -> None:
        near = self._wanted[: self.n_slots]
        # All of them, though few are read at once: what is guessed next is to wait behind them.
        keep = set(near)
        for key in [key for key in near if not self._is_ready(key)]:
            self._start_read(key, keep)

    @contextlib.contextmanager
    def borrow(
        self, layer_id: int, expert_ids: Collection[int]
    ) -> Iterator[dict[int, tuple[Tensor, ...]]]:
        """Lend experts until the block ends: {expert_id: buffers, uint8, one a part}.

        Raises what reading raised, and MemoryBudgetError for more experts than there are slots.
        """
        if len(expert_ids) > self.n_slots:
            raise MemoryBudgetError(
                f"{len(expert_ids)} experts are wanted at once, but RAM is given to {self.n_slots}."
            )
        keys = [(layer_id, e) for e in expert_ids]
        lent: list[Slot] = []
        try:
            for key in keys:
                slot = self._tier.residents.get(key) or self._lend(key, keys)
                slot.lent += 1
                lent.append(slot)
            for slot in lent:
                if not slot.is_ready:
                    assert slot.filling is not None
                    slot.filling.result()
            yield {s.key[1]: self._parts_of(s) for s in lent if s.key is not None}
        finally:
            for slot in lent:
                slot.lent -= 1
                if slot.lent == 0 and slot.has_failed:
                    self._tier.clear(slot)  # so that the next one who asks reads again

    def _parts_of(self, slot: Slot) -> tuple[Tensor, ...]:
        """Those of a ready one that may be lent."""
        if self._coarse is None or slot.is_whole:
            return tuple(slot.buffers)
        first = slot.buffers[: self._coarse.n_first]
        self._ledger.lent_coarse(self._tier.slot_bytes - sum(part.numel() for part in first))
        return tuple(first)

    def prefetch(self, layer_id: int, expert_ids: Collection[int]) -> None:
        """Start reading experts that will likely be asked for next, where there is room.

        The likeliest first; those whose rank has been wrong too often are not read.
        """
        likely = [(layer_id, e) for e in expert_ids][: max(1, self.n_slots // 2)]
        absent = [(rank, key) for rank, key in enumerate(likely) if key not in self._tier.residents]
        self._guesses = absent
        trusted = [key for rank, key in absent if self._foresight.trusts(rank)]
        keep = {*likely, *self._wanted}
        for key in trusted:
            slot = self._start_read(key, keep)
            if slot is None:
                return
            slot.guessed = True
            self._ledger.guess(right=False)

    def _learn(self, layer_id: int, wanted: Collection[int]) -> None:
        """Compare what was guessed with what a layer wants.

        Wrong guesses, and those of a pass that was given up, are not read where that has not begun.
        """
        for rank, key in self._guesses:
            if key[0] == layer_id:
                self._foresight.learn(rank, came_true=key[1] in wanted)
            if key[0] != layer_id or key[1] not in wanted:
                self._give_up(key)
        self._guesses = []

    def _give_up(self, key: Key) -> None:
        """Empty the slot of an expert whose reading has not begun."""
        slot = self._tier.residents.get(key)
        if slot is not None and slot.guessed and slot.lent == 0 and slot.refining is None:
            assert slot.filling is not None
            if slot.filling.cancel():
                self._tier.clear(slot)
                self._ledger.guess_dropped()

    def read_rest(self, n_experts: Sequence[int], elsewhere: Collection[Key] = ()) -> None:
        """Read on beside what is wanted: towards a complete store where RAM will hold all of it, or
        where it is known which are popular, those until RAM is full.

        n_experts: of each layer, the same at every call; elsewhere: those that are not needed here.
        An expert that nobody has asked for yet would make someone wait later; and a complete store
        is computed from faster.
        """
        if self._rest is None:
            fits = self.n_slots >= self._n_experts_total - len(elsewhere)
            others = frozenset(elsewhere)
            keys = ((layer, e) for layer, n in enumerate(n_experts) for e in range(n))
            popular_first = (
                self._popularity.ordered(keys) if fits or self._popularity.shares else ()
            )
            self._rest = (key for key in popular_first if key not in others)
        if not self.read_on() and self._coarse is not None:
            ready = filter(self._is_ready, self._tier.residents)
            coarse = [key for key in ready if not self._tier.residents[key].is_whole]
            self._refine(self._coarse.rest, coarse[: self._n_spare_reads])

    def read_on(self) -> bool:
        """More of what `read_rest` has begun, if readers have time for it; whether any was."""
        begun = False
        if self._rest is None:
            return begun
        absent = (key for key in self._rest if key not in self._tier.residents)
        for _ in range(self._n_spare_reads):
            # Nothing that was asked for leaves for what was not.
            if self._tier.is_full or (key := next(absent, None)) is None:
                break
            self._start_read(key, set(), whole=True)
            begun = True
        return begun

    @property
    def _n_spare_reads(self) -> int:
        """How many more may be begun, the others being for what is wanted."""
        return max(0, N_READERS // 2 - self._ledger.n_reads_now)

    def exchange(self, arrived: Key, left: Key) -> None:
        """One expert has arrived above and another has left there: read this one, in the place of
        the other's copy where RAM is full.
        """
        slot = self._tier.residents.get(arrived)
        if self._tier.is_full and slot is not None and slot.lent == 0 and slot.is_settled:
            self._tier.clear(slot)
        if not self._tier.is_full:
            self._start_read(left, set(), whole=True)

    def close(self) -> None:
        """Wait for reads under way and give their threads back."""
        self._is_closed = True
        self._readers.shutdown(wait=True, cancel_futures=True)

    # --- one expert

    def _is_ready(self, key: Key) -> bool:
        slot = self._tier.residents.get(key)
        return slot is not None and slot.is_ready

    def _forget_failures(self, keys: list[Key]) -> None:
        """Guesses whose reading failed are read again; only who needs an expert gets its error."""
        for slot in [self._tier.residents[key] for key in keys if key in self._tier.residents]:
            if slot.lent == 0 and slot.has_failed:
                self._tier.clear(slot)

    def _lend(self, key: Key, keys: list[Key]) -> Slot:
        """The slot that `key`, one of the keys borrowed together, is being read into."""
        # As many wanted ones as fit beside these stay too, so that none is read twice.
        keep = set(list(dict.fromkeys([*keys, *self._wanted]))[: self.n_slots])
        slot = self._start_read(key, keep)
        while slot is None:
            self._await_any_read(keep)
            slot = self._start_read(key, keep)
        return slot

    def _start_read(self, key: Key, keep: set[Key], *, whole: bool = False) -> Slot | None:
        """The slot an expert is or will be in; None if every slot is needed for something else.

        whole: not only its first parts, where misses are coarse.
        """
        if key in self._tier.residents:
            return self._tier.residents[key]
        slot = self._tier.take_free() or self._evict(key[0], keep)
        if slot is None:
            return None
        self._tier.settle(slot, key)
        source = self._source
        if self._coarse is not None and not whole:
            source, slot.coarse = self._coarse.first, True
        buffers = slot.buffers[: len(source.buffer_bytes)]
        try:
            slot.filling = self._readers.submit(self._read, source, key, buffers)
        except BaseException:  # Ctrl-C, or no more threads: nobody would ever fill it
            self._tier.clear(slot)
            raise
        return slot

    def _evict(self, layer_id: int, keep: set[Key]) -> Slot | None:
        """Empty a slot for a layer: that of the expert worth least which nobody needs now, of that
        layer where it has its share, else of the one that has most.

        Layers are passed one after another, so what all of them used least lately is often what
        the next one needs: a share for each finds more (docs/plan.md), and sooner.
        """
        residents, by_layer = self._tier.residents, self._tier.by_layer
        if len(by_layer.get(layer_id, ())) * len(by_layer) >= self.n_slots:
            first = [layer_id]
        else:
            first = [max(by_layer, key=lambda layer: len(by_layer[layer]))]
        for layer in itertools.chain(first, by_layer):
            slots = [residents[key] for key in by_layer[layer] if key not in keep]
            idle = [slot for slot in slots if slot.lent == 0 and slot.is_settled]
            if idle:
                self._tier.clear(min(idle, key=lambda slot: self._policy.worth(slot.key or (0, 0))))
                return self._tier.take_free()
        return None

    def _read(self, source: ExpertSource, key: Key, buffers: list[Tensor]) -> None:
        self._ledger.read_begins()
        n_bytes = 0
        try:
            n_bytes = source.read(*key, buffers)
        finally:
            self._ledger.read_ends(n_bytes)

    def _await_any_read(self, keep: set[Key]) -> None:
        # A read that ended a moment ago counts too: its slot was not yet free for _evict.
        reads: list[Future[None]] = [
            slot.refining or slot.filling
            for key, slot in self._tier.residents.items()
            if slot.filling is not None and slot.lent == 0 and key not in keep
        ]
        assert reads, "every slot is lent or wanted: more borrowed than there are slots"
        wait(reads, return_when="FIRST_COMPLETED")
