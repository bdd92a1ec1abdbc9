"""How fast does a model decode that is larger than RAM?   tokens/s and bytes read a token.

Counts:      passes of one random token each from cold files: lowmoe's expert store past the page
             cache beside llama.cpp's memory map, in turns; disk bytes are the process's own.
             The model has --shape's layers, as many as make llama.cpp's file 1.5 times the RAM
             that this process may use.
Leaves out:  loading, one warm-up sample a turn, in which caches fill.

Random tokens route more evenly than text, so that caches of experts look worse than they are.
What is written is deleted at the end unless --keep is given.

    python -m benchmarks.peers.larger_than_ram --peer-python VENV/bin/python --work FOLDER \\
        [--shape qwen3-235b-a22b] [--bits 4] [--gguf-bytes 36e9] [--ram 20GiB] [--keep]
"""

import argparse
import math
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from benchmarks.peers.comparison import (
    parser_of,
    print_json,
    report,
    run_stage,
    turn_options,
    workload_of,
)
from benchmarks.peers.contenders import Models
from benchmarks.peers.turns import TurnOptions
from lowmoe.engine.machine import machine_line
from lowmoe.engine.memory import total_ram_bytes

TIMES_RAM = 1.5
PRESETS = {4: "Q4_0", 2: "Q2_K"}  # llama.cpp's smallest and fastest of about that many bits
SPARE_DISK_BYTES = 2 * 10**9


def layers_for(models: Models, preset: str, bits: int, gguf_bytes: float) -> int:
    """How many layers make llama.cpp's file about so large."""
    one, two = (replace(models, n_layers=n).n_bytes(preset, bits)[0] for n in (1, 2))
    return max(1, round((gguf_bytes - one) / (two - one)) + 1)


def require_room(models: Models, preset: str, bits: int) -> None:
    """End here if the disk cannot hold both models."""
    needed = sum(models.n_bytes(preset, bits)) + SPARE_DISK_BYTES
    free = shutil.disk_usage(models.work).free
    if free < needed:
        raise SystemExit(
            f"{models.work}: {free / 1e9:.1f} GB free, but both models need {needed / 1e9:.1f}. "
            "Give a smaller --gguf-bytes or another --work."
        )


def run(arguments: argparse.Namespace, work: Path, options: TurnOptions) -> None:
    """Write both models, let both decode, print what came out."""
    bits, preset = arguments.bits, PRESETS[arguments.bits]
    models = Models(work=work, shape_name=arguments.shape, peer_python=arguments.peer_python)
    wanted = arguments.gguf_bytes or TIMES_RAM * total_ram_bytes()
    models = replace(models, n_layers=layers_for(models, preset, bits, wanted))
    require_room(models, preset, bits)
    gguf_bytes, folder_bytes = models.n_bytes(preset, bits)
    print(
        f"{models.n_layers} layers of {arguments.shape}: llama.cpp {gguf_bytes / 1e9:.1f} GB, "
        f"lowmoe {folder_bytes / 1e9:.1f} GB; RAM {total_ram_bytes() / 1e9:.1f} GB, of which "
        f"lowmoe takes {arguments.ram or 'what is free'}"
    )
    workload = workload_of(arguments, "decode")
    ours = models.lowmoe(bits, workload, ram=arguments.ram, cold=True)
    peer = models.larger_than_ram(preset, bits, workload)
    turns = run_stage([ours, peer], "duel", arguments.rounds, options)
    ratio = report(turns, ours.name, peer.name, workload)
    print_json(arguments, workload, turns, ratios={f"{ours.name} / {peer.name}": ratio})


def main() -> None:
    """Print the table, the ratio and one JSON object."""
    parser = parser_of(__doc__.splitlines()[0], tokens=8)
    # The kernel's own reclaiming would count as others' work.
    parser.set_defaults(shape="qwen3-235b-a22b", rounds=2, samples=2, max_others_cores=math.inf)
    parser.add_argument("--bits", type=int, choices=PRESETS, default=4)
    parser.add_argument("--gguf-bytes", type=float, help="default: 1.5 times RAM")
    parser.add_argument("--ram", help="lowmoe's budget; default: what is free")
    parser.add_argument("--keep", action="store_true", help="leave the models in --work")
    arguments = parser.parse_args()
    options = turn_options(arguments)
    print(machine_line())
    if arguments.keep:
        run(arguments, arguments.work, options)
        return
    with tempfile.TemporaryDirectory(dir=arguments.work) as work:
        run(arguments, Path(work), options)


if __name__ == "__main__":
    main()
