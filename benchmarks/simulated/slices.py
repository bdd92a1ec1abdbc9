"""Do experts that lie in slices of their inner dimension decode faster?   tokens/s.

Counts:      Mixtral's shapes on the reference machine in simulated time, experts whole and in
             slices of 16384 / n or 14336 / n neurons; misses on the CPU, and as measured costs
             split them; a CPU that computes as fast as RAM gives, and slower ones.
Leaves out:  what slices cost kernels: a launch for each, sums of parts.

Beside it: the bound of whole experts.

    python -m benchmarks.simulated.slices
"""

import json
from dataclasses import replace
from typing import Any

from benchmarks.simulated.machine import Speeds
from benchmarks.simulated.model import Shape, SimulatedModel
from benchmarks.simulated.predictions import BUS, DISK, N_TOKENS, RAM, ROWS, shape_of
from lowmoe.cards import CARDS

N_SLICES = (1, 4, 8)
CPUS = (80e9, 66e9, 55e9, 40e9)
RAM_BYTES = 128 * 2**30


def speed(shape: Shape, cpu: float, misses: Any) -> float:
    """Tokens a second."""
    speeds = Speeds(gpu=CARDS["4090"].bandwidth, bus=BUS, ram=RAM, cpu=cpu, disk=DISK)
    with SimulatedModel(shape, replace(speeds), misses) as model:
        model.decode(N_TOKENS // 2)
        return model.decode(N_TOKENS // 2).tokens_per_s


def main() -> None:
    print("| | CPU, GB/s | whole, cpu | whole, auto | 4 slices, auto | 8 slices, auto |")
    print("|---|---|---|---|---|---|")
    results = []
    for row in ROWS:
        if not row.model.startswith("mixtral"):
            continue
        whole = shape_of(row, CARDS["4090"], RAM_BYTES)
        for cpu in CPUS:
            on_cpu = speed(whole, cpu, "cpu")
            by = {n: speed(whole.sliced(n), cpu, "auto") for n in N_SLICES}
            columns = " | ".join(f"{of:.1f}" for of in (on_cpu, *by.values()))
            print(f"| {row.model}, {row.bits} bits | {cpu / 1e9:.0f} | {columns} |", flush=True)
            results.append(
                {"model": row.model, "bits": row.bits, "cpu": cpu, "on_cpu": on_cpu, "auto": by}
            )
    print(json.dumps(results))


if __name__ == "__main__":
    main()
