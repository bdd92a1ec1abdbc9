"""All experts of a model in a GPU's memory, for good.

Knows:        how they get there from disk, where each part of each expert lies, how many were used.
Ignorant of:  tokens, routing, what the bits mean.
"""

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from lowmoe.experts.ledger import Traffic
from lowmoe.experts.lender import Tier
from lowmoe.experts.policy import Key
from lowmoe.experts.source import ExpertSource
from lowmoe.experts.to_gpu import ADDRESS_BYTES, ExpertPlaces, Progress, read_to_gpu
from lowmoe.kernels.gpu import Gpu
from quant.layout import MAX_PLANES


class ResidentExperts:
    """Lends all of them at once, by their addresses.

    n_parts: of each expert; tables: of each layer, [E, 3] int64 on the GPU, where each expert's
    parts are, 0 for none; used: [] int64 on the GPU, to which a pass adds how many it used.
    """

    def __init__(
        self,
        source: ExpertSource,
        part_bytes: tuple[int, ...],
        n_experts: Sequence[int],
        gpu: Gpu,
        progress: Progress,
    ) -> None:
        """part_bytes: of one expert; n_experts: of each layer.  Raises what reading raises."""
        self.expert_bytes, self.n_parts = sum(part_bytes), len(part_bytes)
        self._n_experts, self._places = tuple(n_experts), ExpertPlaces(part_bytes)
        self._layers = [
            torch.empty(n * self._places.stride, dtype=torch.uint8, device=gpu.place)
            for n in n_experts
        ]
        self.tables = [self._table(layer) for layer in self._layers]
        self.used = torch.zeros((), dtype=torch.int64, device=gpu.place)
        self._n_counted, self._has_news = 0, False
        self._fill(source, gpu, progress)

    @staticmethod
    def needed_bytes(part_bytes: tuple[int, ...], n_experts: Sequence[int]) -> int:
        """GPU memory that so many experts take."""
        return sum(n_experts) * (ExpertPlaces(part_bytes).stride + MAX_PLANES * ADDRESS_BYTES)

    @property
    def tier(self) -> Tier:
        """Experts are computed from the GPU's memory."""
        return "gpu"

    @property
    def is_complete(self) -> bool:
        """From the beginning."""
        return True

    def read_rest(self, n_experts: Sequence[int]) -> None:
        """There is no rest."""

    def while_wanted(self, is_wanted: Callable[[], bool]) -> AbstractContextManager[None]:
        """Nothing is read, and a pass is over soon."""
        return nullcontext()

    def give_back(self) -> bool:
        """All are needed there."""
        return False

    def residents(self) -> dict[int, list[int]]:
        """Every expert, by layer."""
        return {layer_id: list(range(n)) for layer_id, n in enumerate(self._n_experts)}

    @property
    def uses(self) -> None:
        """Only the GPU knows which experts it uses, and it is not asked at every step."""

    def in_memory(self) -> dict[Tier, Collection[Key]]:
        """All on the GPU."""
        return {"gpu": [(i, e) for i, n in enumerate(self._n_experts) for e in range(n)]}

    def count_used(self, n_experts: int) -> None:
        """So many experts were used."""
        self._n_counted += n_experts

    def expect_used(self) -> None:
        """A pass adds to `used`: the GPU is to be asked, by whoever wants to know."""
        self._has_news = True

    def traffic(self) -> Traffic:
        """What was used so far; waits for passes under way if they count by themselves."""
        if self._has_news:
            self._n_counted += int(self.used)
            self.used.zero_()
            self._has_news = False
        return Traffic(gpu_requests=self._n_counted, gpu_bytes=self._n_counted * self.expert_bytes)

    def _table(self, layer: Tensor) -> Tensor:
        experts = layer.data_ptr() + torch.arange(0, layer.shape[0], self._places.stride)
        table = torch.zeros(experts.shape[0], MAX_PLANES, dtype=torch.int64)
        table[:, : self.n_parts] = experts[:, None] + torch.tensor(self._places.offsets)
        return table.to(layer.device)

    def _put(self, key: Key, buffers: list[Tensor]) -> None:
        """Copy an expert's parts to their places."""
        layer_id, expert_id = key
        expert = self._layers[layer_id][expert_id * self._places.stride :]
        for part, buffer in zip(self._places.of(expert), buffers, strict=True):
            part.copy_(buffer[: part.shape[0]])

    def _fill(self, source: ExpertSource, gpu: Gpu, progress: Progress) -> None:
        keys = [(layer, e) for layer, n in enumerate(self._n_experts) for e in range(n)]

        def tell(done: int, total: int) -> None:
            progress(done * self.expert_bytes, total * self.expert_bytes)

        read_to_gpu(source, keys, self._put, gpu, tell)
