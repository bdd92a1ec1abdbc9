"""The launcher of tests that lets CPU tensors go to a card and come back."""

import torch

from cuda_ext.launch import Argument
from tests.cuda_ext.mirrored import MirroredLaunch


class FakeCard:
    """Adds `more` to all bytes of the first tensor, to be written to where the second begins."""

    n_multiprocessors = 7

    def __init__(self) -> None:
        self.addresses: list[int] = []

    def __call__(
        self,
        kernel: str,
        grid: tuple[int, int, int],
        block: int,
        *arguments: Argument,
        shared_bytes: int = 0,
    ) -> None:
        x, y, more = arguments
        assert isinstance(x, torch.Tensor)
        assert isinstance(y, torch.Tensor)
        assert (kernel, grid, block, shared_bytes) == ("a/kernel", (1, 2, 3), 32, 64)
        self.addresses += [x.data_ptr(), y.data_ptr()]
        y[:4] = x[:4] + more


def test_what_is_written_comes_back_also_through_views_of_one_memory() -> None:
    card = FakeCard()
    launch = MirroredLaunch(card, torch.device("cpu"))
    memory = torch.arange(16, dtype=torch.uint8)
    launch("a/kernel", (1, 2, 3), 32, memory[2:6], memory[8:], 100, shared_bytes=64)
    assert memory.tolist() == [*range(8), 102, 103, 104, 105, *range(12, 16)]
    x, y = card.addresses
    assert y - x == 6  # one copy of the memory they share
    assert x != memory[2:].data_ptr()
    assert (launch.n_multiprocessors, launch.launched) == (7, {"a/kernel"})
