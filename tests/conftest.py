"""What every test may ask for: tiny models, a home, a machine of one thread and no GPU."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import lowmoe
from cuda_ext.card import Facts
from lowmoe.api import Model
from tests.talking_mixtral import copy_of, write_talking_mixtral

NO_GPU = Facts(driver=None, torch=None, cuda_core=None, cards=())


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--card",
        action="store_true",
        help="tests of CUDA kernels run them on the card that is here, not in the emulator",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is marked gpu runs where there is one."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def small_machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tiny models are thousands of tiny operations: threads would only wait for each other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lowmoe.engine.load.physical_cores", lambda: 1)
        patch.setattr("lowmoe.library.budgets.physical_cores", lambda: 1)
        patch.setattr("lowmoe.library.calibration.CALIBRATION_TOKENS", 512)
        # What fits into a cache reads faster than RAM; how fast is nobody's question here.
        patch.setattr("lowmoe.engine.machine.PROBE_BYTES", 2**20)
        # With one, "auto" would compute everything there.
        patch.setattr("lowmoe.engine.gpu.look", lambda: NO_GPU)
        patch.setattr("lowmoe.plan.here.look", lambda: NO_GPU)
        patch.setattr("lowmoe.plan.probe.DISK_BLOCK", 2**20)
        patch.setattr("lowmoe.plan.probe.DISK_BLOCKS", 4)
        # What is measured of the machine is kept there; nobody's own home is written to.
        patch.setenv("LOWMOE_HOME", str(tmp_path_factory.mktemp("home")))
        torch.set_num_threads(1)
        yield


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """LOWMOE_HOME, which does not exist yet."""
    monkeypatch.setenv("LOWMOE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="session")
def talking_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint with a tokenizer and a chat template; nobody writes to it."""
    folder = tmp_path_factory.mktemp("talking") / "checkpoint"
    write_talking_mixtral(folder)
    return folder


@pytest.fixture(scope="session")
def model_folder(talking_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model folder of talking_checkpoint at 6 bits; nobody writes to it."""
    folder = tmp_path_factory.mktemp("model") / "talking-6bit"
    lowmoe.quantize(talking_checkpoint, folder, bits=6)
    return folder


@pytest.fixture(scope="session")
def mute_checkpoint(talking_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same checkpoint without a tokenizer."""
    to = tmp_path_factory.mktemp("mute") / "checkpoint"
    return copy_of(talking_checkpoint, to, without="tokenizer.json")


@pytest.fixture
def model(model_folder: Path) -> Iterator[Model]:
    """A model that is closed when the test ends."""
    with lowmoe.load(model_folder) as model:
        yield model
