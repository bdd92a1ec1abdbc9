"""How fast are the trellis kernels?   G weights/s and G products/s (1e9), GB/s (1e9), medians.

    python benchmarks/kernel_speed.py [--isas avx512 avx2] [--planes 2] [--threads 2] [--n-in 2048]

Counts:      dot_block, one token: weights of a plane a second and the bytes of the planes, cached
             (one thread, planes of 256 KiB) and from memory (planes of 256 MiB together, one thread
             and all). multiply_block, many tokens: weights times tokens a second, one thread.
Ceilings:    from memory, plain reads of as many bytes by as many threads; for products, the same
             instructions on registers alone. Both measured between the samples they stand beside.
Leaves out:  rounding the tokens, everything between kernels, three warm-up samples, plain C++
             (scalar), which nobody runs for its speed.

Needs a C++ compiler, for product_peak.cpp.
"""

import argparse
import ctypes
import itertools
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowmoe.engine.machine import machine_line
from lowmoe.kernels.cpu import _native
from lowmoe.plan.probe import random_plane
from quant.layout import BLOCK_COLUMNS, BLOCK_ROWS, MAX_PLANES, PlaneLayout
from quant.trellis import DEFAULT_CODE

PEAK_SOURCE = Path(__file__).with_name("product_peak.cpp")
PEAK_ROUNDS, PEAK_SUMS = 4000, 12
PRODUCTS = {"avx512": 64, "avxvnni": 32, "avx2": 32}  # of a sum in product_peak.cpp
WARM_UPS, SAMPLES = 3, 15
CACHED_BYTES, MEMORY_BYTES = 256 * 1024, 256 * 1024 * 1024
TOKENS = (4, 8, 9, 16, 32, 128)  # from 9 on with a tile: lowmoe/kernels/cpu/trellis_tile.h
PREFILL_ROWS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """A matrix of random bits and tokens for it, ready to be multiplied by a kernel."""

    layout: PlaneLayout
    planes: list[Tensor]
    codes: np.ndarray
    scales: np.ndarray
    sums: np.ndarray

    @property
    def weights(self) -> int:
        return self.layout.padded_rows * self.layout.padded_columns

    @property
    def plane_bytes(self) -> int:
        return self.layout.plane_bytes * len(self.planes)

    def run(self, kernel: str, isa: str, first_block: int, y: np.ndarray) -> None:
        """Multiply as many rows as y has, from a row block on."""
        getattr(_native, kernel)(
            isa=isa,
            planes=self.planes,
            n_out=self.layout.n_out,
            n_in=self.layout.n_in,
            table=np.array(DEFAULT_CODE.table, np.int8).view(np.uint8) + np.uint8(64),
            scale_unit=DEFAULT_CODE.scale_unit,
            codes=self.codes,
            scales=self.scales,
            sums=self.sums,
            first_block=first_block,
            y=y,
        )


