"""How far do plans come true?   Predicted beside achieved, memory and tokens/s, on this machine.

    python -m benchmarks.plan_accuracy --out FILE [--minutes N] [--prepare]

Every setting is a process of its own: a model of a real shape with fewer layers and random weights
(`lowmoe bench --synthetic`'s), at 1 to 3 planes, with budgets from two experts to all of them, with
1 thread and with all. FILE grows by a setting at a time, and those it has are not run again, so
that a run may be interrupted, or cut short by --minutes. --prepare only writes the models.

Two predictions of tokens/s are kept. "raw" is what a plan of this machine says: its speeds
were measured some time before, and random weights route evenly. "predicted" is the same arithmetic
with the speeds of RAM and disk measured right before and right after, in the same process, and with
the hit rate that came: a virtual machine's RAM may change its speed by a factor of two from minute
to minute, and what is held to account is the arithmetic. Stretches around which a speed changed by
more than a tenth are taken again, and counted.

Memory is the peak of resident memory (Linux's VmHWM) beyond what the interpreter had after its
imports, beside what `lowmoe plan` says of such a budget. Models take 25 GB in LOWMOE_HOME.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.plan_observed import Setting, folder_of, observe

MIB = 2**20
FEWEST = 3  # stretches around which speeds held still

SETTINGS = [
    *(
        Setting(shape=shape, layers=layers, planes=planes, ram_share=1.0, threads=2)
        for shape, layers in (("olmoe-1b-7b", 16), ("mixtral-8x7b", 2), ("qwen3-30b-a3b", 6))
        for planes in (1, 2, 3)
    ),
    *(
        Setting(shape=shape, layers=layers, planes=2, ram_share=1.0, threads=1)
        for shape, layers in (("olmoe-1b-7b", 16), ("mixtral-8x7b", 2), ("qwen3-30b-a3b", 6))
    ),
    *(
        Setting(shape=shape, layers=layers, planes=planes, ram_share=share, threads=2)
        for shape, layers in (("olmoe-1b-7b", 16), ("qwen3-30b-a3b", 6), ("mixtral-8x22b", 3))
        for planes, share in ((1, 0.5), (2, 0.75), (2, 0.25))
    ),
    Setting(shape="olmoe-1b-7b", layers=16, planes=2, ram_share=0.5, threads=1),
    Setting(shape="olmoe-1b-7b", layers=16, planes=1, ram_share=0.0, threads=2, new_tokens=16),
    Setting(shape="mixtral-8x22b", layers=3, planes=2, ram_share=0.0, threads=2, new_tokens=12),
    Setting(shape="glm-4.5-air", layers=3, planes=2, ram_share=1.0, threads=2),
    Setting(shape="gpt-oss-20b", layers=8, planes=2, ram_share=0.5, threads=2),
    # 29 GB: see larger_folders.py.
    Setting(shape="mixtral-8x22b", layers=22, planes=2, ram_share=0.4, threads=2, new_tokens=8),
    Setting(shape="mixtral-8x22b", layers=22, planes=1, ram_share=0.8, threads=2, new_tokens=12),
]


def medians(result: dict[str, Any]) -> dict[str, float]:
    """Of the stretches around which speeds held still, or where there are too few, of all."""
    stretches = result["stretches"]
    steady = [s for s in stretches if not s["changed"]]
    used = steady if len(steady) >= FEWEST else stretches
    keys = ("achieved_tokens_per_s", "predicted_tokens_per_s", "raw_tokens_per_s", "hit_rate")
    found = {key: statistics.median(s[key] for s in used) for key in keys}
    ratios = [s["achieved_tokens_per_s"] / s["predicted_tokens_per_s"] for s in used]
    return {**found, "ratio": statistics.median(ratios), "n_changed": len(stretches) - len(steady)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no setting after that")
    parser.add_argument("--prepare", action="store_true", help="write the models, run nothing")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one is not None:
        print(json.dumps(observe(Setting(**asked.one))))
        return
    end = time.monotonic() + 60 * asked.minutes
    results = json.loads(asked.out.read_text("utf-8")) if asked.out.is_file() else []
    done = {json.dumps(_setting(r)) for r in results}
    for setting in SETTINGS:
        one = json.dumps(asdict(setting))
        if asked.prepare:
            print(folder_of(setting))
        elif one not in done and time.monotonic() < end:
            results.append(_run(one))
            asked.out.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
            show(results[-1])
    if results and not asked.prepare:
        conclude(results)


def _setting(result: dict[str, Any]) -> dict[str, Any]:
    return {key: result[key] for key in asdict(SETTINGS[0])}


def _run(one: str) -> dict[str, Any]:
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.plan_accuracy", "--out", os.devnull, "--one", one],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if run.returncode:
        raise SystemExit(f"{one}: {run.stderr.strip().splitlines()[-1]}")
    result: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return result


def show(r: dict[str, Any]) -> None:
    """One setting, in a line."""
    what = f"{r['shape']} {r['layers']} layers {2 * r['planes']} bits {r['threads']} threads"
    m = medians(r)
    print(
        f"{what:45} room for {r['ram_share']:4.0%}, hits {m['hit_rate']:4.0%}  tokens/s "
        f"{m['raw_tokens_per_s']:6.1f} {m['predicted_tokens_per_s']:6.1f} "
        f"{m['achieved_tokens_per_s']:6.1f} {m['ratio']:5.2f}"
        f"  MiB {r['predicted_bytes'] / MIB:6.0f} {r['peak_bytes'] / MIB:6.0f} "
        f"{r['peak_bytes'] / r['predicted_bytes']:6.3f}  {m['n_changed']} taken again",
        flush=True,
    )


def conclude(results: list[dict[str, Any]]) -> None:
    """All of them."""
    found = [medians(r) for r in results]
    speeds = [abs(m["ratio"] - 1) for m in found]
    raw = [abs(m["achieved_tokens_per_s"] / m["raw_tokens_per_s"] - 1) for m in found]
    memory = [abs(r["peak_bytes"] / r["predicted_bytes"] - 1) for r in results]
    for name, off in (("tokens/s", speeds), ("tokens/s, raw", raw), ("memory", memory)):
        print(f"{name}: off by {statistics.median(off):.1%} at the median, {max(off):.1%} at worst")


if __name__ == "__main__":
    main()
