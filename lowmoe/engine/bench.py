"""How fast a loaded model is, beside what the machine allows.

Knows:        prefill and decode runs on random tokens, read bandwidths, medians.
Ignorant of:  how results are shown.
"""

import random
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from lowmoe.checkpoint.folder import ModelFolder
from lowmoe.checkpoint.layout import expert_span
from lowmoe.engine.answer import Answer
from lowmoe.engine.batch import Batch
from lowmoe.engine.generate import Session
from lowmoe.engine.options import SamplingOptions
from lowmoe.engine.profile import BenchProfile, Profiler
from lowmoe.engine.run_clock import Tally
from lowmoe.engine.runtime import Runtime
from lowmoe.engine.statistics import RunStatistics
from lowmoe.experts.store import N_READERS
from lowmoe.experts.tier import RamTier

DISK_PROBE_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """runs: counted, after one that is not; prompt_tokens, new_tokens: of each run; profile:
    whether to time the parts of a token.
    """

    runs: int = 3
    prompt_tokens: int = 64
    new_tokens: int = 32
    profile: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchResult:
    """sequences: decoded together; samples: of each of them, run by run; tokens_per_s_in_all: one a
    run, while all were decoded, None for runs too short for that; disk_read_bytes_per_s: over the
    seconds of decoding in which the disk was busy; *_ceiling: measured beside it, the GPU's None
    where there is none; profile: None where it was not asked for.
    """

    sequences: int
    samples: list[RunStatistics]
    tokens_per_s_in_all: list[float | None]
    gpu_ceiling_bytes_per_s: float | None
    ram_ceiling_bytes_per_s: float
    disk_read_bytes_per_s: float | None
    disk_ceiling_bytes_per_s: float | None
    profile: "BenchProfile | None"

    def to_json(self) -> dict[str, Any]:
        """A run's keys as medians, and everything else."""
        plain = [s.to_json() for s in self.samples]
        return {
            **{key: _median([s[key] for s in plain]) for key in plain[0]},
            "sequences": self.sequences,
            "decode_tokens_per_s_in_all": _median(self.tokens_per_s_in_all),
            "gpu_ceiling_bytes_per_s": self.gpu_ceiling_bytes_per_s,
            "ram_ceiling_bytes_per_s": self.ram_ceiling_bytes_per_s,
            "disk_read_bytes_per_s": self.disk_read_bytes_per_s,
            "disk_ceiling_bytes_per_s": self.disk_ceiling_bytes_per_s,
            "profile": None if self.profile is None else asdict(self.profile),
            "samples": plain,
        }


def _median(values: list[Any]) -> Any:
    if isinstance(values[0], dict):
        return {key: _median([v[key] for v in values]) for key in values[0]}
    if isinstance(values[0], tuple):
        return values[0]
    known = [v for v in values if v is not None]
    return statistics.median(known) if known else None


def bench(
    runtime: Runtime, options: BenchOptions, progress: Callable[[int, int], None]
) -> BenchResult:
    """Prefill and decode random tokens, as many prompts together as the model was loaded for, and
    other ones in every run.

    Random tokens route more evenly than text, so that caches of experts look worse than they are.
    """
    generator = random.Random(0)
    session = Session(runtime)
    samples: list[RunStatistics] = []
    in_all: list[float | None] = []
    profiler = Profiler(runtime) if options.profile else None
    disk_bytes, busy_s = 0, 0.0
    for run in range(options.runs + 1):
        answers = [_answer(runtime, options, generator) for _ in range(runtime.n_sequences)]
        together = _decode(session.batch, answers, profiler)
        if run > 0:
            disk_bytes += together.tally.traffic.disk_bytes
            busy_s += together.tally.traffic.disk_busy_s
            in_all.append(together.tokens_per_s)
            samples += [a.clock.statistics(session.bandwidths()) for a in answers]
        progress(run + 1, options.runs + 1)
    return BenchResult(
        sequences=runtime.n_sequences,
        samples=samples,
        tokens_per_s_in_all=in_all,
        gpu_ceiling_bytes_per_s=None if runtime.gpu is None else runtime.gpu.read_bandwidth(),
        ram_ceiling_bytes_per_s=session.ram_bandwidth(),
        disk_read_bytes_per_s=disk_bytes / busy_s if busy_s else None,
        disk_ceiling_bytes_per_s=None if runtime.folder is None else disk_bandwidth(runtime.folder),
        profile=None if profiler is None else profiler.profile(options.prompt_tokens),
    )


def _answer(runtime: Runtime, options: BenchOptions, generator: random.Random) -> Answer:
    """To random tokens; nothing but its length ends it."""
    return Answer(
        runtime,
        [generator.randrange(runtime.spec.n_vocab) for _ in range(options.prompt_tokens)],
        SamplingOptions(temperature=1.0, top_p=1.0, seed=0, max_new_tokens=options.new_tokens),
        end_ids=(),
        spelled=False,
        reuse="none",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Together:
    """The steps in which every answer of a run had a further token."""

    tally: Tally
    seconds: float

    @property
    def tokens_per_s(self) -> float | None:
        return self.tally.tokens / self.seconds if self.seconds else None


def _decode(batch: Batch, answers: Sequence[Answer], profiler: Profiler | None) -> _Together:
    """All answers to their ends."""
    for answer in answers:
        batch.join(answer)
    if profiler is not None:
        profiler.begin()
    begin = end = batch.tally
    seconds = 0.0
    while batch.answers:
        before = time.perf_counter()
        fewest = min(answer.n_new for answer in answers)
        n_made = len(batch.step())
        if n_made == len(answers) and fewest > 0:
            seconds, end = seconds + time.perf_counter() - before, batch.tally
        elif fewest == 0:
            begin = end = batch.tally
        if profiler is not None and n_made:
            profiler.token()
    return _Together(tally=end - begin, seconds=seconds)


def disk_bandwidth(folder: ModelFolder) -> float:
    """Bytes a second of plain reads of a folder's experts, in random order, nothing done to them.

    As many threads as the store has, reads of the same sizes, past the page cache where allowed.
    """
    recipe, spans = folder.recipe, folder.manifest.spans
    names = [n for n in spans if n.split(".")[-1] == recipe.part_names[0] and ".experts." in n]
    keys = [(int(n.split(".")[1]), int(n.split(".")[3])) for n in names]
    sizes = tuple(spans[expert_span(*keys[0], part)].place.n_bytes for part in recipe.part_names)
    tier = RamTier(sizes, N_READERS)
    random.Random(1).shuffle(keys)
    begin = time.perf_counter()

    def read_some(share: list[tuple[int, int]]) -> int:
        slot, total = tier.take_free(), 0
        assert slot is not None
        for key in share:
            total += folder.read_expert(*key, recipe.part_names, slot.buffers, check=False)
            if time.perf_counter() - begin > DISK_PROBE_S:
                break
        return total

    with ThreadPoolExecutor(N_READERS) as readers:
        total = sum(readers.map(read_some, [keys[i::N_READERS] for i in range(N_READERS)]))
    return total / (time.perf_counter() - begin)
