"""How many instructions does a weight cost on a GPU?   instructions of a lane, for a plane's weight

    python benchmarks/gpu_instructions.py [--sm 89 90]

Counts:      the innermost loop that multiplies, in the machine code that NVRTC makes for a card:
             everything there, and the usual, without what branches within the loop jump over.
             Beside it the reads of shared memory, registers of a thread, the usual for each mma.
Leaves out:  all that is outside the loop; how long an instruction takes.
Ceilings:    a multiprocessor issues 128 instructions of a lane each clock (4 schedulers, 32 lanes)
             and reads 32 words of shared memory (32 banks). Below the table: how many weights each
             clock the memory of a card brings to a multiprocessor; decoding waits for memory alone
             as long as 128 / (instructions a weight) is more.

Needs no GPU, as nothing runs.
"""

import argparse
import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cuda_ext.machine_code import IMMA, KernelCode, read_kernels

WEIGHTS_A_BYTE = 4  # of a plane: 2 bits each
# An mma.m16n8k32 multiplies 8 weights of each lane: for decoding they are 16 rows by 32 columns of
# which half are 0, for prompts 8 rows by 32 columns.
LANE_WEIGHTS = 8
TILE_TOKENS = 16  # of one mma of a prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """From NVIDIA's data sheets.  clock_ghz: boost; memory_gb_per_s: GB are 1e9 bytes."""

    name: str
    sm: int
    n_multiprocessors: int
    clock_ghz: float
    memory_gb_per_s: float

    @property
    def weights_a_clock(self) -> float:
        """That memory brings to one multiprocessor."""
        return self.memory_gb_per_s * WEIGHTS_A_BYTE / self.n_multiprocessors / self.clock_ghz


CARDS = (
    Card(name="A100", sm=80, n_multiprocessors=108, clock_ghz=1.41, memory_gb_per_s=2039),
    Card(name="RTX 3090", sm=86, n_multiprocessors=82, clock_ghz=1.70, memory_gb_per_s=936),
    Card(name="RTX 4090", sm=89, n_multiprocessors=128, clock_ghz=2.52, memory_gb_per_s=1008),
    Card(name="H100 SXM", sm=90, n_multiprocessors=132, clock_ghz=1.83, memory_gb_per_s=3350),
    Card(name="H200", sm=90, n_multiprocessors=132, clock_ghz=1.83, memory_gb_per_s=4800),
    Card(name="RTX 5090", sm=120, n_multiprocessors=170, clock_ghz=2.41, memory_gb_per_s=1792),
)


def weights_of(name: str, n_mma: int) -> float:
    """Weights of one lane and plane that so many mma of a kernel multiply."""
    tile = re.fullmatch(r"tiles_(\d)/\w+_(\d+)", name)
    if tile is None:
        return n_mma * LANE_WEIGHTS
    n_planes, n_tokens = map(int, tile.groups())  # planes are added up first; tokens share weights
    return n_mma * LANE_WEIGHTS * n_planes * TILE_TOKENS / n_tokens


def row_of(sm: int, name: str, code: KernelCode) -> dict[str, Any] | None:
    """What to say of a kernel; None if it multiplies no weights."""
    loop = code.innermost(IMMA)
    if loop is None:
        return None
    n_mma = loop.count(IMMA)
    weights = weights_of(name, n_mma)
    return {
        "kernel": name,
        "sm": sm,
        "registers": code.registers,
        "instructions": len(loop.opcodes),
        "usual": len(loop.usual),
        "mma": n_mma,
        "shared_loads": loop.count("LDS"),
        "weights": weights,
        "a_weight": len(loop.opcodes) / weights,
        "usual_a_weight": len(loop.usual) / weights,
        "shared_loads_a_weight": loop.count("LDS") / weights,
        "usual_an_mma": len(loop.usual) / n_mma,
    }


def report(sm: int, rows: list[dict[str, Any]]) -> None:
    """A table in Markdown, and what memory brings."""
    print(f"\nsm_{sm}\n")
    print("| kernel | registers | instructions | usual | mma | a weight | usual | LDS | an mma |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['kernel']} | {row['registers']} | {row['instructions']} | {row['usual']} "
            f"| {row['mma']} | {row['a_weight']:.2f} | {row['usual_a_weight']:.2f} "
            f"| {row['shared_loads_a_weight']:.2f} | {row['usual_an_mma']:.1f} |"
        )
    for card in CARDS:
        if card.sm == sm:
            print(f"\n{card.name}: memory brings {card.weights_a_clock:.0f} weights a clock.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sm", type=int, nargs="+", default=[89, 90], help="89 for sm_89")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for sm in parser.parse_args().sm:
            kernels = read_kernels(sm, Path(folder), print)
            of_sm = [row for name, code in kernels.items() if (row := row_of(sm, name, code))]
            report(sm, of_sm)
            rows += of_sm
    print(json.dumps({"question": Path(__file__).stem, "rows": rows}))


if __name__ == "__main__":
    main()
