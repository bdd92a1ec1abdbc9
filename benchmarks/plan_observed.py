"""One setting of plan_accuracy.py: what came of a model, in this process.

Knows:        how a run is cut into stretches, what is measured around each, the budget that leaves
              the room asked for.
Ignorant of:  which settings there are, what was predicted.
"""

import random
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.larger_folders import larger
from lowmoe.checkpoint.buffers import page_aligned
from lowmoe.checkpoint.layout import Recipe
from lowmoe.engine.generate import Session
from lowmoe.engine.load import load_folder
from lowmoe.engine.load_options import LoadOptions
from lowmoe.engine.machine import PROBE_BYTES, machine_line, ram_read_bandwidth
from lowmoe.engine.options import SamplingOptions
from lowmoe.engine.runtime import Runtime
from lowmoe.experts.ledger import Traffic
from lowmoe.experts.store import ExpertStore
from lowmoe.families import read_config
from lowmoe.families.aliases import ALIASES
from lowmoe.families.fewer_layers import with_layers
from lowmoe.kernels.cpu import PAGE_TOKENS
from lowmoe.loader.synthetic import write_synthetic
from lowmoe.plan.here import remembered
from lowmoe.plan.machine import Machine, Processor
from lowmoe.plan.memory import Allotment
from lowmoe.plan.planner import Question, placed
from lowmoe.plan.probe import measured_disk, measured_processor
from lowmoe.plan.sizes import ModelSizes
from lowmoe.settings import read_settings
from quant.layout import round_up

