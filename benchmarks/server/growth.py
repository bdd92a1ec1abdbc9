"""Does a server grow with what it has answered?   bytes a request, of its own memory.

Counts:      RssAnon and VmSwap of the server every --every requests of --requests, streamed, not
             streamed and refused by turns; the slope of a line through the second half.
Leaves out:  the first half: caches fill, and the allocator takes what it will use again.

    python -m benchmarks.server.growth [--requests 20000] [--together 16]
"""

import argparse
import asyncio
import itertools
import json
import time

import numpy as np

from benchmarks.server.process import Served, frames, request, served
from lowmoe.engine.machine import machine_line


async def ask(server: Served, number: int) -> None:
    body = {"model": "demo", "prompt": f"Once, {number}", "max_tokens": 4}
    if number % 4 == 0:
        async for _ in frames(server, body):
            pass
        return
    if number % 4 == 1:
        body["max_tokens"] = 0  # refused
    reader, writer = await asyncio.open_connection(*server.address)
    writer.write(request(body))
    status = (await reader.read()).split(b" ", 2)[1]
    assert status == (b"400" if number % 4 == 1 else b"200"), status
    writer.close()
    await writer.wait_closed()


async def measured(server: Served, asked: argparse.Namespace) -> list[tuple[int, int]]:
    numbers = itertools.count()
    samples: list[tuple[int, int]] = []

    async def go_on() -> None:
        while (number := next(numbers)) < asked.requests:
            await ask(server, number)
            if number % asked.every == 0:
                samples.append((number, server.own_bytes()))

    await asyncio.gather(*(go_on() for _ in range(asked.together)))
    return sorted(samples)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--together", type=int, default=16)
    parser.add_argument("--every", type=int, default=100)
    asked = parser.parse_args()
    print(machine_line())
    begun = time.perf_counter()
    with served("demo", "--sequences", "8", "--queue", str(asked.together)) as server:
        samples = asyncio.run(measured(server, asked))
    half = np.array(samples[len(samples) // 2 :], dtype=float)
    slope = float(np.polyfit(half[:, 0], half[:, 1], 1)[0])
    print(
        f"{slope:.1f} bytes a request over the last {len(half) * asked.every} of {asked.requests}; "
        f"{samples[0][1] / 1e6:.1f} MB at first, {samples[-1][1] / 1e6:.1f} MB in the end; "
        f"{asked.requests / (time.perf_counter() - begun):.0f} requests/s"
    )
    print(json.dumps({"bytes_per_request": slope, "samples": samples}))


if __name__ == "__main__":
    main()
