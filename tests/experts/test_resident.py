"""All experts on a stand-in for a GPU: every byte where the table says, and counted."""

import ctypes
import threading

import pytest
import torch
from torch import Tensor

from lowmoe.errors import FolderError
from lowmoe.experts.resident import ResidentExperts
from quant.layout import REGION_ALIGNMENT
from tests.stand_in_gpu import StandInGpu

PART_BYTES = (1000, 640, 130)
N_EXPERTS = [3, 5]


class Numbered:
    """A source whose experts' parts are all one number, their own.  failing: who cannot be read."""

    buffer_bytes = (4096, 4096, 4096)

    def __init__(self, failing: tuple[int, int] | None = None) -> None:
        self.failing = failing
        self.read_by: set[str] = set()

    def read(self, layer_id: int, expert_id: int, buffers: list[Tensor]) -> int:
        self.read_by.add(threading.current_thread().name)
        if (layer_id, expert_id) == self.failing:
            raise FolderError("thrown by the test")
        for part, (buffer, n_bytes) in enumerate(zip(buffers, PART_BYTES, strict=True)):
            assert buffer.data_ptr() % 4096 == 0, "where direct reads may not go"
            buffer.fill_(255)
            buffer[:n_bytes] = number_of(layer_id, expert_id, part)
        return sum(self.buffer_bytes)


def number_of(layer_id: int, expert_id: int, part: int) -> int:
    return 100 * layer_id + 10 * expert_id + part


def bytes_at(address: int, n_bytes: int) -> Tensor:
    memory = (ctypes.c_uint8 * n_bytes).from_address(address)
    return torch.frombuffer(memory, dtype=torch.uint8)


def put(source: Numbered, gpu: StandInGpu, steps: list[tuple[int, int]]) -> ResidentExperts:
    return ResidentExperts(
        source, PART_BYTES, N_EXPERTS, gpu, lambda done, total: steps.append((done, total))
    )


def test_every_part_lies_where_the_table_says_and_no_two_at_one_place() -> None:
    experts = put(Numbered(), StandInGpu(), [])
    assert [list(table.shape) for table in experts.tables] == [[3, 3], [5, 3]]
    for layer_id, table in enumerate(experts.tables):
        for expert_id, addresses in enumerate(table.tolist()):
            for part, (address, n_bytes) in enumerate(zip(addresses, PART_BYTES, strict=True)):
                assert address % REGION_ALIGNMENT == 0
                assert (bytes_at(address, n_bytes) == number_of(layer_id, expert_id, part)).all()


def test_parts_that_were_not_read_have_the_address_0() -> None:
    class OfOnePart(Numbered):
        buffer_bytes = (4096,)

        def read(self, layer_id: int, expert_id: int, buffers: list[Tensor]) -> int:
            buffers[0][:1000] = 7
            return 4096

    experts = ResidentExperts(OfOnePart(), (1000,), [2], StandInGpu(), lambda done, total: None)
    assert experts.n_parts == 1
    assert (experts.tables[0][:, 0] != 0).all()
    assert (experts.tables[0][:, 1:] == 0).all()


def test_the_memory_is_what_was_reckoned() -> None:
    experts = put(Numbered(), StandInGpu(), [])
    taken = sum(layer.nbytes for layer in experts._layers) + sum(t.nbytes for t in experts.tables)
    assert ResidentExperts.needed_bytes(PART_BYTES, N_EXPERTS) == taken
    assert experts.expert_bytes == sum(PART_BYTES)


def test_progress_is_told_expert_by_expert() -> None:
    steps: list[tuple[int, int]] = []
    put(Numbered(), StandInGpu(), steps)
    assert steps == [(1770 * n, 1770 * 8) for n in range(1, 9)]


def test_reads_run_beside_each_other_in_bounded_memory() -> None:
    gpu, source = StandInGpu(), Numbered()
    staged: list[int] = []
    staging = gpu.staging

    def counted(n_bytes: int) -> Tensor:
        staged.append(n_bytes)
        return staging(n_bytes)

    gpu.staging = counted  # type: ignore[method-assign]
    put(source, gpu, [])
    assert 1 < len(staged) <= 5
    assert set(staged) == {3 * 4096}
    assert all(name.startswith("lowmoe-read") for name in source.read_by)


@pytest.mark.parametrize("failing", [(0, 0), (0, 2), (1, 4)])
def test_what_reading_raises_is_raised(failing: tuple[int, int]) -> None:
    with pytest.raises(FolderError, match="thrown by the test"):
        put(Numbered(failing), StandInGpu(), [])
    assert not [t for t in threading.enumerate() if t.name.startswith("lowmoe-read")]


def test_what_was_used_is_counted_by_the_host_or_by_the_gpu() -> None:
    experts = put(Numbered(), StandInGpu(), [])
    assert experts.traffic().gpu_requests == 0
    experts.count_used(4)
    experts.used += 3
    assert experts.traffic().gpu_requests == 4, "nobody said that the GPU counts"
    experts.expect_used()
    assert experts.traffic().gpu_requests == 7
    assert experts.traffic().gpu_bytes == 7 * 1770
    assert experts.residents() == {0: [0, 1, 2], 1: [0, 1, 2, 3, 4]}
