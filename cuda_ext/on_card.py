"""Runs kernels on a card.

Knows:        kernels by name, torch's current stream, how cuda-core launches.
Ignorant of:  what kernels compute, which of them an operation takes.
"""

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cuda_ext.card import Card
from cuda_ext.compile import KERNELS, Announce, Compiler
from cuda_ext.cubin import kernel_names
from cuda_ext.launch import Argument

if TYPE_CHECKING:
    from cuda.core import Kernel, LaunchConfig

# A grid that comes again, as all do in decoding, finds its LaunchConfig made. Prompts of ever new
# lengths bring ever new grids: so many are remembered.
_REMEMBERED_CONFIGS = 4096
# CU_STREAM_LEGACY: torch's default stream by its own name. Its handle is 0, which cuda-core may be
# told (CUDA_PYTHON_CUDA_PER_THREAD_DEFAULT_STREAM) to take for another one.
_LEGACY_STREAM = 1


class LaunchError(Exception):
    """The driver refused a call, or a launch does not fit its kernel."""


class RefusedLaunch(LaunchError):
    """The driver did: the card has failed, maybe long before, or its memory does not do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedKernel:
    """A kernel in a card's memory, and how many parameters it takes."""

    kernel: "Kernel"
    n_parameters: int


class OnCard:
    """A Launch for tensors of one card, on torch's current stream of that card.

    Waits for nothing, allocates nothing, loads nothing: a CUDA graph may capture it. A graph holds
    the kernels' addresses, not the kernels: keep this object as long as the graph.
    """

    def __init__(self, card: Card, kernels: Mapping[str, LoadedKernel], core: ModuleType) -> None:
        """kernels: by "file/name"; core: cuda.core."""
        self.kernels = kernels
        self._card, self._core = card, core
        self._threads = threading.local()
        self._config = lru_cache(maxsize=_REMEMBERED_CONFIGS)(self._new_config)
        self._stream = lru_cache(maxsize=None)(core.Stream.from_handle)  # torch has a few, for ever

    @property
    def n_multiprocessors(self) -> int:
        """Of the card."""
        return self._card.n_multiprocessors

    def __call__(
        self,
        kernel: str,
        grid: tuple[int, int, int],
        block: int,
        *arguments: Argument,
        shared_bytes: int = 0,
    ) -> None:
        """As Launch says.  Raises LaunchError if tensors are elsewhere or are too many or few, and
        RefusedLaunch.
        """
        index = self._card.index
        if torch.cuda.current_device() != index:
            with torch.cuda.device(index):
                return self(kernel, grid, block, *arguments, shared_bytes=shared_bytes)
        loaded = self.kernels[kernel]
        if len(arguments) != loaded.n_parameters:
            raise LaunchError(
                f"{kernel} takes {loaded.n_parameters} parameters, got {len(arguments)}."
            )
        parameters = as_parameters(arguments, index)
        try:
            self._enter_thread()
            self._core.launch(
                self._stream(torch.cuda.current_stream(index).cuda_stream or _LEGACY_STREAM),
                self._config(grid, block, shared_bytes),
                loaded.kernel,
                *parameters,
            )
        except Exception as e:  # of a class that cuda-core has no public name for
            raise RefusedLaunch(f"{kernel}: {self._card.name} does not launch it, {e}.") from e
        return None

    def _enter_thread(self) -> None:
        """A launch on the default stream goes to the thread's context, which a new thread lacks."""
        if not hasattr(self._threads, "entered"):
            self._core.Device(self._card.index).set_current()
            self._threads.entered = True

    def _new_config(
        self, grid: tuple[int, int, int], block: int, shared_bytes: int
    ) -> "LaunchConfig":
        return self._core.LaunchConfig(grid=grid, block=block, shmem_size=shared_bytes)


def as_parameters(arguments: Iterable[Argument], device_index: int) -> list[int | np.float32]:
    """Arguments as cuda-core copies them into a kernel's parameters.

    It copies an int as 8 bytes, of which a kernel's `int` is the first 4, and a float as a double,
    which is no kernel's; so fractions become float32.
    device_index: where tensors must be, -1 for the CPU.  Raises LaunchError if one is not.
    """
    return [_as_parameter(argument, device_index) for argument in arguments]


def _as_parameter(argument: Argument, device_index: int) -> int | np.float32:
    if isinstance(argument, Tensor):
        if argument.get_device() != device_index:
            raise LaunchError(
                f"a tensor is on {argument.device}, the kernel on cuda:{device_index}."
            )
        return argument.data_ptr()
    if argument is None:
        return 0
    return np.float32(argument) if isinstance(argument, float) else int(argument)


def put_on(card: Card, cache: Path, announce: Announce, sources: Path = KERNELS) -> OnCard:
    """Compile what is not in the cache and load every kernel of the sources.

    Raises CompileError as Compiler.compile_all, LaunchError if the driver refuses a kernel.
    """
    from cuda import core

    compiled = Compiler(sm=card.sm, cache=cache, sources=sources).compile_all(announce)
    kernels = {}
    try:
        core.Device(card.index).set_current()
    except Exception as e:  # of a class that cuda-core has no public name for
        raise LaunchError(f"{card.name} cannot be used, {e}.") from e
    for file, code in compiled.items():
        library = core.ObjectCode.from_cubin(code, name=file)
        for name in kernel_names(code):
            try:
                kernel = library.get_kernel(name)
            except Exception as e:  # of a class that cuda-core has no public name for
                raise LaunchError(f"{file}/{name}: {card.name} cannot load it, {e}.") from e
            kernels[f"{file}/{name}"] = _load(f"{file}/{name}", kernel, card)
    return OnCard(card, kernels, core)


def _load(name: str, kernel: "Kernel", card: Card) -> LoadedKernel:
    """Put it into the card's memory now, not when it is first launched.

    The driver loads lazily, and a first launch under capture might be refused. A block may then
    have all the dynamic shared memory that the card can give beside the kernel's static one.
    """
    from cuda.bindings import driver

    def checked(result: tuple[Any, ...]) -> Any:
        code, *values = result
        if code != driver.CUresult.CUDA_SUCCESS:
            raise LaunchError(f"{name}: {card.name} cannot load it, {code.name}.")
        return values[0] if values else None

    device, handle = checked(driver.cuDeviceGet(card.index)), kernel.handle
    most = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
    static = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES
    dynamic = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    most_bytes = checked(driver.cuDeviceGetAttribute(most, device))
    static_bytes = checked(driver.cuKernelGetAttribute(static, handle, device))
    checked(driver.cuKernelSetAttribute(dynamic, most_bytes - static_bytes, handle, device))
    checked(driver.cuFuncLoad(checked(driver.cuKernelGetFunction(handle))))
    return LoadedKernel(kernel=kernel, n_parameters=kernel.num_arguments)