PROMPT, STRETCHES = 512, 3
MOST_STRETCHES = 8  # with those that are taken again
CHANGED = 0.10  # of a speed, between before and after
FILL_S = 20.0  # at most, until all that fits has been read
# What is written of each shape: layers, and planes of the widest setting.
WRITTEN = {
    "olmoe-1b-7b": (8, 3),
    "mixtral-8x7b": (2, 3),
    "qwen3-30b-a3b": (6, 3),
    "gpt-oss-20b": (8, 2),
    "glm-4.5-air": (3, 2),
    "mixtral-8x22b": (2, 2),
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """machine: as remembered; cpu measured now; ram_bytes: the budget that leaves the room asked
    for.
    """

    machine: Machine
    question: Question
    sizes: ModelSizes
    allotment: Allotment
    ram_bytes: int


def planned(setting: Setting, machine: Machine) -> Planned:
    """What `lowmoe plan` says of a setting."""
    # Whole pages of the cache, of which all but a few tokens are used.
    context = round_up(PROMPT + setting.new_tokens * (MOST_STRETCHES + 1), PAGE_TOKENS)
    spec = read_config(with_layers(ALIASES[setting.shape].config, setting.layers)).spec
    question = Question(spec=spec, context=context, kv="float16")
    sizes, _, whole = placed(question, replace(machine, ram_bytes=2**50), setting.planes)
    held = max(2, round(setting.ram_share * sizes.n_experts))
    ram = whole.ram_bytes - (sizes.n_experts - held) * sizes.expert_bytes + sizes.expert_bytes // 2
    _, _, allotment = placed(question, replace(machine, ram_bytes=ram), setting.planes)
    return Planned(
        machine=machine, question=question, sizes=sizes, allotment=allotment, ram_bytes=ram
    )


class Speeds:
    """What RAM and disk do at the moment, in bytes a second."""

    def __init__(self, runtime: Runtime, probe: Any, memory: Memory, *, with_disk: bool) -> None:
        self._runtime, self._probe, self._memory = runtime, probe, memory
        self._with_disk = with_disk

    def now(self) -> tuple[float, float | None]:
        """RAM first, while each thread is where it computed.  What probing takes is not the
        model's.
        """
        assert self._runtime.pool is not None
        self._memory.pause()
        ram = ram_read_bandwidth(self._runtime.pool, self._probe)
        disk = measured_disk(read_settings().home) if self._with_disk else None
        self._memory.go_on()
        return ram, disk


def machine_of(memo: dict[str, Any]) -> Machine:
    """The machine as it was remembered.  memo: as asdict gives it."""
    return Machine(
        ram_bytes=0,
        ram_bytes_per_s=memo["ram_bytes_per_s"],
        disk_bytes_per_s=memo["disk_bytes_per_s"] or 1.0,
        cpu=Processor(**memo["cpu"]),
        measured=True,
    )


def observe(setting: Setting) -> dict[str, Any]:
    """Run one setting in this process; what was predicted of it, and what came."""
    settings = read_settings()
    folder = folder_of(setting)
    memo = remembered(settings, setting.threads, with_disk=True)
    cpu = measured_processor(memo.key.split(", ")[-2], setting.threads)
    plan = planned(setting, machine_of(asdict(memo)))
    probe = page_aligned(PROBE_BYTES).fill_(1)
    memory = Memory()
    before = memory.highest()
    options = LoadOptions(
        gpu="none", bits=2 * setting.planes, ram=plan.ram_bytes, threads=setting.threads,
        context=plan.question.context,
    )  # fmt: skip
    runtime = load_folder(folder, options)
    assert isinstance(runtime.store, ExpertStore)
    on_disk = runtime.store.n_slots < plan.sizes.n_experts
    run = _Run(runtime, plan.question.context)
    run.fill(setting.new_tokens, on_disk=on_disk)
    speeds = Speeds(runtime, probe, memory, with_disk=on_disk)
    after, stretches = speeds.now(), list[dict[str, Any]]()
    while sum(not s["changed"] for s in stretches) < STRETCHES and len(stretches) < MOST_STRETCHES:
        first = after
        found = run.stretch(setting.new_tokens, plan.sizes)
        after = speeds.now()
        stretches.append(
            {
                **found,
                "ram_bytes_per_s": [first[0], after[0]],
                "disk_bytes_per_s": [first[1], after[1]],
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
        "peak_bytes": peak,
        "stretches": stretches,
    }


class _Run:
    """One long answer, in stretches."""

    def __init__(self, runtime: Runtime, context: int) -> None:
        generator = random.Random(0)
        sampling = SamplingOptions(
            temperature=1.0, top_k=40, seed=0, max_new_tokens=context - PROMPT
        )
        ids = [generator.randrange(runtime.spec.n_vocab) for _ in range(PROMPT)]
        assert isinstance(runtime.store, ExpertStore)
        self._store = runtime.store
        self._tokens = Session(runtime).token_ids(ids, sampling, heed_ends=False)
        self._n_made = 0

    def _take(self, n: int) -> int:
        """The next n tokens; how many there were."""
        taken = sum(1 for _ in zip(range(n), self._tokens, strict=False))
        self._n_made += taken
        return taken

    def fill(self, n: int, *, on_disk: bool) -> None:
        """What fills RAM does not count; nor what reads on to a complete store."""
        self._take(n)
        until = time.perf_counter() + FILL_S
        while not (on_disk or self._store.is_complete) and time.perf_counter() < until:
            self._store.read_on()

    def stretch(self, n: int, sizes: ModelSizes) -> dict[str, Any]:
        """Of n tokens."""
        before, begin = self._store.traffic(), time.perf_counter()
        taken = self._take(n)
        seconds = time.perf_counter() - begin
        moved = self._store.traffic() - before
        return {
            "achieved_tokens_per_s": taken / seconds,
            "hit_rate": _hits(moved, sizes),
            "read_bytes": moved.disk_bytes,
            "wrong_guesses": moved.guessed - moved.guessed_right,
            "disk_busy_s": moved.disk_busy_s,
            "seconds": seconds,
            "n_cached": PROMPT + self._n_made - taken // 2,
        }


def _hits(moved: Traffic, sizes: ModelSizes) -> float:
    """Share of requests for experts that had not to be read for them, ahead or not."""
    n_reads = moved.disk_bytes / sizes.expert_bytes - (moved.guessed - moved.guessed_right)
    return min(1.0, max(0.0, 1 - n_reads / (moved.ram_requests + moved.disk_requests)))


def _changed(first: tuple[float, float | None], after: tuple[float, float | None]) -> bool:
    pairs = [(a, b) for a, b in zip(first, after, strict=True) if a and b]
    return any(abs(a - b) > CHANGED * max(a, b) for a, b in pairs)
