"""What is said of this machine is true of it."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import cast

import psutil
import pytest
import torch

from lowmoe.checkpoint.buffers import page_aligned
from lowmoe.engine import machine
from lowmoe.engine.machine import (
    PROBE_RUNS,
    machine_line,
    new_pool,
    own_cpus,
    physical_cores,
    ram_read_bandwidth,
)
from lowmoe.kernels.cpu import Pool


@pytest.mark.parametrize(
    ("allowed", "physical", "limits", "cores"),
    [
        (16, 8, [], 8),  # hyper-threads are not counted twice
        (2, 8, [], 2),  # taskset
        (16, 8, [2.5, 4.0], 2),  # a container's quota
        (16, 8, [0.2], 1),
        (16, None, [], 16),  # nobody knows which are hyper-threads
    ],
)
def test_cores_are_those_this_process_may_use(
    monkeypatch: pytest.MonkeyPatch,
    allowed: int,
    physical: int | None,
    limits: list[float],
    cores: int,
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(allowed)), raising=False)
    monkeypatch.setattr("psutil.cpu_count", lambda logical: physical)
    monkeypatch.setattr(machine, "cpu_limits", lambda: limits)
    assert physical_cores() == cores


def test_where_affinity_is_unknown_all_cores_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("os.sched_getaffinity", raising=False)
    monkeypatch.setattr(machine, "cpu_limits", lambda: [])
    wanted = psutil.cpu_count(logical=False) or os.cpu_count()
    assert physical_cores() == wanted


def test_the_machine_line_names_processor_cores_memory_and_torch() -> None:
    line = machine_line()
    assert line.partition(",")[0].strip()
    assert f"{physical_cores()} cores" in line
    assert f"{psutil.virtual_memory().total / 2**30:.0f} GiB RAM" in line
    assert f"torch {torch.__version__}" in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("cores", "n_threads", "cpus"),
    [
        # Hyper-threads in pairs, as Intel numbers them, and in halves, as AMD does.
        ({0: (0, 0), 1: (0, 0), 2: (0, 1), 3: (0, 1)}, 2, [0, 2]),
        ({0: (0, 0), 1: (0, 1), 2: (0, 0), 3: (0, 1)}, 2, [0, 1]),
        # The same number names a core in each of two packages.
        ({0: (0, 0), 1: (1, 0)}, 2, [0, 1]),
        # taskset left the second thread of a core, and a core.
        ({5: (0, 2), 9: (0, 4)}, 2, [5, 9]),
        # Fewer threads than cores: which ones is for the scheduler to say.
        ({0: (0, 0), 1: (0, 1)}, 1, []),
        # More of them than cores: some would have to share.
        ({0: (0, 0), 1: (0, 0)}, 2, []),
        # Linux does not say what a core is: each CPU is one.
        ({3: None, 4: None}, 2, [3, 4]),
    ],
)
def test_threads_are_pinned_only_where_each_has_a_core_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    cores: dict[int, tuple[int, int] | None],
    n_threads: int,
    cpus: list[int],
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(cores), raising=False)
    write_topology(tmp_path, cores)
    monkeypatch.setattr(machine, "Path", lambda path: Path(f"{tmp_path}{path}"))
    assert own_cpus(n_threads) == cpus


def write_topology(root: Path, cores: dict[int, tuple[int, int] | None]) -> None:
    """The files of /sys that name the package and the core of each CPU."""
    for cpu, core in cores.items():
        folder = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
        folder.mkdir(parents=True)
        if core is not None:
            (folder / "physical_package_id").write_text(f"{core[0]}\n")
            (folder / "core_id").write_text(f"{core[1]}\n")


def test_where_affinity_is_unknown_nothing_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("os.sched_getaffinity", raising=False)
    assert own_cpus(2) == []


def test_the_pool_without_a_model_has_a_thread_a_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "physical_cores", lambda: 3)
    assert new_pool().n_threads == 3


class TimedPool:
    """A pool whose reads take as long as they are told to."""

    def __init__(self, seconds: Iterable[float]) -> None:
        self._seconds = iter(seconds)
        self.read: list[int] = []

    def read_seconds(self, data: int, n_bytes: int) -> float:
        assert data % 64 == 0
        self.read.append(n_bytes)
        return next(self._seconds)


def test_bandwidth_is_bytes_over_the_best_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "PROBE_BYTES", 4096)
    pool = TimedPool([3.0, 2.0, 4.0, 2.5, 5.0])
    assert ram_read_bandwidth(cast(Pool, pool)) == 4096 / 2.0
    assert pool.read == [4096] * PROBE_RUNS


def test_memory_that_is_there_is_read_and_none_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "PROBE_BYTES", 4096)
    there = [page_aligned(n_bytes) for n_bytes in (1024, 8192)]
    monkeypatch.delattr(machine, "page_aligned")
    for resident, read in zip(there, (1024, 4096), strict=True):
        pool = TimedPool([1.0] * PROBE_RUNS)
        assert ram_read_bandwidth(cast(Pool, pool), resident) == read
        assert pool.read == [read] * PROBE_RUNS


@pytest.mark.parametrize("n_bytes", [200_000, 2**20])
@pytest.mark.parametrize("n_threads", [1, 2])
def test_a_real_pool_reads_no_faster_than_a_core_can_load(n_threads: int, n_bytes: int) -> None:
    # Twice 64 bytes a cycle, and 6e9 cycles a second; doing nothing would look faster.
    found = ram_read_bandwidth(Pool(n_threads, []), page_aligned(n_bytes).fill_(1))
    assert 0 < found < 2 * 64 * 6e9 * n_threads
