"""What a machine says of itself where it is slower than its parts."""

from pathlib import Path

import pytest

from lowmoe.plan.machine import Processor
from lowmoe.plan.memo import Memo
from lowmoe.plan.shortfall import reasons


def memo(*, ram: float = 80e9, disk: float | None = None, threads: int = 8) -> Memo:
    cpu = Processor(n_threads=threads, word_bytes_per_s=4e11, products_per_s=3e12)
    return Memo(key="", ram_bytes_per_s=ram, cpu=cpu, disk_bytes_per_s=disk)


def written(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text + "\n")
    return folder


FREQUENCIES = "devices/system/cpu/cpu0/cpufreq/"
HOT = "devices/system/cpu/cpu0/thermal_throttle/package_throttle_count"


def test_a_machine_without_faults_says_nothing(tmp_path: Path) -> None:
    system = written(
        tmp_path,
        {
            HOT: "0",
            FREQUENCIES + "cpuinfo_max_freq": "5000000",
            FREQUENCIES + "scaling_max_freq": "5000000",
        },
    )
    smi = "NVIDIA GeForce RTX 4090, 450.00, 450.00, 16, 16, 45, Not Active"
    assert reasons(memo(disk=6e9), system, smi) == []


@pytest.mark.parametrize(
    ("of", "files", "smi", "said"),
    [
        (memo(ram=20e9), {}, "", "one channel"),
        (memo(disk=0.5e9), {}, "", "SATA"),
        (memo(disk=0.1e9), {"block/sda/queue/rotational": "1"}, "", "spins"),
        (memo(), {HOT: "37"}, "", "37 times"),
        (
            memo(),
            {FREQUENCIES + "cpuinfo_max_freq": "5000000", FREQUENCIES + "scaling_max_freq": "2e6"},
            "",
            None,
        ),
        (
            memo(),
            {
                FREQUENCIES + "cpuinfo_max_freq": "5000000",
                FREQUENCIES + "scaling_max_freq": "2000000",
            },
            "",
            "held to 2.0 of its 5.0 GHz",
        ),
        (memo(), {}, "RTX 4090, 250, 450, 16, 16, 45, Not Active", "250 of 450 W"),
        (memo(), {}, "RTX 4090, 450, 450, 4, 16, 45, Not Active", "4 of 16 PCIe lanes"),
        (memo(), {}, "RTX 4090, 450, 450, 16, 16, 91, Active", "91 degrees"),
        (memo(), {}, "RTX 4090, [N/A], [N/A], [N/A], [N/A], 50, Not Active", None),
        (memo(), {}, "an error nobody foresaw", None),
        (memo(ram=20e9, threads=2), {}, "", None),
    ],
)
def test_each_fault_is_named(
    tmp_path: Path, of: Memo, files: dict[str, str], smi: str, said: str | None
) -> None:
    found = reasons(of, written(tmp_path, files), smi)
    if said is None:
        assert found == []
    else:
        (reason,) = found
        assert said in reason
