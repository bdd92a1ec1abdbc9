"""Kernels on the card of this machine: what they are given, where they run, what a graph keeps.

What CUDA's functions and the wrappers of portable.cuh do there is compared with the emulator, whose
own tests compare it with the manuals.
"""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cuda_ext.card import Card, find_card, look
from cuda_ext.on_card import OnCard, put_on
from tests.cuda_emulator.emulated import EmulatedLaunch
from tests.cuda_ext.mirrored import MirroredLaunch

CARD = find_card("auto", look())
EMULATOR_KERNELS = Path(__file__).parent.parent / "cuda_emulator" / "kernels"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(CARD is None, reason="no card can be used")]

SOURCE = """
#include "portable.cuh"

// y[i] = (add[i] + whole + big) * fraction.
extern "C" __global__ void parameters(const float* add, int whole, long long big, float fraction,
                                      float* y) {
  y[threadIdx.x] = (add[threadIdx.x] + whole + static_cast<float>(big)) * fraction;
}

// y[i] = x[n - 1 - i], through shared memory for all n; one block.
extern "C" __global__ void reversed_shared(const int* x, int n, int* y) {
  DYNAMIC_SHARED(int, row);
  for (int i = threadIdx.x; i < n; i += blockDim.x) row[i] = x[i];
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += blockDim.x) y[i] = row[n - 1 - i];
}
"""


@pytest.fixture(scope="module")
def card() -> Card:
    assert CARD is not None
    return CARD


@pytest.fixture(scope="module")
def cubins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cubins")


@pytest.fixture(scope="module")
def launch(card: Card, cubins: Path, tmp_path_factory: pytest.TempPathFactory) -> OnCard:
    """Of the two kernels above."""
    sources = tmp_path_factory.mktemp("sources")
    (sources / "toy.cu").write_text(SOURCE)
    return put_on(card, cubins, lambda line: None, sources)


@pytest.fixture(scope="module")
def place(card: Card) -> torch.device:
    return torch.device("cuda", card.index)


def parameters(launch: OnCard, add: Tensor, y: Tensor) -> None:
    launch("toy/parameters", (1, 1, 1), y.numel(), add, -3, 2**33, 0.5, y)


def wanted(add: Tensor) -> Tensor:
    return (add - 3 + 2.0**33) * 0.5


def test_every_kernel_loads(card: Card, cubins: Path) -> None:
    assert put_on(card, cubins, lambda line: None).n_multiprocessors == card.n_multiprocessors


def test_parameters_arrive(launch: OnCard, place: torch.device) -> None:
    add, y = torch.arange(32.0, device=place) * 4096, torch.zeros(32, device=place)
    parameters(launch, add, y)
    assert torch.equal(y, wanted(add))


@pytest.mark.parametrize("n", [12 * 1024, 20 * 1024])  # 48 KiB, which need not be asked for; 80 KiB
def test_a_block_may_have_more_shared_memory_than_the_default(
    launch: OnCard, place: torch.device, n: int
) -> None:
    x, y = torch.arange(n, dtype=torch.int32, device=place), torch.zeros(n, device=place).int()
    launch("toy/reversed_shared", (1, 1, 1), 256, x, n, y, shared_bytes=4 * n)
    assert torch.equal(y, x.flip(0))


def test_launches_follow_torchs_current_stream(launch: OnCard, place: torch.device) -> None:
    add, y = torch.arange(64.0, device=place), torch.zeros(64, device=place)
    stream = torch.cuda.Stream(place)
    with torch.cuda.stream(stream):
        for _ in range(100):  # each needs what torch did just before it
            add.mul_(1.0).add_(1.0)
            parameters(launch, add, y)
    stream.synchronize()
    assert torch.equal(y, wanted(torch.arange(64.0, device=place) + 100))


def test_a_graph_replays_what_was_captured_on_what_is_there_then(
    launch: OnCard, place: torch.device
) -> None:
    add, y = torch.zeros(64, device=place), torch.zeros(64, device=place)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(place), torch.cuda.graph(graph):
        parameters(launch, add, y)
    y.fill_(-1)
    add.copy_(torch.arange(64.0))
    graph.replay()
    assert torch.equal(y, wanted(add))


def test_the_first_launch_of_a_thread_works(launch: OnCard, place: torch.device) -> None:
    add, y = torch.arange(64.0, device=place), torch.zeros(64, device=place)
    thread = threading.Thread(target=parameters, args=(launch, add, y))
    thread.start()
    thread.join()
    assert torch.equal(y, wanted(add))


# What a card does not leave open, with operands that reach everything. Kernel, threads, and who
# makes the arguments: the last ones are written.
def _words() -> list[Tensor]:
    operands = [torch.randint(-(2**31), 2**31, (256,), dtype=torch.int32) for _ in range(3)]
    return [*operands, torch.zeros(12, 256, dtype=torch.int32)]


def _int8_product() -> list[Tensor]:
    a = torch.randint(-128, 128, (16, 32), dtype=torch.int8)
    b = torch.randint(-128, 128, (32, 8), dtype=torch.int8)
    return [a, b, torch.randint(-(2**20), 2**20, (16, 8), dtype=torch.int32)]


def _tiles() -> list[Tensor]:
    x = torch.randint(-(2**31), 2**31, (4, 8, 4), dtype=torch.int32)
    return [x, torch.zeros(32, 4, dtype=torch.int32)]


@pytest.mark.parametrize(
    ("kernel", "threads", "operands"),
    [
        ("operations/on_words", 256, _words),
        ("warps/product_of_int8", 32, _int8_product),
        ("warps/loaded_tiles", 32, _tiles),
    ],
)
def test_the_card_does_what_the_emulator_does(
    card: Card, cubins: Path, kernel: str, threads: int, operands: Callable[[], list[Tensor]]
) -> None:
    on_card = put_on(card, cubins, lambda line: None, EMULATOR_KERNELS)
    mirrored = MirroredLaunch(on_card, torch.device("cuda", card.index))
    emulated = EmulatedLaunch(kernels=EMULATOR_KERNELS)
    for _ in range(20):
        given = operands()
        copies = [tensor.clone() for tensor in given]
        mirrored(kernel, (1, 1, 1), threads, *given)
        emulated(kernel, (1, 1, 1), threads, *copies)
        assert all(torch.equal(a, b) for a, b in zip(given, copies, strict=True))
