"""How experts come to lie in a GPU's memory, and from disk to there.

Knows:        where the parts of an expert lie, reads that run ahead of copies.
Ignorant of:  which experts, who computes with them.
"""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from torch import Tensor

from lowmoe.experts.policy import Key
from lowmoe.experts.source import ExpertSource
from lowmoe.experts.store import N_READERS
from lowmoe.kernels.gpu import Gpu
from quant.layout import REGION_ALIGNMENT, round_up

Progress = Callable[[int, int], None]  # bytes done and in all; of `read_to_gpu`, experts

ADDRESS_BYTES = 8  # in a table of where experts' parts are


@dataclass(frozen=True, slots=True)
class ExpertPlaces:
    """An expert as one piece of memory.  part_bytes: of its parts; offsets: where each begins."""

    part_bytes: tuple[int, ...]

    @property
    def offsets(self) -> list[int]:
        ends = [0]
        for n_bytes in self.part_bytes:
            ends.append(ends[-1] + round_up(n_bytes, REGION_ALIGNMENT))
        return ends[:-1]

    @property
    def stride(self) -> int:
        """Bytes from one expert to the next."""
        return sum(round_up(n_bytes, REGION_ALIGNMENT) for n_bytes in self.part_bytes)

    def of(self, expert: Tensor) -> list[Tensor]:
        """The parts of an expert that begins where `expert`, [stride or more] uint8, does."""
        where = zip(self.offsets, self.part_bytes, strict=True)
        return [expert[offset : offset + n_bytes] for offset, n_bytes in where]

    def addresses(self, expert: Tensor) -> list[int]:
        """Of its parts."""
        return [expert.data_ptr() + offset for offset in self.offsets]


def read_to_gpu(
    source: ExpertSource,
    keys: Sequence[Key],
    put: Callable[[Key, list[Tensor]], None],
    gpu: Gpu,
    progress: Progress,
) -> None:
    """Read experts for `put` to copy, reads running ahead by as many as there are readers.

    put: is given an expert and its parts, in memory of the GPU's `staging`, until it returns.
    Raises what reading raises.
    """
    left = deque(keys)
    free = deque(_staging(source, gpu) for _ in range(min(N_READERS + 1, len(left))))
    reading: deque[tuple[Key, list[Tensor], Future[int]]] = deque()
    done = 0
    with ThreadPoolExecutor(N_READERS, thread_name_prefix="lowmoe-read") as readers:
        while left or reading:
            while left and free:
                key, buffers = left.popleft(), free.popleft()
                reading.append((key, buffers, readers.submit(source.read, *key, buffers)))
            key, buffers, read = reading.popleft()
            read.result()
            put(key, buffers)
            free.append(buffers)
            done += 1
            progress(done, len(keys))


def _staging(source: ExpertSource, gpu: Gpu) -> list[Tensor]:
    """Room for one expert, as the source fills it."""
    return list(gpu.staging(sum(source.buffer_bytes)).split(list(source.buffer_bytes)))
