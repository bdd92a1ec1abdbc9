"""How long does a token take when all of a model is on the card?   us a layer, tokens/s.

Counts:      the captured step of one token through all layers, replayed; kernels by torch's
             profiler, the gaps between them being what is left; tokens/s of whole answers,
             embedding, head and sampling included.
Leaves out:  loading, the first tokens.

Models of random weights with a few layers of a published shape are written to --work and deleted.

    python -m benchmarks.gpu.decode_step OUT.json [--shape mixtral-8x7b] [--layers 4] [--bits 4 2]
"""

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import lowmoe
from benchmarks.gpu.timing import median, seconds
from benchmarks.peers.lowmoe_folder import synthetic_folder
from benchmarks.peers.shapes import SHAPES
from lowmoe.decoder.on_gpu import GpuComputation
from lowmoe.engine.options import SamplingOptions

N_PROMPT = 512
N_NEW = 64
N_PROFILED = 10
MOST_GAP = 15e-6  # seconds a layer, the target


def kernel_seconds(run: Any) -> dict[str, float]:
    """Seconds of each kernel in one run, by its name."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(N_PROFILED):
            run()
        torch.cuda.synchronize()
    events = profiler.key_averages()
    return {e.key: e.self_device_time_total / 1e6 / N_PROFILED for e in events}


def measure(folder: Path, bits: int, n_layers: int) -> dict[str, Any]:
    """One model at one width."""
    with lowmoe.load(folder, gpu="4090", bits=bits, context=2 * N_PROMPT) as model:
        session, computation = model.session, model.runtime.decoder.computation
        assert session is not None
        assert isinstance(computation, GpuComputation)
        options = SamplingOptions(temperature=0.0, max_new_tokens=N_NEW)
        prompt = [i % model.runtime.spec.n_vocab for i in range(N_PROMPT)]
        for _ in range(2):  # the first one warms up
            session.rewind([])
            for _ in session.token_ids(prompt, options, heed_ends=False):
                pass
        statistics = session.statistics()
        cache = computation.new_cache(2 * N_PROMPT)
        for chunk in torch.tensor(prompt).split(computation.max_tokens):
            model.runtime.decoder.forward(chunk, cache)
        # A token of its own: the step is replayed at the position where this one was.
        model.runtime.decoder.forward(torch.tensor([0]), cache)
        step = median(seconds(cache.step))
        kernels = kernel_seconds(cache.step)
    gap = (step - sum(kernels.values())) / n_layers
    return {
        "bits": bits, "layers": n_layers, "step_seconds": step, "kernel_seconds": kernels,
        "gap_seconds_per_layer": gap, "tokens_per_s": statistics.decode_tokens_per_s,
        "prefill_tokens_per_s": statistics.prefill_tokens_per_s,
        "bytes_per_token": statistics.bytes_per_token.gpu,
        "bound_tokens_per_s": statistics.bound_tokens_per_s,
    }  # fmt: skip


def main() -> None:
    """Print each width, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="mixtral-8x7b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--bits", type=int, nargs="+", choices=(2, 4, 6), default=[4, 2])
    parser.add_argument("--work", type=Path, help="a folder for models; default: a temporary one")
    arguments = parser.parse_args()
    shape = replace(SHAPES[arguments.shape], n_layers=arguments.layers)
    found = []
    with tempfile.TemporaryDirectory(dir=arguments.work) as work:
        folder = synthetic_folder(Path(work), arguments.shape, shape, max(arguments.bits))
        for bits in arguments.bits:
            row = measure(folder, bits, arguments.layers)
            found.append(row)
            print(
                f"{bits} bits, {arguments.layers} layers: {1e6 * row['step_seconds']:.0f} us a "
                f"step, {1e6 * row['gap_seconds_per_layer']:.1f} us a layer between kernels "
                f"(target {1e6 * MOST_GAP:.0f}), {row['tokens_per_s']:.1f} tokens/s of "
                f"{row['bound_tokens_per_s']:.1f}, prefill {row['prefill_tokens_per_s']:.0f}"
            )
            for name, time in sorted(row["kernel_seconds"].items(), key=lambda item: -item[1]):
                print(f"  {name[:60]:60} {1e6 * time / arguments.layers:8.2f} us a layer")
    result = {"card": torch.cuda.get_device_name(), "shape": arguments.shape, "rows": found}
    arguments.out.write_text(json.dumps(result), "utf-8")


if __name__ == "__main__":
    main()