def random_work(n_out: int, n_in: int, n_planes: int, n_tokens: int) -> Work:
    layout = PlaneLayout(n_out, n_in)
    rng = np.random.default_rng(0)
    codes = rng.integers(-127, 128, (n_tokens, layout.padded_columns), np.int8)
    scales = np.full((n_tokens, -(-n_in // 128)), 0.01, np.float32)
    planes = [random_plane(layout) for _ in range(n_planes)]
    sums = codes.reshape(n_tokens, -1, BLOCK_COLUMNS).sum(-1, dtype=np.int32)
    return Work(layout=layout, planes=planes, codes=codes, scales=scales, sums=sums)


class Peak:
    """What one core can do with the instructions of a set, in products a second."""

    def __init__(self, folder: Path) -> None:
        compiler = os.environ.get("CXX") or shutil.which("c++")
        if compiler is None:
            raise SystemExit("no C++ compiler was found. Install one, or set CXX.")
        library = folder / "product_peak.so"
        flags = ["-O3", "-std=c++20", "-shared", "-fPIC"]
        subprocess.run([compiler, *flags, str(PEAK_SOURCE), "-o", str(library)], check=True)
        self._library = ctypes.CDLL(str(library))

    def products_per_s(self, isa: str) -> float:
        seconds = getattr(self._library, f"seconds_{isa}")
        seconds.restype, seconds.argtypes = ctypes.c_double, [ctypes.c_long]
        return PEAK_ROUNDS * PEAK_SUMS * PRODUCTS[isa] / float(seconds(PEAK_ROUNDS))


def sample(
    work: Callable[[], object], per_call: float, ceiling: Callable[[], float]
) -> dict[str, Any]:
    """Rates of `work`, which does `per_call` of something, and of its ceiling, one by one."""
    rates, ceilings = [], []
    for _ in range(WARM_UPS + SAMPLES):
        start = time.perf_counter()
        work()
        rates.append(per_call / (time.perf_counter() - start))
        ceilings.append(ceiling())
    return {"samples": rates[WARM_UPS:], "ceiling_samples": ceilings[WARM_UPS:]}


def median_share(result: dict[str, Any]) -> float:
    pairs = zip(result["samples"], result["ceiling_samples"], strict=True)
    return statistics.median(rate / ceiling for rate, ceiling in pairs)


def dot_cached(isa: str, n_planes: int, n_in: int, peak: Peak) -> dict[str, Any]:
    """Each row block for many tokens, one at a time, so that its bytes come from a cache."""
    n_tokens = 32
    work = random_work(CACHED_BYTES * 4 // n_in, n_in, n_planes, n_tokens)
    y = np.zeros((n_tokens, work.layout.padded_rows), np.float32)
    weights = work.weights * n_planes * n_tokens
    result = sample(
        lambda: work.run("dot_blocks", isa, 0, y), weights, lambda: peak.products_per_s(isa)
    )
    return {"kernel": "dot_block", "from": "cache", "threads": 1, "bits": 2, **result}


def dot_from_memory(work: Work, isa: str, n_threads: int) -> dict[str, Any]:
    pool = _native.Pool(n_threads, [])
    plain = torch.zeros(MEMORY_BYTES, dtype=torch.uint8)
    edges = [work.layout.row_blocks * i // n_threads for i in range(n_threads + 1)]
    outputs = [
        np.zeros((1, (last - first) * BLOCK_ROWS), np.float32)
        for first, last in itertools.pairwise(edges)
    ]

    def multiply(workers: ThreadPoolExecutor) -> None:
        jobs = [
            workers.submit(work.run, "dot_blocks", isa, first, y)
            for first, y in zip(edges[:-1], outputs, strict=True)
        ]
        for job in jobs:
            job.result()

    bits = work.plane_bytes * 8 / (work.weights * len(work.planes))
    with ThreadPoolExecutor(n_threads) as workers:
        result = sample(
            lambda: multiply(workers),
            work.weights * len(work.planes),
            lambda: len(plain) * 8 / bits / pool.read_seconds(plain.data_ptr(), len(plain)),
        )
    return {"kernel": "dot_block", "from": "memory", "threads": n_threads, "bits": bits, **result}


def multiply(isa: str, n_planes: int, n_in: int, n_tokens: int, peak: Peak) -> dict[str, Any]:
    work = random_work(PREFILL_ROWS, n_in, n_planes, n_tokens)
    y = np.zeros((n_tokens, PREFILL_ROWS), np.float32)
    result = sample(
        lambda: work.run("multiply_blocks", isa, 0, y),
        work.weights * n_tokens,
        lambda: peak.products_per_s(isa),
    )
    return {"kernel": "multiply_block", "tokens": n_tokens, "threads": 1, **result}


def show(result: dict[str, Any]) -> None:
    median = statistics.median(result["samples"])
    if result["kernel"] == "dot_block":
        what = f"1 token from {result['from']}, {result['threads']} thread(s)"
        rate = f"{median / 1e9:7.1f} G weights/s {median * result['bits'] / 8e9:6.1f} GB/s"
        of = "plain reads" if result["from"] == "memory" else "products on registers"
    else:
        what = f"{result['tokens']} tokens"
        rate, of = f"{median / 1e9:7.1f} G products/s" + " " * 11, "products on registers"
    print(
        f"{result['isa']:8}{result['planes']} plane(s)  {what:34}{rate}   "
        f"{median_share(result):5.0%} of {of}",
        flush=True,
    )


def main() -> None:
    """Print the rates and one JSON object."""
    measurable = [isa for isa in _native.isas() if isa in PRODUCTS]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--isas", nargs="+", choices=measurable, default=measurable)
    parser.add_argument("--planes", type=int, nargs="+", default=range(1, MAX_PLANES + 1))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--n-in", type=int, default=2048)
    options = parser.parse_args()

    torch.set_num_threads(1)
    print(machine_line())
    results = []

    def note(isa: str, n_planes: int, result: dict[str, Any]) -> None:
        results.append({"isa": isa, "planes": n_planes, **result})
        show(results[-1])

    with tempfile.TemporaryDirectory() as folder:
        peak = Peak(Path(folder))
        for n_planes in options.planes:
            rows = MEMORY_BYTES * 4 // options.n_in // n_planes
            large = random_work(rows, options.n_in, n_planes, 1)
            for isa in options.isas:
                note(isa, n_planes, dot_cached(isa, n_planes, options.n_in, peak))
                for n_threads in sorted({1, options.threads}):
                    note(isa, n_planes, dot_from_memory(large, isa, n_threads))
                for n_tokens in TOKENS:
                    note(isa, n_planes, multiply(isa, n_planes, options.n_in, n_tokens, peak))
    print(json.dumps({"machine": machine_line(), "n_in": options.n_in, "results": results}))


if __name__ == "__main__":
    main()
