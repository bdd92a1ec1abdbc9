"""How far do plans come true?   Predicted beside achieved, memory and tokens/s, on this machine.

    python -m benchmarks.plan_accuracy --out FILE [--minutes N] [--prepare]

Every setting is a process of its own: a model of a real shape with fewer layers and random weights
(`lowmoe bench --synthetic`'s), at 1 to 3 planes, with budgets from two experts to all of them, with
1 thread and with all. FILE grows by a setting at a time, and those it has are not run again, so
that a run may be interrupted, or cut short by --minutes. --prepare only writes the models.

FILE holds measurements alone; predictions are made of them by the planner as it is now, two of
tokens/s. "raw" is what a plan of this machine says: its speeds were measured at the beginning, and
random weights route evenly. "predicted" is the same arithmetic with the speeds of RAM and disk
measured right before and right after, in the same process, and with the hit rate that came: a
virtual machine's RAM may change its speed by a factor of two from minute to minute, and what is
held to account is the arithmetic. Stretches around which a speed changed by more than a tenth are
taken again, and counted.

Memory is the peak of resident memory (Linux's VmHWM) beyond what the interpreter had after its
imports, beside what `lowmoe plan` says of such a budget. Models take 17 GB in LOWMOE_HOME.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from benchmarks.plan_observed import (
    Planned,
    Setting,
    folder_of,
    machine_of,
    observe,
    planned,
)
from lowmoe.experts.store import N_READERS
from lowmoe.plan.cost import decode_with_hits
from lowmoe.plan.machine import Processor

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
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """tokens/s: raw is what a plan says, predicted given the speeds and hits that came; ratio,
    memory: achieved over predicted.
    """

    raw: float
    predicted: float
    achieved: float
    ratio: float
    memory: float
    hit_rate: float
    n_changed: int


def compared(result: dict[str, Any]) -> Compared:
    """By the planner as it is now.  Of the stretches around which speeds held still, or where there
    are too few, of all.
    """
    plan = planned(setting_of(result), machine_of(result["memo"]))
    steady = [s for s in result["stretches"] if not s["changed"]]
    used = steady if len(steady) >= FEWEST else result["stretches"]
    raw, predicted = (
        [_tokens_per_s(plan, result, s, as_it_came=as_it_came) for s in used]
        for as_it_came in (False, True)
    )
    achieved = [s["achieved_tokens_per_s"] for s in used]
    return Compared(
        raw=statistics.median(raw),
        predicted=statistics.median(predicted),
        achieved=statistics.median(achieved),
        ratio=statistics.median(a / p for a, p in zip(achieved, predicted, strict=True)),
        memory=result["peak_bytes"] / plan.allotment.ram_bytes,
        hit_rate=statistics.median(s["hit_rate"] for s in used),
        n_changed=len(result["stretches"]) - len(steady),
    )


def _tokens_per_s(
    plan: Planned, result: dict[str, Any], stretch: dict[str, Any], *, as_it_came: bool
) -> float:
    n_slots = plan.allotment.places.in_ram
    machine, hits = plan.machine, n_slots / plan.sizes.n_experts
    if as_it_came:
        hits = stretch["hit_rate"]
        machine = replace(
            machine,
            cpu=Processor(**result["processor"]),
            ram_bytes_per_s=_middle(stretch["ram_bytes_per_s"]),
            disk_bytes_per_s=_middle(stretch["disk_bytes_per_s"]),
        )
    at_once = max(1, min(N_READERS, n_slots - 1))
    cost = decode_with_hits(plan.sizes, machine, 0.0, hits, stretch["n_cached"], at_once=at_once)
    return 1 / cost.total


def _middle(speeds: Sequence[float | None]) -> float:
    """Of two speeds, that of moving half of the bytes at each; any where nothing is moved."""
    known = [speed for speed in speeds if speed is not None]
    return statistics.harmonic_mean(known) if known else 1.0


def setting_of(result: dict[str, Any]) -> Setting:
    """The one that a result is of."""
    return Setting(**{field.name: result[field.name] for field in fields(Setting)})


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
    done = {json.dumps(asdict(setting_of(r))) for r in results}
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
    c = compared(r)
    print(
        f"{what:45} room for {r['ram_share']:4.0%}, hits {c.hit_rate:4.0%}  tokens/s "
        f"{c.raw:6.1f} {c.predicted:6.1f} {c.achieved:6.1f} {c.ratio:5.2f}"
        f"  MiB {r['peak_bytes'] / MIB:6.0f} {c.memory:6.3f}  {c.n_changed} taken again",
        flush=True,
    )


def conclude(results: list[dict[str, Any]]) -> None:
    """All of them."""
    print(f"{len(results)} settings")
    for name, off in offs(results).items():
        print(f"{name}: off by {statistics.median(off):.1%} at the median, {max(off):.1%} at worst")


def offs(results: list[dict[str, Any]]) -> dict[str, list[float]]:
    """How far every prediction is off, as a share."""
    found = [compared(r) for r in results]
    return {
        "tokens/s": [abs(c.ratio - 1) for c in found],
        "tokens/s, raw": [abs(c.achieved / c.raw - 1) for c in found],
        "memory": [abs(c.memory - 1) for c in found],
    }


if __name__ == "__main__":
    main()
