"""How soon does a model on disk that is larger than RAM say something?   Seconds, tokens.

    python -m benchmarks.cold_start [--layers 24] [--ram 12GB] [--runs 3] [--out FILE]

Counts:      from the start of the process, imports included, to each token of an answer to a prompt
             of 16 tokens. Files are told to leave the page cache before; experts are read past it.
Ceilings:    importing torch alone, and plain reads of experts, before and after each row.
Leaves out:  a tokenizer: the model is made up.

The model has the shape of gpt-oss-120b: 128 experts a layer, 4 bits, 41 GB in 24 layers. Its files
take 4.5 GB, spans repeat (larger_folders.py). Its routers have biases with which some experts are
used more than others, as much as was published of Qwen3-30B and guessed of DeepSeek
(lowmoe/families/routing_fits.py). A row each: 2 bits, which `--bits auto` takes where so much more
than RAM is on disk; 4 bits; 4 bits of which what is missed is used at 2 first (`--miss-planes 1`);
and 2 bits after `lowmoe optimize` told it, by a trace of other tokens, which experts are popular.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.larger_folders import larger
from benchmarks.one_cold_start import MARKS
from lowmoe.checkpoint.layout import Recipe
from lowmoe.checkpoint.manifest import read_manifest
from lowmoe.families import read_config
from lowmoe.families.aliases import ALIASES
from lowmoe.families.fewer_layers import with_layers
from lowmoe.families.routing_fits import FITS
from lowmoe.loader.synthetic import span_maker, write_synthetic
from lowmoe.settings import read_settings

SHAPE, WRITTEN, WRITTEN_LAYERS = "gpt-oss-120b", "gpt-oss-20b", 8  # experts of one size
RECIPE = Recipe()
TRACED = 256
OPTIMIZED = "2 bits, optimized"
# What it is called, --bits, --miss-planes (0: not given).
ROWS = (
    ("2 bits", "auto", 0),
    ("4 bits", "4", 0),
    ("4 bits, misses at 2", "4", 1),
    (OPTIMIZED, "auto", 0),  # last: what it wrote stays
)


def folder_of(n_layers: int, skew: float) -> Path:
    """The model's folder, written now."""
    import numpy as np
    import torch

    models = read_settings().home / "models"
    base, config = models / f"cold-{WRITTEN}", with_layers(ALIASES[WRITTEN].config, WRITTEN_LAYERS)
    family = read_config(config)
    write_synthetic(
        base, config, family, RECIPE, name="accuracy", progress=lambda done, total: None
    )
    config = with_layers(ALIASES[SHAPE].config, n_layers)
    family = read_config(config)
    plain = span_maker(family, RECIPE)

    def make(name: str) -> torch.Tensor:
        if not name.endswith("router_bias"):
            return plain(name)
        random = np.random.default_rng(int(name.split(".")[1]))
        # Weights are normal and so are their inputs: scores deviate by the root of their number.
        spread = skew * family.spec.n_hidden**0.5
        bias = spread * random.standard_normal(plain(name).numel())
        return torch.from_numpy(bias.astype(np.float32))

    folder = models / f"cold-{SHAPE}"
    larger(folder, base, config, make)
    return folder


def optimize_from_a_trace(folder: Path, ram: str) -> None:
    """As a user would, with a trace of random tokens."""
    import random

    from lowmoe.engine.load import load_folder
    from lowmoe.engine.load_options import LoadOptions
    from lowmoe.engine.record import record
    from lowmoe.library.optimize import optimize

    runtime = load_folder(folder, LoadOptions(gpu="none", ram=ram, context=1024))
    generator = random.Random(1)
    ids = [generator.randrange(runtime.spec.n_vocab) for _ in range(TRACED)]
    trace = record(runtime, [ids], lambda done, total: None)
    runtime.close()
    optimize(folder, trace)


def start(folder: Path, ram: str, bits: str, miss_planes: int, seconds: float) -> dict[str, Any]:
    """One cold start, in a process of its own.  miss_planes: 0 for all there are."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)  # what is not yet written cannot leave
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    asked = [str(folder), ram, bits, str(miss_planes), str(seconds), str(time.time())]
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.one_cold_start", *asked],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if run.returncode:
        raise SystemExit(run.stderr.strip().splitlines()[-1])
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


def ceilings(folder: Path) -> dict[str, float]:
    """What nothing that begins here can be faster than."""
    from lowmoe.checkpoint.folder import ModelFolder
    from lowmoe.engine.bench import disk_bandwidth

    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    torch_s = time.perf_counter() - began
    with ModelFolder(folder) as opened:
        return {"torch_s": torch_s, "disk_bytes_per_s": disk_bandwidth(opened)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--ram", default="12GB")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    results: dict[str, Any] = {}
    for name in ("qwen3-30b-a3b", "deepseek-v3"):
        folder = folder_of(asked.layers, FITS[name].skew)
        places = [span.place for span in read_manifest(folder).spans.values()]
        n_bytes = sum(place.n_bytes for place in places)
        print(f"{folder}: {n_bytes / 1e9:.1f} GB, skewed as {name}")
        for how, bits, miss_planes in ROWS:
            if how == OPTIMIZED:
                optimize_from_a_trace(folder, asked.ram)
            before = ceilings(folder)
            runs = [
                start(folder, asked.ram, bits, miss_planes, max(MARKS)) for _ in range(asked.runs)
            ]
            row = {"bytes": n_bytes, "ceilings": [before, ceilings(folder)], "runs": runs}
            results[f"{name} {how}"] = row
            show(how, row)
    if asked.out is not None:
        asked.out.write_text(json.dumps(results, indent=1) + "\n", "utf-8")


def show(how: str, row: dict[str, Any]) -> None:
    """Medians, in a line."""

    def middle(key: str, of: str = "runs") -> float:
        return statistics.median(one[key] for one in row[of])

    counts = ", ".join(
        f"{statistics.median(run['tokens'][str(mark)] for run in row['runs']):.0f} in {mark:.0f} s"
        for mark in MARKS
    )
    print(
        f"{how:22} imported {middle('imported_s'):.2f} s (torch alone "
        f"{middle('torch_s', 'ceilings'):.2f}), loaded {middle('loaded_s'):.2f} s, first token "
        f"{middle('first_token_s'):.2f} s; tokens {counts}; hits {middle('hit_rate'):.0%}; disk "
        f"{middle('disk_bytes_per_s') / 1e9:.1f} GB/s, plain reads "
        f"{middle('disk_bytes_per_s', 'ceilings') / 1e9:.1f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
