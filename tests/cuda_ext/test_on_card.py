"""How a launch becomes a call of cuda-core: everything of it that needs no card."""

import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from cuda_ext.card import Card
from cuda_ext.on_card import (
    LaunchError,
    LoadedKernel,
    OnCard,
    RefusedLaunch,
    as_parameters,
    put_on,
)

CARD = Card(
    index=-1,  # what torch calls the CPU, where the tensors of these tests are
    name="a fake",
    sm=89,
    memory_bytes=0,
    n_multiprocessors=128,
    l2_bytes=0,
)
DEFAULT_STREAM = 0


class FakeCore(ModuleType):
    """Of cuda.core what a launch needs.  launched: (stream, config, kernel, parameters) each."""

    def __init__(self) -> None:
        super().__init__("cuda.core")
        self.launched: list[tuple[Any, ...]] = []
        self.made: list[object] = []  # streams and configs
        self.entered: list[int] = []  # threads
        self.Stream = SimpleNamespace(from_handle=self._note(lambda handle: f"stream {handle}"))
        self.LaunchConfig = self._note(lambda **sizes: sizes)
        self.Device = lambda index: SimpleNamespace(
            set_current=lambda: self.entered.append(threading.get_ident())
        )

    def launch(self, stream: str, config: object, kernel: str, *parameters: object) -> None:
        self.launched.append((stream, config, kernel, parameters))

    def _note(self, make: Callable[..., object]) -> Callable[..., object]:
        def noted(*arguments: object, **sizes: object) -> object:
            self.made.append(make(*arguments, **sizes))
            return self.made[-1]

        return noted


@pytest.fixture
def core() -> FakeCore:
    return FakeCore()


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What torch says is the current stream."""
    current = SimpleNamespace(cuda_stream=DEFAULT_STREAM)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: CARD.index)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: current)
    return current


@pytest.fixture
def launch(core: FakeCore, stream: SimpleNamespace) -> OnCard:
    kernels: dict[str, Any] = {
        "vectors/add": LoadedKernel(kernel="the kernel", n_parameters=3),  # type: ignore[arg-type]
        "vectors/zero": LoadedKernel(kernel="another", n_parameters=0),  # type: ignore[arg-type]
    }
    return OnCard(CARD, kernels, core)


def test_tensors_become_addresses_and_fractions_float32() -> None:
    tensor = torch.arange(4, dtype=torch.int8)
    parameters = as_parameters((tensor, tensor[1:], 7, -1, 2**40, True, None, 0.1), -1)
    assert parameters == [
        tensor.data_ptr(),
        tensor.data_ptr() + 1,
        7,
        -1,
        2**40,
        1,
        0,
        np.float32(0.1),
    ]
    # cuda-core looks at types: a bool would be one byte, a float eight.
    assert [type(p) for p in parameters] == [int] * 7 + [np.float32]


def test_parameters_lie_in_memory_as_a_kernel_reads_them() -> None:
    """By cuda-core's own copying: the bytes at each parameter's address."""
    handler = pytest.importorskip("cuda.core._kernel_arg_handler")
    import ctypes

    tensor = torch.zeros(1)
    holder = handler.ParamHolder(as_parameters((tensor, -3, 2**40 + 5, 0.1), -1))
    addresses = (ctypes.c_void_p * 4).from_address(holder.ptr)
    assert ctypes.c_uint64.from_address(addresses[0]).value == tensor.data_ptr()
    assert ctypes.c_int32.from_address(addresses[1]).value == -3
    assert ctypes.c_int64.from_address(addresses[1]).value == -3
    assert ctypes.c_int64.from_address(addresses[2]).value == 2**40 + 5
    assert ctypes.c_float.from_address(addresses[3]).value == np.float32(0.1)


def test_a_launch_goes_to_torchs_current_stream_with_its_sizes(
    launch: OnCard, core: FakeCore, stream: SimpleNamespace
) -> None:
    x = torch.zeros(3)
    launch("vectors/add", (2, 3, 4), 128, x, 5, 0.5, shared_bytes=64)
    stream.cuda_stream = 4096
    launch("vectors/zero", (1, 1, 1), 32)
    assert core.launched == [
        (
            "stream 1",  # CU_STREAM_LEGACY, whatever handle 0 is taken for
            {"grid": (2, 3, 4), "block": 128, "shmem_size": 64},
            "the kernel",
            (x.data_ptr(), 5, np.float32(0.5)),
        ),
        ("stream 4096", {"grid": (1, 1, 1), "block": 32, "shmem_size": 0}, "another", ()),
    ]
    assert launch.n_multiprocessors == 128


def test_a_launch_that_comes_again_makes_nothing_new(launch: OnCard, core: FakeCore) -> None:
    for _ in range(3):
        launch("vectors/zero", (8, 1, 1), 32)
    assert len(core.launched) == 3
    assert core.made == ["stream 1", {"grid": (8, 1, 1), "block": 32, "shmem_size": 0}]


def test_each_thread_enters_the_cards_context_once(launch: OnCard, core: FakeCore) -> None:
    def twice() -> None:
        launch("vectors/zero", (1, 1, 1), 32)
        launch("vectors/zero", (1, 1, 1), 32)

    twice()
    other = threading.Thread(target=twice)
    other.start()
    other.join()
    assert core.entered == [threading.get_ident(), other.ident]


@pytest.mark.parametrize("arguments", [(), (torch.zeros(1), 1), (torch.zeros(1), 1, 2, 3)])
def test_a_launch_with_too_many_or_too_few_arguments_is_refused(
    launch: OnCard, core: FakeCore, arguments: tuple[Any, ...]
) -> None:
    with pytest.raises(LaunchError, match=f"vectors/add takes 3 parameters, got {len(arguments)}"):
        launch("vectors/add", (1, 1, 1), 32, *arguments)
    assert core.launched == []


@pytest.mark.parametrize("refusing", ["launch", "Device"])
def test_what_the_driver_says_to_a_launch_is_said_with_the_kernel(
    launch: OnCard, core: FakeCore, monkeypatch: pytest.MonkeyPatch, refusing: str
) -> None:
    class DriverError(Exception):
        """As cuda-core's, of no public name."""

    def refuse(*arguments: object, **sizes: object) -> None:
        raise DriverError("CUDA_ERROR_LAUNCH_FAILED: an exception occurred")

    monkeypatch.setattr(core, refusing, refuse)
    with pytest.raises(
        RefusedLaunch,
        match=r"^vectors/zero: a fake does not launch it, CUDA_ERROR_LAUNCH_FAILED: an exception",
    ):
        launch("vectors/zero", (1, 1, 1), 32)


