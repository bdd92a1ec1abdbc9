"""The ops on CPU tensors, run by the emulated kernels."""

from collections.abc import Iterator
from functools import cache

import pytest
import torch

from cuda_ext import ops
from tests.cuda_emulator.emulated import EmulatedLaunch


@cache
def _implemented() -> tuple[EmulatedLaunch, list[torch.library.Library]]:
    """torch knows a schema for the rest of the process, so this is done once in it."""
    launch = EmulatedLaunch()
    return launch, [ops.define(), ops.implement(launch, "CPU")]


@pytest.fixture
def emulated() -> Iterator[EmulatedLaunch]:
    """What runs torch.ops.lowmoe on CPU tensors: a test may set its order and multiprocessors."""
    launch, _ = _implemented()
    before = launch.order, launch.n_multiprocessors
    yield launch
    launch.order, launch.n_multiprocessors = before
