"""Why a machine may be slower than its parts, as far as it says so itself.

Knows:        where Linux and NVIDIA's driver tell of throttling, links and limits.
Ignorant of:  models, predictions.
"""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from lowmoe.plan.memo import Memo

SYSTEM = Path("/sys")
SLOW_RAM = 35e9  # one channel of DDR5-4800 reads 33 GB/s at best, two of DDR4-3200 44
SLOW_DISK = 1.5e9  # SATA disks read 0.55 GB/s, NVMe disks of PCIe 3 2 to 3.5
MANY_THREADS = 4  # fewer cannot ask for all that RAM gives
SMI_TIMEOUT_S = 5.0
_SMI_FIELDS = (
    "name",
    "power.limit",
    "power.default_limit",
    "pcie.link.width.current",
    "pcie.link.width.max",
    "temperature.gpu",
    "clocks_throttle_reasons.hw_thermal_slowdown",
)


def reasons(memo: Memo, system: Path = SYSTEM, smi: str | None = None) -> list[str]:
    """Each in a sentence, with what to do.  smi: the output of nvidia-smi, None to ask it."""
    lines = (_ask_driver() if smi is None else smi).strip().splitlines()
    return [
        *_of_ram(memo),
        *_of_disk(memo, system),
        *_of_processor(system),
        *(reason for line in lines for reason in _of_card(line)),
    ]


def _of_ram(memo: Memo) -> Iterator[str]:
    speed = memo.ram_bytes_per_s
    if speed < SLOW_RAM and memo.cpu.n_threads >= MANY_THREADS:
        yield (
            f"RAM reads at {speed / 1e9:.0f} GB/s, as one channel does: put modules of one size "
            "into both channels, and switch on their profile (EXPO, XMP) in the firmware."
        )


def _of_disk(memo: Memo, system: Path) -> Iterator[str]:
    speed = memo.disk_bytes_per_s
    if speed is not None and speed < SLOW_DISK:
        spinning = [p for p in system.glob("block/sd*/queue/rotational") if _read(p) == "1"]
        what = "a disk that spins or a network" if spinning else "a SATA disk or a network"
        yield (
            f"the disk of LOWMOE_HOME reads at {speed / 1e9:.2g} GB/s, as {what} does: models "
            "that do not fit in RAM want an NVMe disk."
        )


def _of_processor(system: Path) -> Iterator[str]:
    cpus = system / "devices/system/cpu"
    counts = [_read(p) for p in cpus.glob("cpu0/thermal_throttle/package_throttle_count")]
    if any(count.isdigit() and int(count) > 0 for count in counts):
        yield (
            f"the processor slowed itself down {counts[0]} times since it started, because it was "
            "too hot: look after its cooler."
        )
    top, limit = (
        _read(cpus / f"cpu0/cpufreq/{n}") for n in ("cpuinfo_max_freq", "scaling_max_freq")
    )
    if top.isdigit() and limit.isdigit() and int(limit) < 0.9 * int(top):
        yield (
            f"the processor is held to {int(limit) / 1e6:.1f} of its {int(top) / 1e6:.1f} GHz: "
            "choose another power profile."
        )


def _of_card(line: str) -> Iterator[str]:
    """line: of nvidia-smi, the fields above with commas between."""
    fields = [field.strip() for field in line.split(",")]
    if len(fields) != len(_SMI_FIELDS):
        return
    name, power, full, width, widest, degrees, too_hot = fields
    if _number(power) < 0.9 * _number(full):
        yield f"{name} is held to {_number(power):.0f} of {_number(full):.0f} W (nvidia-smi -pl)."
    if 0 < _number(width) < _number(widest):
        yield (
            f"{name} has {width} of {widest} PCIe lanes: move it to the slot next to the "
            "processor, or free the lanes that another slot shares."
        )
    if too_hot == "Active":
        yield f"{name} slows itself down at {degrees} degrees: look after its cooling."


def _ask_driver() -> str:
    """What nvidia-smi says; nothing where it is not there or does not answer."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    query = [program, f"--query-gpu={','.join(_SMI_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        asked = subprocess.run(
            query, capture_output=True, text=True, timeout=SMI_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return asked.stdout


def _number(text: str) -> float:
    """0 for what is not known, which the driver writes as [N/A]."""
    try:
        return float(text)
    except ValueError:
        return 0.0


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8").strip()
    except OSError:
        return ""
