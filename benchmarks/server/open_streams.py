"""Does a server keep a thousand open streams whole while eight generate?   streams, texts, MB.

Counts:      streams over --minutes, as many open at a time as --streams, another begun as one ends.
Whole:       a stream ends with its mark, and its text is that of the same request asked alone: so
             nothing was dropped, doubled or told to another.
Leaves out:  time; the machine is the client's too.

    python -m benchmarks.server.open_streams [--streams 1000] [--minutes 10] [--tokens 100]
"""

import argparse
import asyncio
import json
import time

from benchmarks.server.process import Served, served, text_of
from lowmoe.engine.machine import machine_line

N_SEEDS = 16


def body(seed: int, n_tokens: int) -> dict[str, object]:
    return {
        "model": "demo",
        "prompt": f"Once upon a time, number {seed}",
        "seed": seed,
        "max_tokens": n_tokens,
    }


async def measured(server: Served, asked: argparse.Namespace) -> dict[str, object]:
    alone = [await text_of(server, body(seed, asked.tokens)) for seed in range(N_SEEDS)]
    until = time.monotonic() + 60 * asked.minutes
    whole, faults, most = 0, [], 0.0

    async def go_on(first: int) -> None:
        nonlocal whole
        seed = first % N_SEEDS
        while time.monotonic() < until:
            try:
                assert await text_of(server, body(seed, asked.tokens)) == alone[seed], "other text"
                whole += 1
            except (AssertionError, OSError, RuntimeError) as fault:
                faults.append(f"{type(fault).__name__}: {str(fault)[:200]}")
            seed = (seed + 1) % N_SEEDS

    before = server.own_bytes()
    streams = [asyncio.ensure_future(go_on(i)) for i in range(asked.streams)]
    while not all(stream.done() for stream in streams):
        most = max(most, await asyncio.to_thread(server.metric, "lowmoe_num_requests_waiting"))
        await asyncio.sleep(1)
    return {
        "whole": whole,
        "faults": faults[:5],
        "n_faults": len(faults),
        "most_waiting": most,
        "grown_mb": (server.own_bytes() - before) / 1e6,
        "running_after": server.metric("lowmoe_num_requests_running"),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--tokens", type=int, default=100)
    asked = parser.parse_args()
    print(machine_line())
    with served("demo", "--sequences", "8", "--queue", str(2 * asked.streams)) as server:
        found = asyncio.run(measured(server, asked))
    print(
        f"{found['whole']} streams whole, {found['n_faults']} not; "
        f"up to {found['most_waiting']:.0f} waited; {found['grown_mb']:.1f} MB more in the end"
    )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
