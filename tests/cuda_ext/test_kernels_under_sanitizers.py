"""Every kernel: the same bits in every order of threads, nothing that a sanitizer reports."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.cuda_emulator.build import KERNELS, Build, library_of
from tests.cuda_emulator.emulated import ORDERS, EmulatedLaunch
from tests.cuda_emulator.under_sanitizer import (
    NOT_HERE,
    is_reported,
    run_under,
    said_in_parts,
)
from tests.cuda_ext.small_calls import all_calls

FILES = sorted(KERNELS.glob("*.cu"))


def build_all(build: Build) -> None:
    """Side by side: g++ is most of what these tests take."""

    def make(file: Path) -> Path:
        return library_of(file, build)

    with ThreadPoolExecutor() as pool:
        list(pool.map(make, FILES))


def made_in(order: int) -> tuple[dict[str, bytes], set[str]]:
    """What every call writes, and the kernels that were launched."""
    torch.manual_seed(0)
    launch = EmulatedLaunch()
    launch.order = order
    made = {
        call.name: b"".join(bytes(output.flatten().numpy()) for output in call.make(launch))
        for call in all_calls()
    }
    return made, launch.launched


@pytest.fixture(scope="module")
def in_every_order() -> list[tuple[dict[str, bytes], set[str]]]:
    build_all(Build.PLAIN)
    return [made_in(order) for order in ORDERS]


def test_the_order_of_threads_and_blocks_changes_no_bit(
    in_every_order: list[tuple[dict[str, bytes], set[str]]],
) -> None:
    first, *others = (made for made, _ in in_every_order)
    differing = [name for other in others for name in first if first[name] != other[name]]
    assert differing == []


def test_no_kernel_is_left_out(in_every_order: list[tuple[dict[str, bytes], set[str]]]) -> None:
    every = {name for file in FILES for name in EmulatedLaunch().kernels_of(file.stem)}
    assert every - in_every_order[0][1] == set()


@pytest.mark.parametrize("build", [Build.MEMORY, Build.RACES])
def test_no_sanitizer_reports_anything(build: Build) -> None:
    build_all(build)
    done = run_under(build, "tests.cuda_ext.small_calls", build.name)
    if NOT_HERE in done.stderr:
        pytest.skip(f"setarch -R is not allowed here, and without it: {NOT_HERE}")
    said = said_in_parts(done.stderr)
    assert "the end" in said, done.stderr[-2000:]
    assert {name: text[:2000] for name, text in said.items() if is_reported(build, text)} == {}
