"""How much faster are several conversations decoded together than one?   tokens/s in all, median.

Counts:      one token of each of n conversations through all layers and its scores, experts in RAM.
             Steps of every n in turns, so that what else the machine does meets all of them alike.
Leaves out:  prompts, sampling, text; the first steps of each n.

Beside it, the same of each n's fastest step, and what the bytes would allow if nothing but memory
took time: those of one, n times, over those of n together, counted. Tokens are random, which routes
more evenly than text: more experts for several.

    python benchmarks/decoded_together.py [MODEL] [--bits 4] [--steps 24]
"""

import argparse
import json
import statistics
import time
from typing import Any

import torch

import lowmoe
from lowmoe.engine.load_options import MOST_SEQUENCES
from lowmoe.engine.machine import machine_line
from lowmoe.engine.runtime import Runtime
from lowmoe.families.aliases import DEMO

COUNTS = (1, 2, 3, 4, 6, MOST_SEQUENCES)
WARM_UPS = 3
PROMPT_TOKENS = 32


def measure(runtime: Runtime, n_steps: int) -> list[dict[str, Any]]:
    """Seconds of steps, and bytes of one, by how many are together."""
    decoder, generator = runtime.decoder, torch.Generator().manual_seed(0)

    def random_ids(count: int) -> torch.Tensor:
        return torch.randint(0, runtime.spec.n_vocab, (count,), generator=generator)

    caches = [decoder.new_cache(runtime.n_context) for _ in range(MOST_SEQUENCES)]
    for cache in caches:
        decoder.forward(random_ids(PROMPT_TOKENS), cache)
    seconds: dict[int, list[float]] = {n: [] for n in COUNTS}
    n_bytes: dict[int, list[int]] = {n: [] for n in COUNTS}
    for step in range(WARM_UPS + n_steps):
        for n in COUNTS:
            ids, before = random_ids(n), runtime.store.traffic()
            begin = time.perf_counter()
            decoder.logits(decoder.step(ids, caches[:n]))
            if step >= WARM_UPS:
                seconds[n].append(time.perf_counter() - begin)
                lent = (runtime.store.traffic() - before).ram_bytes
                n_bytes[n].append(lent + runtime.dense_bytes_per_token)
    return [
        {"together": n, "seconds": seconds[n], "bytes": statistics.mean(n_bytes[n])} for n in COUNTS
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=DEMO, help="an alias or a path")
    parser.add_argument("--bits", type=int)
    parser.add_argument("--steps", type=int, default=24)
    options = parser.parse_args()
    context = PROMPT_TOKENS + len(COUNTS) * (WARM_UPS + options.steps)  # of who is always there
    load: dict[str, Any] = {
        "gpu": "none",
        "bits": options.bits or "auto",
        "context": context,
    }
    with lowmoe.load(options.model, sequences=MOST_SEQUENCES, **load) as model:
        print(machine_line())
        rows = measure(model.runtime, options.steps)
        bits = model.runtime.bits
    one = rows[0]
    alone = statistics.median(one["seconds"])
    print(f"{options.model} at {bits} bits, {options.steps} steps of each")
    print("together   tokens/s in all     each   times one   fastest   bytes allow   MB a token")
    for row in rows:
        n, median = row["together"], statistics.median(row["seconds"])
        allowed = n * one["bytes"] / row["bytes"]
        print(
            f"{n:8}{n / median:18.1f}{1 / median:9.1f}{n * alone / median:12.2f}"
            f"{n * min(one['seconds']) / min(row['seconds']):10.2f}"
            f"{allowed:14.2f}{row['bytes'] / n / 1e6:13.1f}"
        )
    print(
        json.dumps({"machine": machine_line(), "model": options.model, "bits": bits, "rows": rows})
    )


if __name__ == "__main__":
    main()
