"""How far do plans come true?   Predicted beside achieved, memory and tokens/s, on this machine.

    python benchmarks/plan_accuracy.py --out FILE [--minutes N] [--prepare]

Every setting is a process of its own: a model of a real shape with fewer layers and random weights
(`lowmoe bench --synthetic`'s), at 1 to 3 planes, with budgets from two experts to all of them, with
1 thread and with all. FILE grows by a setting at a time, and those it has are not run again, so
that a run may be interrupted, or cut short by --minutes. --prepare only writes the models.

Two predictions of tokens/s are kept. "raw" is what a plan of this machine says: its speeds
were measured some time before, and random weights route evenly. "predicted" is the same arithmetic
with the speeds of RAM and disk measured right before and right after, in the same process, and with
the hit rate that came: a virtual machine's RAM may change its speed by a factor of two from minute
to minute, and what is held to account is the arithmetic. Stretches around which a speed changed by
more than CHANGED are taken again, and counted.

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
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.larger_folders import larger
from lowmoe.checkpoint.layout import Recipe
from lowmoe.engine.machine import machine_line
from lowmoe.families import read_config
from lowmoe.families.aliases import ALIASES
from lowmoe.families.fewer_layers import with_layers
from lowmoe.loader.synthetic import write_synthetic
from lowmoe.settings import read_settings

MIB = 2**20
PROMPT, STRETCHES, FEWEST = 512, 3, 3
MOST_STRETCHES = 8  # with those that are taken again
CHANGED = 0.10
# What is written of each shape: layers, and planes of the widest setting.
WRITTEN = {
    "olmoe-1b-7b": (16, 3),
    "mixtral-8x7b": (2, 3),
    "qwen3-30b-a3b": (6, 3),
    "gpt-oss-20b": (8, 2),
    "glm-4.5-air": (3, 2),
    "mixtral-8x22b": (4, 2),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """shape: an alias, cut to so many layers; ram_share: of experts that have room, 0 for two;
    new_tokens: of a stretch.
    """

    shape: str
    layers: int
    planes: int
    ram_share: float
    threads: int
    new_tokens: int = 48


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


def folder_of(setting: Setting) -> Path:
    """The folder of a setting's shape, written now if it is not there."""
    layers, planes = WRITTEN[setting.shape]
    models, config = read_settings().home / "models", ALIASES[setting.shape].config
    base = models / f"accuracy-{setting.shape}-{layers}-{planes}"
    cut = with_layers(config, layers)
    recipe = Recipe(expert_planes=planes)
    write_synthetic(
        base, cut, read_config(cut), recipe, name="accuracy", progress=lambda done, total: None
    )
    if setting.layers == layers:
        return base
    folder = models / f"accuracy-{setting.shape}-{setting.layers}-{planes}"
    larger(folder, base, with_layers(config, setting.layers))
    return folder


class Memory:
    """Resident memory at its highest, but for what happens between `pause` and `go_on`."""

    def __init__(self) -> None:
        self._highest = 0
        self.go_on()

    def pause(self) -> None:
        self._highest = max(self._highest, _status("VmHWM"))

    def go_on(self) -> None:
        Path("/proc/self/clear_refs").write_text("5", "ascii")  # the highest is the present one

    def highest(self) -> int:
        self.pause()
        return self._highest


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text("utf-8").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise SystemExit("this benchmark reads /proc/self/status, which only Linux has.")


