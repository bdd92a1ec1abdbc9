"""All experts of a model in a GPU's memory, for good.

Knows:        how they get there from disk, where each part of each expert lies, how many were used.
Ignorant of:  tokens, routing, what the bits mean.
"""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from lowmoe.experts.ledger import Traffic
from lowmoe.experts.source import ExpertSource
from lowmoe.experts.store import N_READERS
from lowmoe.kernels.gpu import Gpu
from quant.layout import MAX_PLANES, REGION_ALIGNMENT, round_up

Progress = Callable[[int, int], None]  # bytes done and in all


class ResidentExperts:
    """tables: of each layer, [E, 3] int64 on the GPU: the address of each expert's parts, 0 for
    none; used: [] int64 on the GPU, to which a pass may add how many experts it used.
    """

    def __init__(
        self,
        source: ExpertSource,
        part_bytes: tuple[int, ...],
        n_experts: Sequence[int],
        gpu: Gpu,
        progress: Progress,
    ) -> None:
        """part_bytes: of one expert; n_experts: of each layer.

        Raises what reading raises.
        """
        self.expert_bytes = sum(part_bytes)
        self._n_experts = tuple(n_experts)
        offsets, stride = _offsets(part_bytes)
        self._layers = [
            torch.empty(n * stride, dtype=torch.uint8, device=gpu.place) for n in n_experts
        ]
        self.tables = [
            _table(memory, offsets, stride, n)
            for memory, n in zip(self._layers, n_experts, strict=True)
        ]
        self.used = torch.zeros((), dtype=torch.int64, device=gpu.place)
        self._n_counted = 0
        self._used_is_news = False

        def places(layer_id: int, expert_id: int) -> list[Tensor]:
            first = expert_id * stride
            memory = self._layers[layer_id]
            return [
                memory[first + at : first + at + n]
                for at, n in zip(offsets, part_bytes, strict=True)
            ]

        keys = [(layer_id, e) for layer_id, n in enumerate(n_experts) for e in range(n)]
        _copy_all(source, keys, places, gpu, progress)

    @staticmethod
    def needed_bytes(part_bytes: tuple[int, ...], n_experts: Sequence[int]) -> int:
        """GPU memory that so many experts of each layer take."""
        _, stride = _offsets(part_bytes)
        return sum(n * (stride + MAX_PLANES * 8) for n in n_experts)

    def residents(self) -> dict[int, list[int]]:
        """Every expert, by layer."""
        return {layer_id: list(range(n)) for layer_id, n in enumerate(self._n_experts)}

    def count_used(self, n_experts: int) -> None:
        """So many experts were used."""
        self._n_counted += n_experts

    def expect_used(self) -> None:
        """A pass has added to `used`; `traffic` will ask the GPU."""
        self._used_is_news = True

    def traffic(self) -> Traffic:
        """What was used so far; waits for the GPU if it has to be asked."""
        if self._used_is_news:
            self._n_counted += int(self.used)
            self.used.zero_()
            self._used_is_news = False
        return Traffic(gpu_requests=self._n_counted, gpu_bytes=self._n_counted * self.expert_bytes)


def _offsets(part_bytes: tuple[int, ...]) -> tuple[list[int], int]:
    """Where each part of an expert begins, and where the next expert does."""
    offsets, end = [], 0
    for n_bytes in part_bytes:
        offsets.append(end)
        end += round_up(n_bytes, REGION_ALIGNMENT)
    return offsets, end


def _table(memory: Tensor, offsets: list[int], stride: int, n_experts: int) -> Tensor:
    table = torch.zeros(n_experts, MAX_PLANES, dtype=torch.int64)
    first = memory.data_ptr() + stride * torch.arange(n_experts)[:, None]
    table[:, : len(offsets)] = first + torch.tensor(offsets)
    return table.to(memory.device)


def _copy_all(
    source: ExpertSource,
    keys: list[tuple[int, int]],
    places: Callable[[int, int], list[Tensor]],
    gpu: Gpu,
    progress: Progress,
) -> None:
    """Reads run ahead of copies by as many experts as there are readers."""
    ends = torch.tensor(source.buffer_bytes).cumsum(0).tolist()
    slots = deque(list(gpu.staging(ends[-1]).tensor_split(ends[:-1])) for _ in range(N_READERS + 1))
    reading: deque[tuple[tuple[int, int], list[Tensor], Future[int]]] = deque()
    left = deque(keys)
    done, total = 0, len(keys)
    with ThreadPoolExecutor(N_READERS, thread_name_prefix="lowmoe-read") as readers:
        while left or reading:
            while left and slots:
                key, buffers = left.popleft(), slots.popleft()
                reading.append((key, buffers, readers.submit(source.read, *key, buffers)))
            key, buffers, read = reading.popleft()
            read.result()
            n_bytes = 0
            for to, buffer in zip(places(*key), buffers, strict=True):
                to.copy_(buffer[: to.shape[0]])
                n_bytes = n_bytes + to.shape[0]
            slots.append(buffers)
            done += 1
            progress(done * n_bytes, total * n_bytes)
