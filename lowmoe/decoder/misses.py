"""The experts of a layer that a GPU does not have: who computes them, and that it is done.

Knows:        where each goes, by whose costs; what is timed.
Ignorant of:  the order of a pass, how costs are learned, who has which expert, CUDA.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from lowmoe.decoder.cpu_share import CpuShare
from lowmoe.decoder.gpu_buffers import Buffers
from lowmoe.decoder.gpu_parts import GpuParts
from lowmoe.experts.hybrid import HybridExperts
from lowmoe.experts.split import MissSplit
from lowmoe.experts.staging import Passage
from lowmoe.kernels.gpu import Event

MOST_ON_CPU = 256  # tokens of a prompt that the CPU is given at once


@dataclass(frozen=True, slots=True)
class _MixedThere:
    """The GPU's work on some experts of a prompt.  n_more: tokens beside the first of each."""

    begin: Event
    end: Event
    n_experts: int
    n_more: int

    def seconds(self) -> float | None:
        return self.end.seconds_since(self.begin)


class MissingExperts:
    """Computes them as RAM lends them.  counts: of a layer's tokens that go to each expert."""

    def __init__(
        self,
        parts: GpuParts,
        experts: HybridExperts,
        on_cpu: CpuShare,
        split: MissSplit,
        clock: Callable[[], float],
    ) -> None:
        """clock: seconds."""
        self._parts, self._experts, self._on_cpu = parts, experts, on_cpu
        self._split, self._clock = split, clock
        self._n_parts = experts.staging.n_parts
        self._mixed_there: deque[_MixedThere] = deque()

    def portions(self) -> Iterator[list[int]]:
        """Those wanted, in groups to borrow one after the other.

        The CPU keeps what experts put out apart until the end; sums on the GPU are rounded in the
        order they come in. Where all come to it, that is made not to depend on how fast reads are.
        """
        ram = self._experts.ram
        if self._split.misses == "page":
            return ram.portions_in_order(self._experts.staging.n_staged)
        return ram.portions()

    def here(self, layer_id: int, missing: list[int], counts: Mapping[int, int]) -> set[int]:
        """The missing experts that the CPU computes: those of the fewest tokens, and of these the
        last to come into RAM.
        """
        self._learn()
        ram = self._experts.ram
        order = sorted(missing, key=lambda e: (counts[e], ram.has(layer_id, e)))
        return set(order[: self._split.n_here([counts[e] for e in order])])

    def here_of_prompt(self, missing: list[int], counts: Mapping[int, int]) -> set[int]:
        """The missing experts that the CPU computes, those of the fewest tokens."""
        self._learn()
        order = sorted(missing, key=counts.__getitem__)
        few: set[int] = set()
        n_tokens = 0
        for expert_id in order[: self._split.n_here_of_prompt([counts[e] for e in order])]:
            n_tokens += counts[expert_id]
            if n_tokens > MOST_ON_CPU:
                break
            few.add(expert_id)
        return few

    def mix(
        self,
        layer_id: int,
        b: Buffers,
        experts: dict[int, tuple[Tensor, ...]],
        here: set[int],
        counts: Mapping[int, int],
    ) -> None:
        """Some of the missing experts: on the CPU or, meanwhile on their way, on the GPU, at the
        planes that misses have.
        """
        experts = {e: parts[: self._n_parts] for e, parts in experts.items()}
        staying = {e: parts for e, parts in experts.items() if e in here}
        passing = {e: parts for e, parts in experts.items() if e not in here}
        if not passing:
            if staying:
                self._run_here(layer_id, staying, counts, 0)
            return
        begin = self._clock()
        with self._experts.passing(passing) as passage:
            seconds = self._clock() - begin
            if staying:
                self._run_here(layer_id, staying, counts, len(passing))
            seconds += self.mix_on_gpu(layer_id, b, passage)
        self._split.brought(seconds)

    def mix_on_gpu(self, layer_id: int, b: Buffers, passage: Passage) -> float:
        """b.x += experts that pass through the GPU.  Returns the host's seconds, no waiting."""
        seconds = 0.0
        for table in passage.tables():
            begin = self._clock()
            self._parts.mix(layer_id, b, table, self._n_parts)
            seconds += self._clock() - begin
        return seconds

    def mixed_there(
        self, begin: Event, end: Event, there: Sequence[int], counts: Mapping[int, int]
    ) -> None:
        """A prompt's experts that the GPU has were computed between two events."""
        if there:
            n_more = sum(counts[e] for e in there) - len(there)
            self._mixed_there.append(_MixedThere(begin, end, len(there), n_more))

    def _run_here(
        self,
        layer_id: int,
        experts: dict[int, tuple[Tensor, ...]],
        counts: Mapping[int, int],
        n_copied: int,
    ) -> None:
        begin = self._clock()
        self._on_cpu.run(layer_id, experts)
        n_more = sum(counts[e] for e in experts) - len(experts)
        self._split.computed_here(len(experts), n_more, n_copied, self._clock() - begin)

    def _learn(self) -> None:
        """What copies and the GPU took, as far as they are done."""
        for n_experts, seconds in self._experts.copied():
            self._split.copied(n_experts, seconds)
        while self._mixed_there and (took := self._mixed_there[0].seconds()) is not None:
            mixed = self._mixed_there.popleft()
            self._split.computed_there(mixed.n_experts, mixed.n_more, took)