def observe(setting: Setting) -> dict[str, Any]:
    """Run one setting in this process; what was predicted of it, and what came."""
    import random

    from lowmoe.checkpoint.buffers import page_aligned
    from lowmoe.engine.generate import Session
    from lowmoe.engine.load import load_folder
    from lowmoe.engine.load_options import LoadOptions
    from lowmoe.engine.machine import PROBE_BYTES, ram_read_bandwidth
    from lowmoe.engine.options import SamplingOptions
    from lowmoe.experts.store import ExpertStore
    from lowmoe.plan.cost import decode_with_hits
    from lowmoe.plan.here import remembered
    from lowmoe.plan.machine import Machine
    from lowmoe.plan.planner import Question, placed
    from lowmoe.plan.probe import measured_disk, measured_processor

    settings = read_settings()
    folder = folder_of(setting)
    context = PROMPT + setting.new_tokens * (MOST_STRETCHES + 1) + 8
    memo = remembered(settings, setting.threads, with_disk=True)
    cpu = measured_processor(memo.key.split(", ")[-2], setting.threads)
    planned = Machine(
        ram_bytes=2**50, ram_bytes_per_s=memo.ram_bytes_per_s, cpu=memo.cpu,
        disk_bytes_per_s=memo.disk_bytes_per_s or 0.0, measured=True,
    )  # fmt: skip
    spec = read_config(with_layers(ALIASES[setting.shape].config, setting.layers)).spec
    question = Question(spec=spec, context=context, kv="float16")
    sizes, _, whole = placed(question, planned, setting.planes)
    held = max(2, round(setting.ram_share * sizes.n_experts))
    ram = whole.ram_bytes - (sizes.n_experts - held) * sizes.expert_bytes + sizes.expert_bytes // 2
    _, _, allotment = placed(question, replace(planned, ram_bytes=ram), setting.planes)

    probe = page_aligned(PROBE_BYTES).fill_(1)
    memory = Memory()
    before = memory.highest()
    options = LoadOptions(
        gpu="none", bits=2 * setting.planes, ram=ram, threads=setting.threads, context=context
    )
    runtime = load_folder(folder, options)
    store, pool = runtime.store, runtime.pool
    assert isinstance(store, ExpertStore)
    assert pool is not None
    on_disk = store.n_slots < sizes.n_experts

    def speeds() -> tuple[float, float | None]:
        memory.pause()
        disk = measured_disk(settings.home) if on_disk else None
        memory.go_on()
        return ram_read_bandwidth(pool, probe), disk

    generator = random.Random(0)
    sampling = SamplingOptions(temperature=1.0, top_p=1.0, seed=0, max_new_tokens=context - PROMPT)
    ids = [generator.randrange(spec.n_vocab) for _ in range(PROMPT)]
    tokens = Session(runtime).token_ids(ids, sampling, heed_ends=False)
    # What fills the cache of experts, and reads on to a complete one, does not count.
    n_made = take(tokens, setting.new_tokens)
    until = time.perf_counter() + 20
    while not (on_disk or store.is_complete) and time.perf_counter() < until:
        n_made += take(tokens, 1)
    stretches: list[dict[str, Any]] = []
    after = speeds()
    while len([s for s in stretches if not s["changed"]]) < STRETCHES:
        if len(stretches) == MOST_STRETCHES or n_made + setting.new_tokens > context - PROMPT:
            break
        first, traffic, begin = after, store.traffic(), time.perf_counter()
        n = take(tokens, setting.new_tokens)
        seconds = time.perf_counter() - begin
        moved, after = store.traffic() - traffic, speeds()
        hits = moved.ram_requests / (moved.ram_requests + moved.disk_requests)
        n_cached = PROMPT + n_made + n // 2
        n_made += n
        around = replace(
            planned, cpu=cpu, ram_bytes_per_s=_middle(first[0], after[0]),
            disk_bytes_per_s=_middle(first[1], after[1]),
        )  # fmt: skip
        cost = decode_with_hits(sizes, around, 0.0, hits, n_cached)
        share = allotment.places.in_ram / sizes.n_experts
        raw = decode_with_hits(sizes, planned, 0.0, share, n_cached)
        stretches.append(
            {
                "achieved_tokens_per_s": n / seconds,
                "predicted_tokens_per_s": 1 / cost.total,
                "raw_tokens_per_s": 1 / raw.total,
                "hit_rate": hits,
                "read_bytes": moved.disk_bytes,
                "missed_bytes": moved.disk_requests * sizes.expert_bytes,
                "disk_busy_s": moved.disk_busy_s,
                "seconds": seconds,
                "n_cached": n_cached,
                "ram_bytes_per_s": [first[0], after[0]],
                "disk_bytes_per_s": [first[1], after[1]],
                "cost": asdict(cost),
                "changed": _changed(first, after),
            }
        )
    peak = memory.highest() - before
    runtime.close()
    return {
        **asdict(setting),
        "machine": machine_line(),
        "memo": asdict(memo),
        "processor": asdict(cpu),
        "predicted_bytes": allotment.ram_bytes,
        "peak_bytes": peak,
        "stretches": stretches,
    }


def take(tokens: Iterator[int], n: int) -> int:
    """The next n of them; how many there were."""
    return sum(1 for _ in zip(range(n), tokens, strict=False))


def _middle(first: float | None, after: float | None) -> float:
    """Of two speeds, that of moving half of the bytes at each."""
    return 1.0 if first is None or after is None else 2 / (1 / first + 1 / after)


def _changed(first: tuple[float, float | None], after: tuple[float, float | None]) -> bool:
    pairs = [(a, b) for a, b in zip(first, after, strict=True) if a and b]
    return any(abs(a - b) > CHANGED * max(a, b) for a, b in pairs)


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
        [sys.executable, __file__, "--out", os.devnull, "--one", one],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
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
