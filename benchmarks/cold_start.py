"""How soon does a model on disk that is larger than RAM say something?   Seconds, tokens.

    python -m benchmarks.cold_start [--layers 24] [--ram 12GB] [--runs 3] [--out FILE]

Counts:      from the start of the process, imports included, to each token of an answer to a prompt
             of 16 tokens. Files are told to leave the page cache before; experts are read past it.
Ceilings:    importing torch alone, and plain reads of experts, before and after each row.
Leaves out:  a tokenizer, as the model is made up; the command line. Python's and torch's files stay
             in the page cache. As much memory as a run takes is written to before each run, as a
             virtual machine's host takes its time to hand out what was not used lately.

The model has the shape of gpt-oss-120b: 128 experts a layer, 4 bits, 41 GB in 24 layers. Its files
take 4.5 GB, spans repeat (larger_folders.py). Its routers have biases with which some experts are
used more than others, as much as was published of Qwen3-30B and guessed of DeepSeek
(lowmoe/families/routing_fits.py). A row each: what `--bits auto` takes, 2 bits where so much more
than RAM is on disk; the same without reading dense weights while torch is imported; 4 bits; 4 bits
of which what is missed is used at 2 first (`--miss-planes 1`); and what auto takes after `lowmoe
optimize` told it, by a trace of other tokens, which experts are popular.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.larger_folders import larger
from benchmarks.one_cold_start import MARKS, How
from benchmarks.peers.turns import drop_from_page_cache
from lowmoe.checkpoint.layout import Recipe
from lowmoe.checkpoint.manifest import read_manifest
from lowmoe.engine.machine import machine_line
from lowmoe.engine.memory import parse_budget, total_ram_bytes
from lowmoe.families import read_config
from lowmoe.families.aliases import ALIASES
from lowmoe.families.fewer_layers import with_layers
from lowmoe.families.routing_fits import FITS
from lowmoe.loader.synthetic import span_maker, write_synthetic
from lowmoe.settings import read_settings

SHAPE, WRITTEN, WRITTEN_LAYERS = "gpt-oss-120b", "gpt-oss-20b", 8  # experts of one size
RECIPE = Recipe()
TRACED = 256
OPTIMIZED = "auto, optimized"
ROWS: tuple[tuple[str, How], ...] = (
    ("auto", How()),
    ("auto, no early reads", How(early=False)),
    ("4 bits", How(bits=4)),
    ("4 bits, misses at 2", How(bits=4, miss_planes=1)),
    (OPTIMIZED, How()),  # last: what it wrote stays
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


def start(folder: Path, ram: str, how: How, seconds: float) -> dict[str, Any]:
    """One cold start, in a process of its own."""
    n_bytes = parse_budget(ram, name="ram", whole_bytes=total_ram_bytes())
    n_pages = -(-n_bytes // 4096)
    touch = f"bytearray({n_bytes})[::4096] = bytes({n_pages})"
    subprocess.run([sys.executable, "-c", touch], check=True)
    drop_from_page_cache(list(folder.iterdir()))
    asked = [str(folder), ram, json.dumps(asdict(how)), str(seconds), str(time.time())]
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
    results: dict[str, Any] = {"machine": machine_line(), "ram": asked.ram}
    for name in ("qwen3-30b-a3b", "deepseek-v3"):
        folder = folder_of(asked.layers, FITS[name].skew)
        places = [span.place for span in read_manifest(folder).spans.values()]
        n_bytes = sum(place.n_bytes for place in places)
        print(f"{folder}: {n_bytes / 1e9:.1f} GB, skewed as {name}")
        for title, how in ROWS:
            if title == OPTIMIZED:
                optimize_from_a_trace(folder, asked.ram)
            before = ceilings(folder)
            runs = [start(folder, asked.ram, how, max(MARKS)) for _ in range(asked.runs)]
            row = {"bytes": n_bytes, "ceilings": [before, ceilings(folder)], "runs": runs}
            results[f"{name} {title}"] = row
            show(title, row)
    if asked.out is not None:
        asked.out.write_text(json.dumps(results, indent=1) + "\n", "utf-8")


def show(title: str, row: dict[str, Any]) -> None:
    """Medians, in a line; of the first token the range too."""

    def middle(key: str, of: str = "runs") -> float:
        return statistics.median(one[key] for one in row[of])

    counts = ", ".join(
        f"{statistics.median(run['tokens'][str(mark)] for run in row['runs']):.0f} in {mark:.0f} s"
        for mark in MARKS
    )
    firsts = [run["first_token_s"] for run in row["runs"]]
    print(
        f"{title:20} at {row['runs'][0]['bits']} bits: imported {middle('imported_s'):.2f} s "
        f"(torch alone {middle('torch_s', 'ceilings'):.2f}), loaded {middle('loaded_s'):.2f} s, "
        f"first token {middle('first_token_s'):.2f} s ({min(firsts):.2f} to {max(firsts):.2f}); "
        f"tokens {counts}; hits {middle('hit_rate'):.0%}; "
        f"disk {middle('disk_bytes_per_s') / 1e9:.1f} GB/s, "
        f"plain reads {middle('disk_bytes_per_s', 'ceilings') / 1e9:.1f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
