"""Does the model stop for a client that goes away, whenever it goes?   s until nothing runs.

Counts:      --disconnects connections, closed at a random moment: within the request, in the queue,
             while the prompt is read, within the answer, streamed or not; --together at a time.
             After each group the time until no answer is under way and none waits.
Leaves out:  what the metrics themselves take to be read, some ms.

    python -m benchmarks.server.disconnects [--disconnects 1000] [--together 16]
"""

import argparse
import asyncio
import contextlib
import json
import random
import socket
import struct
import time

from benchmarks.server.process import Served, request, served, text_of
from lowmoe.engine.machine import machine_line

LONGEST_S = 0.4  # in which the demo model writes a good part of its context
AT_ONCE = struct.pack("ii", 1, 0)  # linger: closing resets the connection


async def leave(server: Served, chance: random.Random) -> None:
    body = {
        "model": "demo",
        "prompt": "Once upon a time " * chance.randrange(1, 60),  # up to half of the context
        "max_tokens": 250,
        "stream": chance.random() < 0.7,
    }
    whole = request(body)
    reader, writer = await asyncio.open_connection(*server.address)
    n_bytes = chance.choice([chance.randrange(len(whole)), *3 * [len(whole)]])
    writer.write(whole[:n_bytes])
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(reader.read(1 << 30), chance.random() * LONGEST_S)
    if chance.random() < 0.5:
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, AT_ONCE)
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


def until_idle(server: Served) -> float:
    begun = time.perf_counter()
    names = ("lowmoe_num_requests_running", "lowmoe_num_requests_waiting")
    while any(server.metric(name) for name in names):
        if time.perf_counter() - begun > 30:
            raise RuntimeError("it goes on for nobody")
    return time.perf_counter() - begun


async def measured(server: Served, asked: argparse.Namespace) -> dict[str, object]:
    chance = random.Random(0)
    answer = {"model": "demo", "prompt": "Once upon a time", "seed": 1, "max_tokens": 50}
    before, n_files = await text_of(server, answer), server.n_files()
    seconds = []
    for _ in range(asked.disconnects // asked.together):
        await asyncio.gather(*(leave(server, chance) for _ in range(asked.together)))
        seconds.append(await asyncio.to_thread(until_idle, server))
    assert await text_of(server, answer) == before
    return {
        "disconnects": len(seconds) * asked.together,
        "client_gone": server.metric('lowmoe_requests_unanswered_total{reason="client_gone"}'),
        "median_s": sorted(seconds)[len(seconds) // 2],
        "slowest_s": max(seconds),
        "files_before": n_files,
        "files_after": server.n_files(),
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--disconnects", type=int, default=1000)
    parser.add_argument("--together", type=int, default=16)
    asked = parser.parse_args()
    print(machine_line())
    with served("demo", "--sequences", "8", "--queue", str(asked.together)) as server:
        found = asyncio.run(measured(server, asked))
    print(
        f"{found['disconnects']} disconnects, {found['client_gone']:.0f} of them with a request; "
        f"idle after {found['median_s']:.3f} s, {found['slowest_s']:.3f} s at most; "
        f"{found['files_before']} descriptors before, {found['files_after']} after"
    )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
