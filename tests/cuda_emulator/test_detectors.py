"""Each detector finds the bugs planted for it, and nothing where there is nothing."""

import re
from functools import cache

import pytest
import torch

from tests.cuda_emulator import planted
from tests.cuda_emulator.build import Build
from tests.cuda_emulator.emulated import FORWARD, ORDERS, EmulatedLaunch, KernelFaultError
from tests.cuda_emulator.under_sanitizer import NOT_HERE, is_reported, run_under, said_in_parts

BUGS = (planted.KERNELS / "bugs.cu").read_text().splitlines()
CLEAN = ["clean/rotated", "clean/sum_by_last", "clean/staged_copy"]

# What stands in the way of the launch's end.
FAULTS = {
    "bugs/divergent_barrier": "40 threads wait in __syncthreads, the first of them 0; 24 have",
    "bugs/missing_lane": "31 threads wait in __shfl_xor_sync, the first of them 0; 33 have ended",
    "bugs/lane_outside_its_mask": "__shfl_sync: the calling lane is not in its mask",
    "bugs/two_operations_meet": "meet in __shfl_(xor|down)_sync and in __shfl_(xor|down)_sync",
    "bugs/misaligned_copy": "an address is no multiple of 16",
}
# Results that are not the same in every order of threads; of some the forward order is right.
DISAGREEMENTS = [
    "bugs/missing_barrier",
    "bugs/order_race",
    "bugs/write_after_read",
    "bugs/unwritten_shared",
    "bugs/unwritten_maximum",
    "bugs/missing_wait",
]
MEMORY = [
    "bugs/shared_write_beyond",
    "bugs/shared_read_beyond",
    "bugs/dynamic_shared_beyond",
    "bugs/global_read_beyond",
    "bugs/global_write_beyond",
    "bugs/misaligned_load",
    "bugs/signed_overflow",
]
RACES = [
    "bugs/missing_barrier",
    "bugs/order_race",
    "bugs/write_after_read",
    "bugs/shuffle_for_barrier",
    "bugs/blocks_add",
    "bugs/missing_fence",
    "bugs/copy_before_read",
]


def lines_of(kernel: str) -> set[int]:
    """The lines of bugs.cu, from 1, that a kernel's bug is in."""
    name = kernel.partition("/")[2]
    begin = next(i for i, line in enumerate(BUGS) if f"__global__ void {name}(" in line)
    end = BUGS.index(f"EXPORT_KERNEL({name}, {name})")
    return {i + 1 for i in range(begin, end) if BUGS[i].endswith("// BUG")}


@cache
def reports(build: Build, kernels: tuple[str, ...]) -> dict[str, str]:
    """What the sanitizers say of each kernel, all of them run in one process."""
    done = run_under(build, "tests.cuda_emulator.planted", build.name, *kernels)
    if NOT_HERE in done.stderr:
        pytest.skip(f"setarch -R is not allowed here, and without it: {NOT_HERE}")
    assert done.stderr.count("== ") >= len(ORDERS) * len(kernels), done.stderr
    return said_in_parts(done.stderr)


def lines_in(text: str) -> set[int]:
    return {int(line) for line in re.findall(r"bugs\.cu:(\d+)", text)}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kernel", FAULTS)
def test_a_launch_that_cannot_end_says_why(kernel: str, order: int) -> None:
    launch = EmulatedLaunch(kernels=planted.KERNELS)
    launch.order = order
    with pytest.raises(KernelFaultError, match=rf"{kernel}: block \(0, 0, 0\): .*{FAULTS[kernel]}"):
        planted.run(launch, kernel)
    # And the next one is none the worse for it.
    assert planted.run(launch, "clean/rotated")[0, 0] == 4


@pytest.mark.parametrize("kernel", DISAGREEMENTS)
def test_orders_of_threads_disagree_over_a_kernel_that_leaves_one_open(kernel: str) -> None:
    results = []
    for order in ORDERS:
        launch = EmulatedLaunch(kernels=planted.KERNELS)
        launch.order = order
        results.append(planted.run(launch, kernel))
    bits = {tuple(y.view(torch.int32).tolist()) for y in results}
    assert len(bits) > 1


def test_the_forward_order_alone_would_miss_a_race() -> None:
    launch = EmulatedLaunch(kernels=planted.KERNELS)
    assert launch.order == FORWARD
    wanted = torch.arange(1.0, planted.THREADS + 1)[torch.arange(planted.THREADS) // 2]
    assert torch.equal(planted.run(launch, "bugs/order_race"), wanted)


@pytest.mark.parametrize("kernel", MEMORY)
def test_a_mistake_with_memory_is_reported_at_its_line(kernel: str) -> None:
    text = reports(Build.MEMORY, (*MEMORY, *CLEAN))[kernel]
    assert is_reported(Build.MEMORY, text)
    assert lines_of(kernel)
    assert lines_of(kernel) <= lines_in(text)


@pytest.mark.parametrize("kernel", RACES)
def test_a_race_is_reported_with_both_its_lines(kernel: str) -> None:
    text = reports(Build.RACES, (*RACES, *CLEAN))[kernel]
    assert is_reported(Build.RACES, text)
    assert lines_of(kernel)
    assert lines_of(kernel) <= lines_in(text)


@pytest.mark.parametrize("build", [Build.MEMORY, Build.RACES])
def test_a_kernel_without_a_bug_is_not_reported(build: Build) -> None:
    bugs = MEMORY if build is Build.MEMORY else RACES
    found = reports(build, (*bugs, *CLEAN))
    assert [kernel for kernel in CLEAN if is_reported(build, found[kernel])] == []


@pytest.mark.parametrize("order", ORDERS)
def test_a_kernel_without_a_bug_is_right_in_every_order(order: int) -> None:
    launch = EmulatedLaunch(kernels=planted.KERNELS)
    launch.order = order
    x = torch.arange(1.0, planted.THREADS + 1)
    assert torch.equal(planted.run(launch, "clean/rotated"), x.roll(-3).expand(5, -1))
    assert torch.equal(planted.run(launch, "clean/sum_by_last"), x * (1 + 2 + 3 + 4 + 5 + 6))
    turned = x.view(4, 16).flip(1).flatten()
    assert torch.equal(planted.run(launch, "clean/staged_copy"), turned.expand(2, -1))


def test_every_planted_bug_has_a_detector() -> None:
    launch = EmulatedLaunch(kernels=planted.KERNELS)
    assert set(launch.kernels_of("bugs")) == {*FAULTS, *DISAGREEMENTS, *MEMORY, *RACES}
    assert set(launch.kernels_of("clean")) == set(CLEAN)
