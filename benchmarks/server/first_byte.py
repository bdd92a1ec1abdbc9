"""How soon does an idle server begin to answer?   ms to its headers and to the first word, medians.

Counts:      from before the connection is made; --requests streams, one after another, of a short
             prompt that the cache does not have.
Leaves out:  10 requests to warm up.

    python -m benchmarks.server.first_byte [MODEL] [--requests 200]
"""

import argparse
import asyncio
import json
import statistics
import time

from benchmarks.server.process import Served, frames, served
from lowmoe.engine.machine import machine_line

WARM_UP = 10


async def times(server: Served, number: int) -> tuple[float, float]:
    """Nobody else may be asked but the model that is there, so it need not be named."""
    begun, at = time.perf_counter(), []
    body = {"prompt": f"{number} times", "max_tokens": 4}
    async for _ in frames(server, body):
        at.append(1e3 * (time.perf_counter() - begun))
    return at[0], at[1]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--requests", type=int, default=200)
    asked = parser.parse_args()
    print(machine_line())

    async def all_of_them() -> list[tuple[float, float]]:
        return [await times(server, i) for i in range(WARM_UP + asked.requests)][WARM_UP:]

    with served(asked.model, "--sequences", "1") as server:
        found = asyncio.run(all_of_them())
    for name, ms in zip(("headers", "first word"), zip(*found, strict=True), strict=True):
        low, *_, high = statistics.quantiles(ms, n=20)
        print(
            f"{name}: {statistics.median(ms):.1f} ms, 5th to 95th percentile {low:.1f}-{high:.1f}"
        )
    print(json.dumps({"headers_ms": [h for h, _ in found], "first_word_ms": [w for _, w in found]}))


if __name__ == "__main__":
    main()
