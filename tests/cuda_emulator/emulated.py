"""Launches kernels on CPU tensors: the Launch of tests, one CUDA thread after the other.

Knows:        how g++ makes a library of a kernel file, the way into it, the order of threads.
Ignorant of:  what kernels compute, torch ops.
"""

import ctypes
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from torch import Tensor

from cuda_ext.launch import Argument
from tests.cuda_emulator.build import KERNELS, Build, library_of

FORWARD, REVERSE, SHUFFLED = 0, 1, 20251122  # any further number is a seed
ORDERS = (FORWARD, REVERSE, SHUFFLED)
MOST_THREADS = 1024  # of a block
_WHOLE_NUMBERS = range(-(2**63), 2**63)


class KernelFaultError(Exception):
    """A launch that a card would refuse, never end, or run with undefined results."""


class EmulatedLaunch:
    """cuda_ext.launch.Launch on CPU tensors; every launch has ended when it returns.

    order              of threads and blocks: FORWARD, REVERSE, or the seed of a shuffled one
    n_multiprocessors  what the card is said to have
    launched           "file/name" of every kernel that ran
    """

    def __init__(self, build: Build = Build.PLAIN, *, kernels: Path = KERNELS) -> None:
        self.order = FORWARD
        self.n_multiprocessors = 4
        self.launched: set[str] = set()
        self._build = build
        self._kernels = kernels

    def __call__(
        self,
        kernel: str,
        grid: tuple[int, int, int],
        block: int,
        *arguments: Argument,
        shared_bytes: int = 0,
    ) -> None:
        file, _, name = kernel.partition("/")
        if not (all(n > 0 for n in grid) and 0 < block <= MOST_THREADS):
            raise KernelFaultError(f"{kernel}: a grid of {grid} blocks of {block} threads.")
        library = _loaded(self._kernels / f"{file}.cu", self._build)
        boxes = [_box(kernel, argument) for argument in arguments]
        fault = library.emu_launch(
            name.encode(),
            (ctypes.c_uint * 6)(*grid, block, 1, 1),
            ctypes.c_size_t(shared_bytes),
            ctypes.c_uint(self.order),
            "".join(kind for kind, _ in boxes).encode(),
            (ctypes.c_void_p * len(boxes))(*(ctypes.addressof(value) for _, value in boxes)),
        ).decode()
        if fault:
            raise KernelFaultError(f"{kernel}: {fault}.")
        self.launched.add(kernel)

    def kernels_of(self, file: str) -> Iterator[str]:
        """ "file/name" of every kernel in a file."""
        library = _loaded(self._kernels / f"{file}.cu", self._build)
        index = 0
        while name := library.emu_kernel_name(index):
            yield f"{file}/{name.decode()}"
            index += 1


@cache
def _loaded(source: Path, build: Build) -> ctypes.PyDLL:
    # Not CDLL, which lets other Python threads run: the emulator is one machine without locks.
    library = ctypes.PyDLL(str(library_of(source, build)))
    library.emu_launch.restype = ctypes.c_char_p
    library.emu_kernel_name.restype = ctypes.c_char_p
    return library


def _box(kernel: str, argument: Argument) -> tuple[str, ctypes._SimpleCData]:  # type: ignore[type-arg]
    """An argument's kind, as entry.h names them, and its value where a kernel finds it."""
    if isinstance(argument, Tensor):
        if argument.device.type != "cpu" or not argument.is_contiguous():
            raise KernelFaultError(
                f"{kernel}: a tensor on {argument.device} with strides {argument.stride()} and "
                f"shape {list(argument.shape)}; it must be on the CPU and contiguous."
            )
        return "p", ctypes.c_void_p(argument.data_ptr())
    if argument is None:
        return "p", ctypes.c_void_p(0)
    if isinstance(argument, float):
        return "f", ctypes.c_float(argument)
    if argument not in _WHOLE_NUMBERS:
        raise KernelFaultError(f"{kernel}: {argument} does not fit into 64 bits.")
    return "i", ctypes.c_longlong(argument)
