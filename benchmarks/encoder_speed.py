"""How many weights a second does one core encode?   M weights/s (1e6) of a plane, median of 5.

Counts:      the encoder's whole work on a Gaussian matrix for 1, 2 and 3 planes, without and with a
             covariance of its inputs: input transform, all searches, scale fits, error feedback,
             gains, packing. Native code of every instruction set that runs here, the encoder in
             torch, and bitsandbytes' quantize_4bit to nf4, on the same matrix in the same run.
Leaves out:  reading and writing files, one warm-up of each.

Time is the processor's own, not the wall's: others at work here stretch it less.

The ceiling is what the arithmetic costs at best: 5 passes of 64 windows for each weight (one for
the scales, one forwards, one backwards, two from the likeliest seams), with feedback 4 more (the
last four again), half a Hadamard block of products for what is fed back and a whole one for gains.
A window is at best one instruction for as many words as there are lanes, a dot product of two
int16. One of two bfloat16 goes as fast, and how fast shows in torch's matrix product; where that
has no such instruction, multiply-adds of float32 are the rate.

    python benchmarks/encoder_speed.py [--rows 512] [--columns 4096] [--isa avx2] [--without-torch]
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

from lowmoe.kernels.cpu import isas
from lowmoe.kernels.cpu.encode import NativeEncoder
from quant import nf4
from quant.damage import relative_squared_error
from quant.encode import Encode, encode_planes
from quant.layout import MAX_PLANES, PlaneLayout
from quant.matrix import TrellisMatrix, dequantize
from quant.transform import MAX_HADAMARD, channel_factors, hadamard_size
from quant.trellis import TrellisCode

WINDOWS, PASSES, PASSES_OF_FEEDBACK = 64, 5, 4


def seconds(work: Callable[[], object], samples: int) -> list[float]:
    """Processor time of each of `samples` calls, after one that is not counted."""
    work()
    taken = []
    for _ in range(samples):
        start = time.process_time()
        work()
        taken.append(time.process_time() - start)
    return taken


def machine() -> dict[str, Any]:
    cpu_info = Path("/proc/cpuinfo")
    names = [line for line in cpu_info.read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": names[0].split(":")[1].strip() if names else platform.processor(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),  # others at work here make every figure worse
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def instructions_s() -> float:
    """Multiply-adds of float32, or dot products of two bfloat16, whichever are more."""
    size = 768
    a, b = torch.rand(2, size, size).unbind()
    single = min(seconds(lambda: a @ b, 9))
    a, b = a.bfloat16(), b.bfloat16()
    double = min(seconds(lambda: a @ b, 9))
    return max(size**3 / single, size**3 / 2 / double)


def operations(n_planes: int, *, feedback: bool) -> float:
    """Dot products and multiply-adds for each weight of a plane."""
    searches = WINDOWS * (PASSES + PASSES_OF_FEEDBACK * feedback)
    return searches + feedback * (MAX_HADAMARD / 2 + MAX_HADAMARD / n_planes)


def some_covariance(n_in: int) -> Tensor:
    """[blocks, h, h] of neighbours alike; what it says makes no difference to the time."""
    size = hadamard_size(n_in)
    at = torch.arange(size)
    return (0.9 ** (at[:, None] - at).abs()).repeat(n_in // size, 1, 1)


def measure_planes(
    name: str, encode: Encode, weights: Tensor, n_planes: int, samples: int, *, feedback: bool
) -> dict[str, Any]:
    code, layout = TrellisCode(), PlaneLayout(*weights.shape)
    d = channel_factors(None, torch.ones(layout.n_in), seed=0)
    covariance = some_covariance(layout.n_in) if feedback else None

    def work() -> list[Tensor]:
        return encode(weights, d, layout, code, n_planes, covariance)

    taken = seconds(work, samples)
    decoded = dequantize(TrellisMatrix(layout, code, tuple(work()), d))
    return {
        "format": f"{name}, {n_planes} plane{'s'[: n_planes > 1]}" + ", feedback" * feedback,
        "operations": operations(n_planes, feedback=feedback),
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


def show(result: dict[str, Any], dot_products_s: float) -> None:
    rate = result["coded_weights"] / statistics.median(result["seconds"])
    of_ceiling = ""
    if "operations" in result:
        of_ceiling = f"   {rate * result['operations'] / dot_products_s:4.0%} of the ceiling"
    print(
        f"{result['format']:30}{rate / 1e6:8.2f} M weights/s of a plane{result['bits']:7.3f} bits"
        f"   error {result['relative_squared_error']:.6f}{of_ceiling}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--isa", nargs="+", choices=isas(), default=isas())
    parser.add_argument("--without-torch", action="store_true", help="the torch encoder is slow")
    options = parser.parse_args()

    torch.set_num_threads(1)
    about = machine()
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(options.rows, options.columns, generator=generator)
    rate = instructions_s()
    print(f"{'one core':30}{rate / 1e9:8.2f} G dot products/s")

    results = [measure_nf4(weights, options.samples)]
    show(results[0], rate)
    encoders: dict[str, Encode] = {
        isa: NativeEncoder(isa=isa, threads=1).encode for isa in options.isa
    }
    if not options.without_torch:
        encoders["torch"] = encode_planes
    for name, encode in encoders.items():
        for feedback, n_planes in itertools.product((False, True), range(1, MAX_PLANES + 1)):
            results.append(
                measure_planes(name, encode, weights, n_planes, options.samples, feedback=feedback)
            )
            show(results[-1], rate)
    print(json.dumps({"machine": about, "dot_products_s": rate, "results": results}))


if __name__ == "__main__":
    main()
