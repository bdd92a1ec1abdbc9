"""The launch of emulated kernels: what it refuses, and when it compiles anew."""

from pathlib import Path

import pytest
import torch

from tests.cuda_emulator import build
from tests.cuda_emulator.build import Build, library_of
from tests.cuda_emulator.emulated import EmulatedLaunch, KernelFaultError
from tests.cuda_emulator.planted import KERNELS

ONE = (1, 1, 1)
PARAMETERS = "operations/parameters"
X, Y = torch.zeros(4), torch.zeros(4, dtype=torch.float64)

HEADER = "#pragma once\nconstexpr int kStep = 1;\n"
SOURCE = """
#include "portable.cuh"
#include "step.cuh"
extern "C" __global__ void add(int* y) { y[threadIdx.x] += kStep; }
EXPORT_KERNEL(add, add)
"""


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ((X, 1, 2, 0.5), "got 4 arguments, but it has 5 parameters"),
        ((X, 1, 2, 3, Y), "argument 3 is of kind i, but its parameter of kind f"),
        ((X, 1.0, 2, 0.5, Y), "argument 1 is of kind f, but its parameter of kind i"),
        ((1, 1, 2, 0.5, Y), "argument 0 is of kind i, but its parameter of kind p"),
        ((X, 2**31, 2, 0.5, Y), "argument 1 is 2147483648, but its parameter an int"),
        ((X, 1, 2**63, 0.5, Y), "9223372036854775808 does not fit into 64 bits"),
        ((X[::2], 1, 2, 0.5, Y), r"with strides \(2,\) and shape \[2\]; it must be on the CPU and"),
        ((X.to("meta"), 1, 2, 0.5, Y), "a tensor on meta"),
    ],
)
def test_arguments_that_do_not_fit_their_parameters_are_refused(
    arguments: tuple[object, ...], why: str
) -> None:
    with pytest.raises(KernelFaultError, match=f"{PARAMETERS}: .*{why}"):
        EmulatedLaunch(kernels=KERNELS)(PARAMETERS, ONE, 1, *arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(("grid", "block"), [(ONE, 0), (ONE, 1025), ((0, 1, 1), 32)])
def test_sizes_that_no_card_has_are_refused(grid: tuple[int, int, int], block: int) -> None:
    with pytest.raises(KernelFaultError, match=f"blocks of {block} threads"):
        EmulatedLaunch(kernels=KERNELS)(PARAMETERS, grid, block, X, 1, 2, 0.5, Y)


def test_a_kernel_that_is_not_exported_is_refused() -> None:
    with pytest.raises(KernelFaultError, match="operations/nothing: no EXPORT_KERNEL of that name"):
        EmulatedLaunch(kernels=KERNELS)("operations/nothing", ONE, 1)


def test_what_ran_is_remembered_and_what_could_not_is_not() -> None:
    launch = EmulatedLaunch(kernels=KERNELS)
    launch(PARAMETERS, ONE, 1, X, 1, 2, 0.5, Y)
    with pytest.raises(KernelFaultError):
        launch("operations/unwritten", ONE, 1)
    assert launch.launched == {PARAMETERS}


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(build, "LIBRARIES", tmp_path / "libraries")
    (tmp_path / "step.cuh").write_text(HEADER)
    (tmp_path / "adding.cu").write_text(SOURCE)
    return tmp_path / "adding.cu"


def test_a_file_is_compiled_again_when_it_or_what_it_includes_has_changed(source: Path) -> None:
    first = library_of(source, Build.PLAIN)
    made_at = first.stat().st_mtime_ns
    assert library_of(source, Build.PLAIN) == first
    assert first.stat().st_mtime_ns == made_at
    (source.parent / "step.cuh").write_text(HEADER.replace("1", "5"))
    second = library_of(source, Build.PLAIN)
    assert second != first
    y = torch.zeros(32, dtype=torch.int32)
    EmulatedLaunch(kernels=source.parent)("adding/add", ONE, 32, y)
    assert y.tolist() == [5] * 32
    source.write_text(SOURCE.replace("+=", "-="))
    assert library_of(source, Build.PLAIN) not in (first, second)


def test_libraries_of_old_contents_are_forgotten(source: Path) -> None:
    latest = []
    for step in range(6):
        (source.parent / "step.cuh").write_text(HEADER.replace("1", str(step)))
        latest.append(library_of(source, Build.PLAIN))
    assert sorted(latest[2:]) == sorted((source.parent / "libraries").glob("*.so"))


def test_a_file_that_is_no_cpp_is_refused_with_what_the_compiler_says(source: Path) -> None:
    source.write_text(SOURCE.replace("kStep;", "kSteps;"))
    with pytest.raises(RuntimeError, match=r"(?s)cannot compile .*adding\.cu.*kSteps"):
        library_of(source, Build.PLAIN)
    assert not list((source.parent / "libraries").glob("*.so"))
