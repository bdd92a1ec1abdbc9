"""How many weights a second does one core encode?   M weights/s (1e6) of a plane, median of 5.

Counts:      encode_planes of a Gaussian matrix for 1, 2 and 3 planes, without and with a covariance
             of its inputs: all searches, scale fits, error feedback, gains, packing, the input
             transform; bitsandbytes' quantize_4bit to nf4 of the same matrix in the same run.
Leaves out:  reading and writing files, one warm-up of each.

The ceiling is what the searches cost at best: 5 passes of 64 windows for each weight (one for the
scales, one forwards, one backwards, two from the likeliest seams), with feedback 4 more (the last
four again), each window two multiply-adds and 3/4 of a minimum, all at the best rate that torch's
multiply-add reaches on cached operands.

    python benchmarks/encoder_speed.py [--rows 512] [--columns 4096] [--chunk-words 1024 4096 ...]
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quant import encode, nf4, viterbi
from quant.damage import relative_squared_error
from quant.layout import MAX_PLANES, PlaneLayout
from quant.matrix import TrellisMatrix, dequantize
from quant.transform import channel_factors, hadamard_size
from quant.trellis import TrellisCode

OPERATIONS_A_PASS = 64 * (2 + 3 / 4)  # of a weight
PASSES, PASSES_WITH_FEEDBACK = 5, 9
CACHED_NUMBERS = (8192, 32768, 131072)  # float32; fewer are all call, more leave the cache


def seconds(work: Callable[[], object], samples: int) -> list[float]:
    """Wall time of each of `samples` calls, after one that is not counted."""
    work()
    taken = []
    for _ in range(samples):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return taken


def machine() -> dict[str, Any]:
    cpu_info = Path("/proc/cpuinfo")
    names = [line for line in cpu_info.read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": names[0].split(":")[1].strip() if names else platform.processor(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),  # others at work here make every figure worse
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def ceiling_rate() -> float:
    """Weights a second of one pass, if nothing but the searches' arithmetic took time."""
    return max(map(multiply_adds_s, CACHED_NUMBERS)) / OPERATIONS_A_PASS


def multiply_adds_s(size: int) -> float:
    a, b, c, out = torch.rand(4, size).unbind()
    calls = 2**24 // size

    def multiply_add() -> None:
        for _ in range(calls):
            torch.addcmul(a, b, c, out=out)

    return size * calls / min(seconds(multiply_add, 9))


def some_covariance(n_in: int) -> Tensor:
    """[blocks, h, h] of neighbours alike; what it says makes no difference to the time."""
    size = hadamard_size(n_in)
    at = torch.arange(size)
    return (0.9 ** (at[:, None] - at).abs()).repeat(n_in // size, 1, 1)


def measure_planes(
    weights: Tensor, n_planes: int, samples: int, *, feedback: bool
) -> dict[str, Any]:
    code, layout = TrellisCode(), PlaneLayout(*weights.shape)
    d = channel_factors(None, torch.ones(layout.n_in), seed=0)
    covariance = some_covariance(layout.n_in) if feedback else None

    def work() -> list[Tensor]:
        return encode.encode_planes(weights, d, layout, code, n_planes, covariance)

    taken = seconds(work, samples)
    decoded = dequantize(TrellisMatrix(layout, code, tuple(work()), d))
    return {
        "format": f"trellis, {n_planes} plane{'s'[: n_planes > 1]}" + ", feedback" * feedback,
        "passes": PASSES_WITH_FEEDBACK if feedback else PASSES,
        "chunk_words": viterbi.CHUNK_WORDS,
        "coded_weights": weights.numel() * n_planes,
        "bits": n_planes * layout.plane_bytes * 8 / weights.numel(),
        "relative_squared_error": relative_squared_error(decoded, weights),
        "seconds": taken,
    }


def measure_nf4(weights: Tensor, samples: int) -> dict[str, Any]:
    layout = nf4.Nf4Layout(*weights.shape)
    decoded = nf4.decode(nf4.encode(weights), layout)
    return {
        "format": "nf4, bitsandbytes",
        "coded_weights": weights.numel(),
        "bits": layout.matrix_bytes * 8 / weights.numel(),
        "relative_squared_error": relative_squared_error(decoded, weights),
        "seconds": seconds(lambda: nf4.encode(weights), samples),
    }


def show(result: dict[str, Any], ceiling: float) -> None:
    rate = result["coded_weights"] / statistics.median(result["seconds"])
    chunk = f", {result['chunk_words']} words at once" if "chunk_words" in result else ""
    of_ceiling = ""
    if chunk:
        of_ceiling = f"   {rate * result['passes'] / ceiling:4.0%} of the ceiling"
    print(
        f"{result['format'] + chunk:46}{rate / 1e6:8.2f} M weights/s of a plane"
        f"{result['bits']:7.3f} bits   error {result['relative_squared_error']:.6f}{of_ceiling}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--chunk-words", type=int, nargs="+", default=[viterbi.CHUNK_WORDS])
    options = parser.parse_args()

    torch.set_num_threads(1)
    about = machine()
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(options.rows, options.columns, generator=generator)
    ceiling = ceiling_rate()
    for name, passes in (("", PASSES), (", feedback", PASSES_WITH_FEEDBACK)):
        heading = f"ceiling, arithmetic of the searches{name}"
        print(f"{heading:46}{ceiling / passes / 1e6:8.2f} M weights/s of a plane")

    results = [measure_nf4(weights, options.samples)]
    show(results[0], ceiling)
    for viterbi.CHUNK_WORDS in options.chunk_words:
        for n_planes, feedback in itertools.product(range(1, MAX_PLANES + 1), (False, True)):
            results.append(measure_planes(weights, n_planes, options.samples, feedback=feedback))
            show(results[-1], ceiling)
    print(
        json.dumps({"machine": about, "ceiling_weights_s_of_a_pass": ceiling, "results": results})
    )


if __name__ == "__main__":
    main()
