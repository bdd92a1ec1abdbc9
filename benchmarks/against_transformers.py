"""How fast is lowmoe beside transformers with accelerate?   tokens/s of decode, median of runs.

    python benchmarks/against_transformers.py CHECKPOINT [--new-tokens 64] [--runs 5]

Counts:      greedy decoding after the first token, batch of one, both on the CPU with the same
             number of threads, in turn: transformers in bfloat16 and float32, placed by accelerate;
             lowmoe unquantized in float32 and from folders of 2, 4 and 6 bits.
Leaves out:  loading, prefill, one warm-up run each.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
from transformers import AutoTokenizer, MixtralForCausalLM

import lowmoe
from lowmoe.api import Model
from lowmoe.engine.machine import machine_line, physical_cores

PROMPT = "Once upon a time, in a village by the sea, there lived a"


def decode_rate(seconds: Callable[[int], float], n_new: int) -> float:
    """Tokens a second after the first.  seconds: what generating so many tokens takes."""
    return (n_new - 1) / (seconds(n_new) - seconds(1))


def with_transformers(checkpoint: Path, dtype: torch.dtype) -> Callable[[int], float]:
    """Load with accelerate's device_map and return a stopwatch."""
    model = MixtralForCausalLM.from_pretrained(checkpoint, dtype=dtype, device_map="cpu").eval()
    ids = AutoTokenizer.from_pretrained(checkpoint)(PROMPT, return_tensors="pt").input_ids

    def seconds(n_new: int) -> float:
        begin = time.perf_counter()
        model.generate(ids, max_new_tokens=n_new, min_new_tokens=n_new, do_sample=False)
        return time.perf_counter() - begin

    return seconds


def with_lowmoe(model: Model) -> Callable[[int], float]:
    """A stopwatch on greedy decoding, the cache emptied first."""
    ids = model.runtime.text.encode(PROMPT)

    def seconds(n_new: int) -> float:
        begin = time.perf_counter()
        hidden = model.logits(ids)[-1:]
        session = model.session
        for _ in range(n_new - 1):
            (last,) = session.forward([int(hidden.argmax())])
            hidden = model.runtime.decoder.logits(last)
        return time.perf_counter() - begin

    return seconds


def main() -> None:
    """Print the medians and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(physical_cores())
    print(machine_line())
    with ExitStack() as stack, tempfile.TemporaryDirectory() as work:
        lowmoe.quantize(arguments.checkpoint, Path(work) / "folder", bits=6)
        watches = {
            f"transformers {dtype}": with_transformers(arguments.checkpoint, dtype)
            for dtype in (torch.bfloat16, torch.float32)
        }
        watches["lowmoe float32"] = with_lowmoe(
            stack.enter_context(lowmoe.load(arguments.checkpoint, dtype="float32"))
        )
        for bits in (2, 4, 6):
            watches[f"lowmoe {bits} bits"] = with_lowmoe(
                stack.enter_context(lowmoe.load(Path(work) / "folder", gpu="none", bits=bits))
            )
        samples: dict[str, list[float]] = {name: [] for name in watches}
        for run in range(arguments.runs + 1):
            for name, seconds in watches.items():
                rate = decode_rate(seconds, arguments.new_tokens)
                if run:
                    samples[name].append(rate)
    base = statistics.median(samples["transformers torch.bfloat16"])
    for name, rates in samples.items():
        median = statistics.median(rates)
        print(f"{name:28} {median:6.1f} tokens/s, {median / base:.2f} of transformers in bfloat16")
    print(json.dumps({"machine": machine_line(), "samples": samples}))


if __name__ == "__main__":
    main()
