"""What this machine is and how fast its memory is.

Knows:        the processor's name, cores, RAM, measured read bandwidth.
Ignorant of:  models.
"""

import os
import platform
from pathlib import Path

import psutil
import torch
from torch import Tensor

from lowmoe.checkpoint.buffers import page_aligned
from lowmoe.engine.cgroup import cpu_limits
from lowmoe.kernels.cpu import Pool

PROBE_BYTES = 256 * 2**20  # well beyond any last-level cache of a consumer processor
PROBE_RUNS = 5  # of 4 to 8 ms: time for threads to be spread over the cores


def physical_cores() -> int:
    """Cores this process may use, hyper-threads not counted twice."""
    try:
        allowed = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS, Windows
        allowed = os.cpu_count() or 1
    physical = psutil.cpu_count(logical=False) or allowed
    return max(1, min(allowed, physical, *(round(limit) for limit in cpu_limits())))


def own_cpus(n_threads: int) -> list[int]:
    """CPUs for n_threads to be pinned to, a core each; empty where there are more cores than that.

    Part of a machine is left to the scheduler: another process may have chosen the same cores.
    """
    try:
        allowed = sorted(os.sched_getaffinity(0))
    except AttributeError:  # macOS, Windows
        return []
    cores: dict[tuple[int, int] | int, int] = {}
    for cpu in allowed:
        cores.setdefault(_core_of(cpu), cpu)
    return list(cores.values()) if len(cores) == n_threads else []


def _core_of(cpu: int) -> tuple[int, int] | int:
    """Package and core; the CPU itself where Linux does not say."""
    topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
    try:
        package = int((topology / "physical_package_id").read_text())
        return package, int((topology / "core_id").read_text())
    except (OSError, ValueError):
        return cpu


def machine_line() -> str:
    """One line to put above any figure."""
    ram = psutil.virtual_memory().total / 2**30
    return (
        f"{_cpu_name()}, {physical_cores()} cores, {ram:.0f} GiB RAM, "
        f"{platform.system()} {platform.machine()}, torch {torch.__version__}"
    )


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def ram_read_bandwidth(pool: Pool, resident: Tensor | None = None) -> float:
    """Bytes a second that the threads which compute read from RAM, best of some.

    resident: uint8, memory that is in use anyway, to read instead of PROBE_BYTES taken for it.
    What fits into a cache reads faster than RAM.
    """
    probe = page_aligned(PROBE_BYTES).fill_(1) if resident is None else resident
    n_bytes = min(probe.numel(), PROBE_BYTES)
    return n_bytes / min(pool.read_seconds(probe.data_ptr(), n_bytes) for _ in range(PROBE_RUNS))


def new_pool(n_threads: int | None = None) -> Pool:
    """Threads that compute, as many as there are cores or so many."""
    n_threads = n_threads or physical_cores()
    return Pool(n_threads, own_cpus(n_threads)[1:])