def test_a_tensor_that_is_elsewhere_is_refused() -> None:
    with pytest.raises(LaunchError, match="a tensor is on cpu, the kernel on cuda:1"):
        as_parameters((1, torch.zeros(1)), 1)


def test_a_kernel_that_nobody_wrote_is_refused(launch: OnCard) -> None:
    with pytest.raises(KeyError, match="vectors/addd"):
        launch("vectors/addd", (1, 1, 1), 32)


def test_while_another_card_is_current_a_launch_makes_its_own_current(
    launch: OnCard, core: FakeCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    current = [0]

    class Device:
        def __init__(self, index: int) -> None:
            self.index = index

        def __enter__(self) -> None:
            self.before, current[0] = current[0], self.index

        def __exit__(self, *_: object) -> None:
            current[0] = self.before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(core, "launch", lambda *_: core.launched.append((current[0],)))
    launch("vectors/zero", (1, 1, 1), 32)
    assert core.launched == [(CARD.index,)]
    assert current == [0]


CARD_SHARED_BYTES, STATIC_BYTES = 101376, 1024  # of an RTX 4090 for a block; of a kernel


class FakeDriver:
    """Of NVIDIA's driver what loading needs: remembers what is said of each kernel."""

    def __init__(self, patch: pytest.MonkeyPatch, refuses: str | None = None) -> None:
        driver = pytest.importorskip("cuda.bindings.driver")
        self.dynamic_bytes: dict[str, int] = {}
        self.loaded: list[str] = []
        attributes, done = driver.CUfunction_attribute, driver.CUresult.CUDA_SUCCESS
        optin = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
        static = attributes.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES
        dynamic = attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES

        def set_attribute(which: object, value: int, kernel: str, device: int) -> tuple[object]:
            assert which == dynamic
            self.dynamic_bytes[kernel] = value
            return (done,)

        def load(function: str) -> tuple[object]:
            self.loaded.append(function)
            return (done if function != refuses else driver.CUresult.CUDA_ERROR_INVALID_IMAGE,)

        fakes = {
            "cuDeviceGet": lambda index: (done, index),
            "cuDeviceGetAttribute": lambda w, d: (done, {optin: CARD_SHARED_BYTES}[w]),
            "cuKernelGetAttribute": lambda w, k, d: (done, {static: STATIC_BYTES}[w]),
            "cuKernelSetAttribute": set_attribute,
            "cuKernelGetFunction": lambda kernel: (done, kernel),
            "cuFuncLoad": load,
        }
        for name, fake in fakes.items():
            patch.setattr(driver, name, fake)


def get_kernel(name: str) -> SimpleNamespace:
    return SimpleNamespace(handle=name, num_arguments=len(name))


def get_none(name: str) -> SimpleNamespace:
    raise ValueError("no binary for this card")


def put_on_fake_card(
    patch: pytest.MonkeyPatch,
    folder: Path,
    get_kernel: Callable[[str], SimpleNamespace] = get_kernel,
) -> OnCard:
    """Two files of kernels, really compiled, for a cuda.core and a driver without a card."""
    core = pytest.importorskip("cuda.core")
    library = SimpleNamespace(get_kernel=get_kernel)
    patch.setattr(core, "ObjectCode", SimpleNamespace(from_cubin=lambda code, name: library))
    patch.setattr(core, "Device", FakeCore().Device)
    sources = folder / "sources"
    sources.mkdir()
    (sources / "a.cu").write_text('extern "C" __global__ void one() {}')
    (sources / "b.cu").write_text(
        'extern "C" __global__ void one() {} extern "C" __global__ void three() {}'
    )
    return put_on(CARD, folder / "cache", lambda line: None, sources)


def test_every_kernel_is_loaded_at_once_and_may_have_all_shared_memory_of_the_card(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    driver = FakeDriver(monkeypatch)
    launch = put_on_fake_card(monkeypatch, tmp_path)
    assert sorted(launch.kernels) == ["a/one", "b/one", "b/three"]
    assert sorted(driver.loaded) == ["one", "one", "three"]
    most = CARD_SHARED_BYTES - STATIC_BYTES
    assert driver.dynamic_bytes == {"one": most, "three": most}


def test_a_kernel_that_the_driver_refuses_is_said_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    FakeDriver(monkeypatch, refuses="three")
    with pytest.raises(LaunchError, match=r"b/three: a fake cannot .*CUDA_ERROR_INVALID_IMAGE"):
        put_on_fake_card(monkeypatch, tmp_path)


def test_a_library_that_does_not_load_is_said_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    FakeDriver(monkeypatch)
    with pytest.raises(LaunchError, match="a/one: a fake cannot load it, no binary for this card"):
        put_on_fake_card(monkeypatch, tmp_path, get_none)
