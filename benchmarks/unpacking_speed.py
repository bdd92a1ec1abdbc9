"""How fast are weights that come quantized read as numbers?   GB/s of the file (1e9), weights/s.

    python benchmarks/unpacking_speed.py [--runs 9] [--threads 2]

Counts:      reading a matrix of 2048 x 4096 (for MXFP4 one expert of such a size) from the page
             cache and making float32 of it.
Ceiling:     a copy of as many float32 bytes as the numbers take.
Leaves out:  the disk, one warm-up, opening the checkpoint.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lowmoe.checkpoint.packings.packing import Weight
from lowmoe.checkpoint.packings.quantization_config import read_packings
from lowmoe.checkpoint.reader import Checkpoint
from lowmoe.engine.machine import machine_line, physical_cores

N_OUT, N_IN = 2048, 4096
GROUP = 128
Tensors = Mapping[str, torch.Tensor]


def words(*shape: int) -> torch.Tensor:
    """Random 32-bit words."""
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32)


def octets(*shape: int) -> torch.Tensor:
    """Random bytes that are no NaN as 8-bit floats."""
    return torch.randint(0, 127, shape, dtype=torch.uint8)


def fp8() -> tuple[Mapping[str, Any], Tensors]:
    """Blocks of 128 x 128."""
    return {"quant_method": "fp8", "weight_block_size": [128, 128]}, {
        "w.weight": octets(N_OUT, N_IN).view(torch.float8_e4m3fn),
        "w.weight_scale_inv": torch.rand(N_OUT // 128, N_IN // 128),
    }


def mxfp4() -> tuple[Mapping[str, Any], Tensors]:
    """One expert."""
    return {"quant_method": "mxfp4"}, {
        "w.weight_blocks": octets(1, N_OUT, N_IN // 32, 16),
        "w.weight_scales": octets(1, N_OUT, N_IN // 32),
    }


def gptq(*, reordered: bool) -> tuple[Mapping[str, Any], Tensors]:
    """4 bits."""
    groups = torch.arange(N_IN, dtype=torch.int32) // GROUP
    config = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": reordered}
    return config, {
        "w.qweight": words(N_IN // 8, N_OUT),
        "w.qzeros": words(N_IN // GROUP, N_OUT // 8),
        "w.scales": torch.rand(N_IN // GROUP, N_OUT).half(),
        "w.g_idx": groups[torch.randperm(N_IN)] if reordered else groups,
    }


def awq() -> tuple[Mapping[str, Any], Tensors]:
    """4 bits."""
    return {"quant_method": "awq", "bits": 4, "group_size": GROUP}, {
        "w.qweight": words(N_IN, N_OUT // 8),
        "w.qzeros": words(N_IN // GROUP, N_OUT // 8),
        "w.scales": torch.rand(N_IN // GROUP, N_OUT).half(),
    }


def packed_words() -> tuple[Mapping[str, Any], Tensors]:
    """4 bits in groups of 32, as Kimi-K2-Thinking's experts."""
    scheme = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"all": {"weights": scheme}},
    }
    return config, {
        "w.weight_packed": words(N_OUT, N_IN // 8),
        "w.weight_scale": torch.rand(N_OUT, N_IN // 32).bfloat16(),
    }


def nf4() -> tuple[Mapping[str, Any], Tensors]:
    """With a table for scales too."""
    state = {"blocksize": 64, "shape": [N_OUT, N_IN], "nested_blocksize": 256, "nested_offset": 0.1}
    n_blocks = N_OUT * N_IN // 64
    return {"quant_method": "bitsandbytes"}, {
        "w.weight": octets(N_OUT * N_IN // 2, 1),
        "w.weight.absmax": octets(n_blocks),
        "w.weight.quant_map": torch.randn(16),
        "w.weight.nested_absmax": torch.rand(n_blocks // 256),
        "w.weight.nested_quant_map": torch.randn(256),
        "w.weight.quant_state.bitsandbytes__nf4": torch.tensor(
            list(json.dumps(state).encode()), dtype=torch.uint8
        ),
    }


KINDS: Mapping[str, Callable[[], tuple[Mapping[str, Any], Tensors]]] = {
    "fp8": fp8,
    "mxfp4": mxfp4,
    "gptq": lambda: gptq(reordered=False),
    "gptq, reordered": lambda: gptq(reordered=True),
    "awq": awq,
    "compressed-tensors, 4 bits": packed_words,
    "nf4": nf4,
}


def seconds(work: Callable[[], object], runs: int) -> list[float]:
    """Of each run but the first."""
    found = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return found[1:]


def main() -> None:
    """Print a table and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--threads", type=int, default=physical_cores())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    print(f"{machine_line()}; {arguments.threads} threads")
    numbers, samples = torch.rand(N_OUT, N_IN), {}
    copy = statistics.median(seconds(numbers.clone, arguments.runs))
    print(f"{'a copy of float32':28} {N_OUT * N_IN / copy / 1e9:5.2f} G weights/s")
    for kind, make in KINDS.items():
        config, tensors = make()
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps({"quantization_config": config}))
            save_file(dict(tensors), Path(folder) / "model.safetensors")
            checkpoint = Checkpoint(Path(folder))
            shape = (1, N_IN, N_OUT) if kind == "mxfp4" else (N_OUT, N_IN)
            weight = Weight(name="w.weight", shape=shape, files=checkpoint)
            packed = read_packings(checkpoint.config).open(weight)
            assert packed is not None
            samples[kind] = seconds(partial(packed.rows, 0, shape[0]), arguments.runs)
        n_bytes, median = sum(t.nbytes for t in tensors.values()), statistics.median(samples[kind])
        print(
            f"{kind:28} {N_OUT * N_IN / median / 1e9:5.2f} G weights/s, "
            f"{n_bytes / median / 1e9:5.2f} GB/s of the file"
        )
    print(json.dumps({"machine": machine_line(), "copy_s": copy, "seconds": samples}))


if __name__ == "__main__":
    main()
