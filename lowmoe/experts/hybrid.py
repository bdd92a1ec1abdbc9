"""Experts on a GPU, in RAM and on disk: who has which, what is counted, what moves up.

Knows:        the tiers and their order.
Ignorant of:  tokens, routing, what the bits mean, how slots and buffers are kept.
"""

from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace

from torch import Tensor

from lowmoe.experts.gpu_slots import GpuSlots
from lowmoe.experts.ledger import LayerBytes, Traffic
from lowmoe.experts.lender import Tier
from lowmoe.experts.pinned_ring import PinnedRing, Sending
from lowmoe.experts.policy import Key
from lowmoe.experts.staging import Passage, Staging
from lowmoe.experts.store import ExpertStore
from lowmoe.experts.uses import Uses


@dataclass(slots=True, kw_only=True)
class HybridExperts:
    """slots: on the GPU; staging: for those that pass through it; ram: with the disk below it;
    note: hears what is worth knowing; uses: None to count none.
    """

    slots: GpuSlots
    staging: Staging
    ring: PinnedRing
    ram: ExpertStore
    n_experts_total: int
    note: Callable[[str], None] = lambda text: None
    uses: Uses | None = None
    has_all: bool = False  # whether none had to be read from disk when the latest pass began
    _n_hits: int = 0
    _n_coarse: int = 0
    _n_promoted: int = 0
    _n_passed: int = 0
    _copied_s: float = 0.0
    _layers: Counter[LayerBytes] = field(default_factory=Counter)  # but for the one that is on
    # Its experts: those that are on the GPU, those that are not, those of them that pass through.
    _layer: list[int] = field(default_factory=lambda: [0, 0, 0])
    _sent: deque[tuple[Sending, int]] = field(default_factory=deque)  # with numbers of experts
    _left: Key | None = None  # for the one that is on its way to the GPU
    _lent: ExitStack = field(default_factory=ExitStack)  # that one, by RAM

    @property
    def tier(self) -> Tier:
        """Where a model's other weights are, and experts as far as there is room."""
        return "gpu"

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert."""
        return self.slots.expert_bytes

    @property
    def is_complete(self) -> bool:
        """Never: some are not on the GPU."""
        return False

    def read_rest(self, n_experts: Sequence[int]) -> None:
        """Into RAM, while nothing else is read."""
        self.ram.read_rest(n_experts, self.slots.keys())

    def while_wanted(self, is_wanted: Callable[[], bool]) -> AbstractContextManager[None]:
        """As RAM does."""
        return self.ram.while_wanted(is_wanted)

    def give_back(self) -> bool:
        """Experts that leave are computed like others that the GPU has no room for."""
        n_slots = self.slots.give_back()
        if n_slots:
            self.note(
                f"the GPU's memory is short: room for {n_slots} experts is given back there, "
                f"{self.slots.n_slots} are left"
            )
        return n_slots > 0

    def residents(self) -> dict[int, list[int]]:
        """The experts on the GPU now, by layer."""
        layers: dict[int, list[int]] = {}
        for layer_id, expert_id in self.slots.residents():
            layers.setdefault(layer_id, []).append(expert_id)
        return layers

    def in_memory(self) -> dict[Tier, Collection[Key]]:
        """RAM may hold copies of what the GPU has, as long as there is room."""
        on_gpu = self.slots.keys()
        in_ram = self.ram.in_memory()["ram"]
        return {"gpu": on_gpu, "ram": [key for key in in_ram if key not in on_gpu]}

    def traffic(self) -> Traffic:
        """What was used and read so far."""
        passed = self._n_passed * self._miss_bytes
        in_ram = self.ram.traffic()
        return replace(
            in_ram,
            # What is computed without all its parts is not read in all of them either.
            ram_bytes=(in_ram.ram_requests + in_ram.disk_requests) * self._miss_bytes,
            gpu_requests=self._n_hits,
            gpu_bytes=self._n_hits * self.expert_bytes,
            copied_bytes=passed + self._n_promoted * self.expert_bytes,
            passed_bytes=passed,
            copied_s=self._copied_s,
            promoted=self._n_promoted,
            layers=self._layers + self._layer_now(),
            coarse=self._n_coarse,
        )

    @property
    def _miss_bytes(self) -> int:
        """Of one expert that is not on the GPU, as it is computed."""
        return self.staging.expert_bytes

    def ask(self, layer_id: int, expert_ids: list[int]) -> list[int]:
        """Say which experts a layer needs now; counts them, and wants from RAM what is not on the
        GPU.  Returns those.  Raises NoLongerWanted, nothing being counted.
        """
        self.ram.require_wanted()
        self.slots.record(layer_id, expert_ids)
        if self.uses is not None:
            self.uses.add(layer_id, expert_ids)
        missing = self.missing(layer_id, expert_ids)
        self._layers += self._layer_now()
        self._layer = [len(expert_ids) - len(missing), len(missing), 0]
        self._n_hits += len(expert_ids) - len(missing)
        if self.staging.n_parts < self.slots.n_parts:
            self._n_coarse += len(missing)
        self.ram.want(layer_id, missing)
        return missing

    def missing(self, layer_id: int, expert_ids: Sequence[int]) -> list[int]:
        """Those of some experts that are not on the GPU."""
        return [e for e in expert_ids if not self.slots.has(layer_id, e)]

    @contextmanager
    def passing(self, experts: Mapping[int, tuple[Tensor, ...]]) -> Iterator[Passage]:
        """Bring experts of a layer to the GPU to be computed there; lent until the block ends."""
        with self.staging.passage(experts) as passage:
            yield passage
            self._n_passed += len(experts)
            self._layer[2] += len(experts)
            self._note_sent(*passage.sendings)

    def copied(self) -> list[tuple[int, float]]:
        """Copies that have come since the last call: numbers of experts, seconds."""
        done: list[tuple[int, float]] = []
        while self._sent:
            sending, n_experts = self._sent[0]
            seconds = sending.seconds()
            if seconds is None and not sending.has_failed:
                break
            self._sent.popleft()
            if seconds is not None:
                done.append((n_experts, seconds))
                self._copied_s += seconds
        return done

    def _layer_now(self) -> Counter[LayerBytes]:
        there, missing, passed = self._layer
        on_gpu = there * self.expert_bytes + passed * self._miss_bytes
        from_ram, sent = missing * self._miss_bytes, passed * self._miss_bytes
        return Counter({(on_gpu, from_ram, sent): 1} if on_gpu + from_ram else {})

    def _note_sent(self, *sendings: tuple[Sending, int]) -> None:
        self._sent.extend(sendings)

    def move_up(self) -> None:
        """Between passes: let what is on its way to the GPU arrive, and send what deserves it."""
        self._lent.close()
        arrived, left = self.slots.welcome(), self._left
        if arrived is not None and left is not None and self._have_room_for_all:
            self.ram.exchange(arrived, left)
        self._left = None
        self.has_all = len(self.slots.keys() | self.ram.keys()) == self.n_experts_total
        key = self.slots.candidate(self._is_in_ram)
        if key is not None:
            layer_id, expert_id = key
            experts = self._lent.enter_context(self.ram.borrow(layer_id, [expert_id]))
            self._left, sending = self.slots.promote(key, experts[expert_id])
            self._lent.callback(sending.join)  # before RAM takes it back
            self._note_sent((sending, 1))
            self._n_promoted += 1
            if self.ram.n_slots <= self.slots.tables.shape[1] + 1:
                self._lent.close()  # a layer may need all the room there is

    @property
    def _have_room_for_all(self) -> bool:
        return self.slots.n_slots + self.ram.n_slots >= self.n_experts_total

    def _is_in_ram(self, key: Key) -> bool:
        return self.ram.has_whole(*key)
