"""What does the server cost a stream of tokens?   tokens/s, medians of rounds in turns, and shares.

Ways:        `model.stream` in this process; the worker's events, read on an event loop; the whole
             server over HTTP on loopback, read by another process as curl would.
Counts:      from the first token to the last, of one answer at a time, or of --together at a time;
             beside it the processor time of this process, which a busy machine changes less.
Leaves out:  prompts, two rounds to warm up.

    python benchmarks/server_overhead.py [MODEL] [--tokens 400] [--rounds 15] [--together 1]
"""

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import asdict, dataclass

import uvicorn

import lowmoe
from lowmoe.api import Model
from lowmoe.engine.machine import machine_line
from lowmoe.server.app import ServerOptions, create_app
from lowmoe.server.asking import Ask, Sampling, Text
from lowmoe.server.connection import configured
from lowmoe.server.serving import bound_socket
from lowmoe.server.worker import Worker


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One round of one way."""

    tokens_per_s: float
    cpu_us_per_token: float


PROMPT = "Once upon a time"
WARM_UP = 2

# Reads streams and says how long they took from the first byte of text to the last.
READER = """
import json, sys, threading, time, http.client
port, name, n_tokens, together, prompt = json.loads(sys.argv[1])
def read(found):
    body = {"model": name, "prompt": prompt, "max_tokens": n_tokens, "stream": True,
            "temperature": 0.7}
    c = http.client.HTTPConnection("127.0.0.1", port)
    c.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    r = c.getresponse()
    for line in r:
        if line.startswith(b"data: {"):
            found.append(time.perf_counter())
for line in sys.stdin:
    times = [[] for _ in range(together)]
    threads = [threading.Thread(target=read, args=(t,)) for t in times]
    for t in threads: t.start()
    for t in threads: t.join()
    print(max(t[-1] for t in times) - min(t[0] for t in times), flush=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--together", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    print(machine_line())
    model = lowmoe.load(asked.model, threads=asked.threads, sequences=8)
    # Random weights or not, nothing but its length may end an answer.
    object.__setattr__(model.runtime.text, "end_ids", lambda ids: set())
    samples = _measured(model, asked)
    for way, found in samples.items():
        speed = statistics.median(s.tokens_per_s for s in found)
        cpu = statistics.median(s.cpu_us_per_token for s in found)
        shares = {
            name: statistics.median(
                getattr(a, name) / getattr(b, name) - 1
                for a, b in zip(found, samples["stream"], strict=True)
            )
            for name in ("tokens_per_s", "cpu_us_per_token")
        }
        print(
            f"{way:8} {speed:8.0f} tokens/s {shares['tokens_per_s']:+.1%}  "
            f"{cpu:6.0f} us of processor a token {shares['cpu_us_per_token']:+.1%}"
        )
    print(json.dumps({way: [asdict(s) for s in found] for way, found in samples.items()}))


def _measured(model: Model, asked: argparse.Namespace) -> dict[str, list[Sample]]:
    n_tokens, together = asked.tokens, asked.together
    options = model.options(temperature=0.7, max_new_tokens=n_tokens)

    def stream() -> float:
        first = last = 0.0
        for _ in model.stream_all([PROMPT] * together, [options] * together):
            last = time.perf_counter()
            first = first or last
        return last - first

    samples: dict[str, list[Sample]] = {"stream": [], "worker": [], "server": []}
    with _serving(model, asked) as (worker, loop, reader):
        ask = Ask(prompt=PROMPT, sampling=Sampling(temperature=0.7, max_new_tokens=n_tokens))

        async def one() -> tuple[float, float]:
            times = []
            async with aclosing(worker.ask(ask)) as events:
                async for event in events:
                    if isinstance(event, Text):
                        times.append(time.perf_counter())
            return times[0], times[-1]

        async def several() -> float:
            times = await asyncio.gather(*(one() for _ in range(together)))
            return max(last for _, last in times) - min(first for first, _ in times)

        def by_worker() -> float:
            return asyncio.run_coroutine_threadsafe(several(), loop).result()

        def by_server() -> float:
            assert reader.stdin is not None
            assert reader.stdout is not None
            reader.stdin.write("\n")
            reader.stdin.flush()
            return float(reader.stdout.readline())

        ways: dict[str, Callable[[], float]] = {
            "stream": stream,
            "worker": by_worker,
            "server": by_server,
        }
        for number in range(WARM_UP + asked.rounds):
            for way, measure in ways.items():
                began = time.process_time()
                seconds = measure()
                cpu_s = time.process_time() - began
                if number >= WARM_UP:
                    samples[way].append(
                        Sample(
                            tokens_per_s=(n_tokens - 1) * together / seconds,
                            cpu_us_per_token=1e6 * cpu_s / (n_tokens * together),
                        )
                    )
    return samples


class _serving:
    """The server on a thread of its own, and the process that reads from it."""

    def __init__(self, model: Model, asked: argparse.Namespace) -> None:
        self._model, self._asked = model, asked

    def __enter__(self) -> tuple[Worker, asyncio.AbstractEventLoop, "subprocess.Popen[str]"]:
        bound = bound_socket("127.0.0.1", 0)
        port = bound.getsockname()[1]
        ready: list[tuple[Worker, asyncio.AbstractEventLoop]] = []
        is_ready = threading.Event()

        async def run() -> None:
            worker = Worker(self._model, name="model")
            app = create_app(worker, ServerOptions(port=port), numbers=worker.numbers)
            self._server = uvicorn.Server(configured(app, "127.0.0.1", port))
            ready.append((worker, asyncio.get_running_loop()))
            serving = asyncio.ensure_future(self._server.serve([bound]))
            while not self._server.started:
                await asyncio.sleep(0.01)
            is_ready.set()
            await serving
            await worker.close()

        self._thread = threading.Thread(target=lambda: asyncio.run(run()))
        self._thread.start()
        is_ready.wait()
        told = json.dumps([port, "model", self._asked.tokens, self._asked.together, PROMPT])
        self._reader = subprocess.Popen(
            [sys.executable, "-c", READER, told],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return (*ready[0], self._reader)

    def __exit__(self, *exc: object) -> None:
        assert self._reader.stdin is not None
        self._reader.stdin.close()
        self._reader.wait()
        self._server.should_exit = True
        self._thread.join()


if __name__ == "__main__":
    main()
