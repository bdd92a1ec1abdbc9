"""How far do plans come true?   Predicted beside achieved, memory and tokens/s, on this machine.

    python benchmarks/plan_accuracy.py [--out FILE] [--quick]

Every setting is a process of its own: a model of a real shape with fewer layers and random weights
(`lowmoe bench --synthetic`'s), at 1 to 3 planes, with budgets from two experts to all of them, with
1 thread and with all. Random weights route almost evenly, so hits are predicted with the power that
the run's own hit rate shows (docs/plan.md): what is held to account here is bytes and time, not
knowledge of texts.

Memory is the peak of resident memory (Linux's VmHWM) beyond that of the interpreter after its
imports and threads. Writes models to LOWMOE_HOME, up to 30 GB; they stay for the next run.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """shape: an alias, cut to so many layers; ram_share: of experts that have room, 0 for two."""

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
    Setting(shape="mixtral-8x22b", layers=3, planes=2, ram_share=0.0, threads=2, new_tokens=16),
    Setting(shape="olmoe-1b-7b", layers=16, planes=1, ram_share=0.02, threads=2, new_tokens=16),
    Setting(shape="glm-4.5-air", layers=3, planes=2, ram_share=1.0, threads=2),
    Setting(shape="gpt-oss-20b", layers=8, planes=2, ram_share=0.5, threads=2),
]


def peak_bytes() -> int:
    """Resident memory at its highest."""
    for line in Path("/proc/self/status").read_text("utf-8").splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise SystemExit("this benchmark reads /proc/self/status, which only Linux has.")


def observe(setting: Setting) -> dict[str, Any]:
    """Run one setting in this process; what was predicted of it, and what came."""
    import random

    from lowmoe.checkpoint.layout import Recipe
    from lowmoe.engine.generate import Session
    from lowmoe.engine.load import load_folder
    from lowmoe.engine.load_options import LoadOptions
    from lowmoe.engine.options import SamplingOptions
    from lowmoe.experts.store import ExpertStore
    from lowmoe.families import read_config
    from lowmoe.families.aliases import ALIASES
    from lowmoe.loader.synthetic import write_synthetic
    from lowmoe.plan.here import remembered
    from lowmoe.plan.memory import scratch_bytes
    from lowmoe.plan.of_run import predictor
    from lowmoe.plan.sizes import model_sizes
    from lowmoe.plan.skew import Skew
    from lowmoe.settings import read_settings

    settings, context = read_settings(), 1024
    config = {**ALIASES[setting.shape].config, "num_hidden_layers": setting.layers}
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][: setting.layers]
    family, recipe = read_config(config), Recipe(expert_planes=setting.planes)
    folder = (
        settings.home / "models" / f"accuracy-{setting.shape}-{setting.layers}-{setting.planes}"
    )
    write_synthetic(folder, config, family, recipe, name="accuracy", progress=lambda *_: None)
    sizes = model_sizes(family.spec, recipe, "float16")
    beside = sizes.dense_bytes + context * sizes.kv_bytes_per_token
    beside += scratch_bytes(family.spec, 512)
    held = max(2, math.ceil(setting.ram_share * sizes.n_experts))
    ram = beside + held * sizes.expert_bytes + sizes.expert_bytes // 2
    remembered(settings, setting.threads, with_disk=True)
    before = peak_bytes()
    options = LoadOptions(
        gpu="none", bits=2 * setting.planes, ram=ram, threads=setting.threads, context=context
    )
    runtime = load_folder(folder, options)
    assert isinstance(runtime.store, ExpertStore)
    predict = predictor(runtime, options.kv_format, None, settings)
    assert predict is not None
    session, speeds, hits = Session(runtime), [], []
    sampling = SamplingOptions(temperature=1.0, top_p=1.0, max_new_tokens=setting.new_tokens)
    generator = random.Random(0)
    # The first run fills cache and scratch, as a long conversation does, and does not count.
    for n_prompt in (context - setting.new_tokens, 16, 16, 16):
        ids = [generator.randrange(family.spec.n_vocab) for _ in range(n_prompt)]
        list(session.token_ids(ids, sampling, heed_ends=False))
        run = session.statistics()
        speeds.append(run.decode_tokens_per_s)
        hits.append(run.hit_rate.ram)
    peak = peak_bytes() - before
    share = min(1.0, runtime.store.n_slots / sizes.n_experts)
    hit = statistics.median(hits[1:])
    if 0 < hit < 1 and 0 < share < 1:
        predict = replace(predict, skew=Skew(math.log(hit) / math.log(share)))
    runtime.close()
    predicted_bytes = beside + min(held, sizes.n_experts) * sizes.expert_bytes
    return {
        **asdict(setting),
        "predicted_tokens_per_s": predict(16 + setting.new_tokens // 2) / predict.machine.factor,
        "achieved_tokens_per_s": statistics.median(speeds[1:]),
        "hit_rate": hit,
        "predicted_bytes": predicted_bytes,
        "peak_bytes": peak,
        "machine": asdict(predict.machine),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true", help="every third setting")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one is not None:
        print(json.dumps(observe(Setting(**asked.one))))
        return
    results = []
    for setting in SETTINGS[:: 3 if asked.quick else 1]:
        one = json.dumps(asdict(setting))
        done = subprocess.run(
            [sys.executable, __file__, "--one", one],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        )
        if done.returncode:
            raise SystemExit(f"{setting}: {done.stderr.strip().splitlines()[-1]}")
        results.append(json.loads(done.stdout.splitlines()[-1]))
        show(results[-1])
        time.sleep(1)
    speeds = [abs(r["achieved_tokens_per_s"] / r["predicted_tokens_per_s"] - 1) for r in results]
    memory = [abs(r["peak_bytes"] / r["predicted_bytes"] - 1) for r in results]
    print(
        f"{len(results)} settings: tokens/s off by {statistics.median(speeds):.0%} at the median, "
        f"{max(speeds):.0%} at worst; memory by {statistics.median(memory):.1%} and "
        f"{max(memory):.1%}"
    )
    if asked.out is not None:
        asked.out.write_text(json.dumps(results, indent=1) + "\n")


def show(r: dict[str, Any]) -> None:
    what = f"{r['shape']} {r['layers']} layers {2 * r['planes']} bits {r['threads']} threads"
    predicted, achieved = r["predicted_tokens_per_s"], r["achieved_tokens_per_s"]
    print(
        f"{what:45} room for {r['ram_share']:4.0%}  tokens/s {predicted:7.1f} "
        f"{achieved:7.1f} {achieved / predicted:5.2f}"
        f"  MiB {r['predicted_bytes'] / MIB:7.0f} {r['peak_bytes'] / MIB:7.0f} "
        f"{r['peak_bytes'] / r['predicted_bytes']:5.2f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
