"""Lets tests that hold CPU tensors launch kernels on a card.

Each launch takes along all memory that its tensors lie in and brings it back. So tests that hold
the emulated kernels to their oracle hold the same kernels to it on a card. Addresses within tensors
stay what they are: what they point to must be pinned, which a card reads where it is.

Knows:        where tensors lie.
Ignorant of:  kernels, what is tested.
"""

import torch
from torch import Tensor

from cuda_ext.launch import Argument, Launch


class MirroredLaunch:
    """A Launch for CPU tensors, by one for tensors at `place`; it has ended when it returns.

    order               means nothing on a card; the emulator's tests set it
    n_multiprocessors   what the card is said to have
    launched            "file/name" of every kernel that ran
    """

    def __init__(self, launch: Launch, place: torch.device) -> None:
        self.order = 0
        self.n_multiprocessors = launch.n_multiprocessors
        self.launched: set[str] = set()
        self._launch, self._place = launch, place

    def __call__(
        self,
        kernel: str,
        grid: tuple[int, int, int],
        block: int,
        *arguments: Argument,
        shared_bytes: int = 0,
    ) -> None:
        here = {_address(a): _whole(a) for a in arguments if isinstance(a, Tensor)}
        there = {address: whole.to(self._place, copy=True) for address, whole in here.items()}
        moved = (_moved(a, there) if isinstance(a, Tensor) else a for a in arguments)
        self._launch(kernel, grid, block, *moved, shared_bytes=shared_bytes)
        for address, whole in here.items():
            whole.copy_(there[address])
        self.launched.add(kernel)


def _address(tensor: Tensor) -> int:
    """Of the memory it lies in, which others may share."""
    return tensor.untyped_storage().data_ptr()


def _whole(tensor: Tensor) -> Tensor:
    """All that memory, as bytes."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


def _moved(tensor: Tensor, there: dict[int, Tensor]) -> Tensor:
    """What begins where the tensor does."""
    return there[_address(tensor)][tensor.storage_offset() * tensor.element_size() :]
