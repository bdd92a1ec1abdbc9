"""What is said of this machine is true of it."""

import os

import psutil
import pytest
import torch

from lowmoe.engine import machine
from lowmoe.engine.machine import machine_line, physical_cores, ram_read_bandwidth


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


def test_bandwidth_is_bytes_over_the_best_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 3.0, 10.0, 12.0, 20.0, 24.0])  # three runs: 3, 2 and 4 seconds
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    monkeypatch.setattr(machine, "PROBE_BYTES", 4096)
    assert ram_read_bandwidth() == 4096 / 2.0


def test_the_probe_takes_no_more_memory_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0] * 6)
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    monkeypatch.setattr(machine, "PROBE_BYTES", 4096)
    assert ram_read_bandwidth(1024) == 1024
    assert ram_read_bandwidth(8192) == 4096
