"""The ops on CPU tensors, run by the emulated kernels or, with --card, by those of a card."""

from collections.abc import Iterator
from functools import cache

import pytest
import torch

from cuda_ext import ops
from cuda_ext.card import find_card, look
from cuda_ext.on_card import put_on
from lowmoe.kernels.cuda import kernels_home
from lowmoe.settings import read_settings
from tests.cuda_emulator.emulated import EmulatedLaunch
from tests.cuda_ext.mirrored import MirroredLaunch


@cache
def _implemented(on_card: bool) -> EmulatedLaunch | MirroredLaunch:
    """torch knows an implementation for the rest of the process, so this is done once in it."""
    launch = _mirrored() if on_card else EmulatedLaunch()
    ops.define()
    _libraries.append(ops.implement(launch, "CPU"))
    return launch


_libraries: list[torch.library.Library] = []


def _mirrored() -> MirroredLaunch:
    card = find_card("auto", look())
    if card is None:
        raise pytest.UsageError("--card, but no card here can be used; lowmoe doctor says why")
    kernels = kernels_home(read_settings())
    return MirroredLaunch(put_on(card, kernels, print), torch.device("cuda", card.index))


@pytest.fixture
def emulated(request: pytest.FixtureRequest) -> Iterator[EmulatedLaunch | MirroredLaunch]:
    """What runs torch.ops.lowmoe on CPU tensors: a test may set its order and multiprocessors."""
    launch = _implemented(request.config.getoption("--card"))
    before = launch.order, launch.n_multiprocessors
    yield launch
    launch.order, launch.n_multiprocessors = before
