"""One cold start, in the process that cold_start.py begins for it; what it saw, as JSON on stdout.

    python -m benchmarks.one_cold_start FOLDER RAM HOW SECONDS BEGAN

HOW: an object of How's fields. BEGAN: when the start of the process was asked for, in seconds of
the epoch; everything is counted from then. As `lowmoe run` does, it has the disk at work before it
imports torch.
"""

import json
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowmoe.library.early_reads import begin_early_reads
from lowmoe.settings import read_settings

MARKS = (3.0, 5.0, 10.0)  # seconds at which tokens are counted
PROMPT = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class How:
    """early: with reads before torch is there."""

    early: bool = True
    bits: int | str = "auto"
    miss_planes: int | None = None


def observe(folder: str, ram: str, how: How, seconds: float, began: float) -> dict[str, Any]:
    """Load and answer for so many seconds."""
    if how.early:
        begin_early_reads(folder, read_settings())
    from lowmoe.engine.generate import Session
    from lowmoe.engine.load import load_folder
    from lowmoe.engine.load_options import LoadOptions
    from lowmoe.engine.options import SamplingOptions

    imported_s = time.time() - began
    runtime = load_folder(
        Path(folder),
        LoadOptions(
            gpu="none",
            bits=how.bits,
            miss_planes=how.miss_planes,
            ram=ram,
            context=1024,
        ),
    )
    loaded_s = time.time() - began
    generator = random.Random(0)
    ids = [generator.randrange(runtime.spec.n_vocab) for _ in range(PROMPT)]
    sampling = SamplingOptions(temperature=1.0, top_p=1.0, seed=0, max_new_tokens=900)
    times: list[float] = []
    for _ in Session(runtime).token_ids(ids, sampling, heed_ends=False):
        times.append(time.time() - began)
        if times[-1] > seconds:
            break
    traffic = runtime.store.traffic()
    runtime.close()
    return {
        "imported_s": imported_s,
        "loaded_s": loaded_s,
        "first_token_s": times[0],
        "bits": runtime.bits,
        "tokens": {str(mark): sum(t <= mark for t in times) for mark in MARKS},
        "hit_rate": traffic.ram_requests / (traffic.ram_requests + traffic.disk_requests),
        "disk_bytes_per_s": traffic.disk_bytes / traffic.disk_busy_s,
    }


if __name__ == "__main__":
    folder, ram, how, seconds, began = sys.argv[1:]
    print(json.dumps(observe(folder, ram, How(**json.loads(how)), float(seconds), float(began))))
