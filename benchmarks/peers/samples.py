"""Times prefill or decode of random tokens; both sides are timed by these lines.

Knows:        the clock, which tokens, what the process reads from disk.
Ignorant of:  the engine that computes.  Imports nothing but Python, so that it runs everywhere.
"""

import argparse
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypedDict

SEED = 1


class Sample(TypedDict):
    """disk_bytes_per_token: what the process read from block devices; the page cache is none."""

    tokens_per_s: float
    disk_bytes_per_token: float


def add_sample_arguments(parser: argparse.ArgumentParser) -> None:
    """What take_samples reads from `arguments`."""
    parser.add_argument("--measure", choices=("prefill", "decode"), required=True)
    parser.add_argument("--tokens", type=int, required=True, help="of each sample")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--samples", type=int, default=3)
    parser.add_argument("--warm-ups", type=int, default=1, help="samples before those that count")


def take_samples(
    clear: Callable[[], None],
    forward: Callable[[Sequence[int]], None],
    *,
    n_vocab: int,
    arguments: argparse.Namespace,
) -> list[Sample]:
    """Time `forward`, which computes the logits of the last of its tokens.

    The same seed gives both sides the same tokens; every sample has others.
    """
    generator = random.Random(SEED)
    samples = []
    for _ in range(arguments.warm_ups + arguments.samples):
        ids = [generator.randrange(n_vocab) for _ in range(arguments.tokens + 1)]
        clear()
        steps = [ids[1:]]
        if arguments.measure == "decode":
            forward(ids[:1])
            steps = [[token_id] for token_id in ids[1:]]
        read_before, begin = disk_bytes(), time.perf_counter()
        for step in steps:
            forward(step)
        seconds = time.perf_counter() - begin
        samples.append(
            Sample(
                tokens_per_s=arguments.tokens / seconds,
                disk_bytes_per_token=(disk_bytes() - read_before) / arguments.tokens,
            )
        )
    return samples[arguments.warm_ups :]


def disk_bytes() -> int:
    """Bytes that this process has read from block devices so far (Linux)."""
    lines = Path("/proc/self/io").read_text("ascii").splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("read_bytes")))
