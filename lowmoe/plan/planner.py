"""What to expect of a model on a machine, at every width: the rows that `lowmoe plan` shows.

Knows:        what a user asks of a plan, and how a row is judged.
Ignorant of:  tables, pictures, where a config or a machine came from.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lowmoe.checkpoint.layout import Recipe
from lowmoe.experts.split import Misses
from lowmoe.kernels import cpu
from lowmoe.plan.cost import Cost, MissHandling, Places, decode, prefill
from lowmoe.plan.machine import Machine
from lowmoe.plan.memory import Allotment, Wanted, allot
from lowmoe.plan.sizes import ModelSizes, model_sizes
from lowmoe.plan.skew import expected
from lowmoe.spec import ModelSpec
from quant.layout import MAX_PLANES, SYMBOL_BITS

READING_SPEED = 5.0  # tokens/s, about as fast as people read
UNSURE = 0.15  # of every prediction, what machines and runs differ by
PROMPT_TOKENS = 2048
WELL, SLOW, FROM_DISK, NOT = "runs well", "runs slowly", "runs from disk", "does not fit"


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """context: tokens that are planned for, of each of n_sequences conversations; prompt_tokens: of
    the prompt whose speed is told; misses, miss_planes: see LoadOptions. Speeds are those of one
    answer alone.
    """

    spec: ModelSpec
    context: int
    kv: cpu.KvFormat
    prompt_tokens: int = PROMPT_TOKENS
    n_sequences: int = 1
    misses: Misses = "auto"
    miss_planes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One width.  miss_bits: that experts are read at which are missed, None for all; tokens_per_s:
    [low, high]; limit: what decode waits for most.
    """

    bits: int
    miss_bits: int | None
    sizes: ModelSizes
    allotment: Allotment
    decode_tokens_per_s: tuple[float, float] | None
    prefill_tokens_per_s: tuple[float, float] | None
    limit: str | None
    verdict: str

    @property
    def middle(self) -> float:
        """Tokens a second of decode, the geometric mean of both ends; 0 where it does not run."""
        if self.decode_tokens_per_s is None:
            return 0.0
        low, high = self.decode_tokens_per_s
        return float((low * high) ** 0.5)

    def to_json(self) -> dict[str, Any]:
        """As docs/plan.md says."""
        places = self.allotment.places
        n = self.sizes.n_experts
        return {
            "bits": self.bits,
            "miss_bits": self.miss_bits,
            "decode_tokens_per_s": self.decode_tokens_per_s,
            "prefill_tokens_per_s": self.prefill_tokens_per_s,
            "bytes": {
                "disk": self.sizes.disk_bytes,
                "ram": self.allotment.ram_bytes,
                "vram": self.allotment.vram_bytes,
            },
            "experts": {
                "gpu": places.on_gpu,
                "ram": places.in_ram,
                "disk": n - places.on_gpu - places.in_ram,
            },
            "limit": self.limit,
            "verdict": self.verdict,
            "note": self.allotment.why,
        }


def plan(question: Question, machine: Machine) -> list[Row]:
    """A row for each width, the fewest bits first; with miss_planes, for each that has more."""
    fewest = 1 if question.miss_planes is None else question.miss_planes + 1
    return [_row(question, machine, n_planes) for n_planes in range(fewest, MAX_PLANES + 1)]


def mixed(question: Question, machine: Machine, rows: Sequence[Row]) -> list[Row]:
    """Rows of the same widths at fewer planes for what is missed, where anything is: worse models,
    so that nobody is advised them unasked.
    """
    missing = {row.bits for row in rows if row.verdict != NOT and _misses(row)}
    found = [
        row
        for miss_planes in range(1, MAX_PLANES)
        for row in plan(replace(question, miss_planes=miss_planes), machine)
    ]
    return sorted((row for row in found if row.bits in missing), key=lambda row: row.bits)


def _misses(row: Row) -> bool:
    """Whether experts are elsewhere than where most are computed."""
    places, n = row.allotment.places, row.sizes.n_experts
    return places.on_gpu < n if row.allotment.vram_bytes else places.in_ram < n


def placed(
    question: Question, machine: Machine, n_planes: int
) -> tuple[ModelSizes, Machine, Allotment]:
    """Where a model would lie at one width, and the machine, without its card if that is no use."""
    spec, recipe = question.spec, Recipe(expert_planes=n_planes)
    sizes = model_sizes(spec, recipe, question.kv)
    wanted = Wanted(
        spec=spec,
        sizes=sizes,
        part_bytes=recipe.expert_format(spec).part_bytes[0],
        n_context=question.context,
        kv=question.kv,
        n_sequences=question.n_sequences,
    )
    return sizes, *allot(wanted, machine)


def _row(question: Question, machine: Machine, n_planes: int) -> Row:
    sizes, machine, allotment = placed(question, machine, n_planes)
    bits, miss_planes = SYMBOL_BITS * n_planes, question.miss_planes
    miss_bits = None if miss_planes is None else SYMBOL_BITS * miss_planes
    if not allotment.fits:
        return Row(
            bits=bits, miss_bits=miss_bits, sizes=sizes, allotment=allotment, limit=None,
            verdict=NOT, decode_tokens_per_s=None, prefill_tokens_per_s=None,
        )  # fmt: skip
    decoding, limit = _decoding(question, sizes, machine, allotment.places)
    n_prompt = min(question.prompt_tokens, question.context)
    prompt = prefill(sizes, machine, allotment.places, n_prompt, allotment.chunk)
    return Row(
        bits=bits,
        miss_bits=miss_bits,
        sizes=sizes,
        allotment=allotment,
        decode_tokens_per_s=decoding,
        prefill_tokens_per_s=_range([1 / prompt.total]),
        limit=limit,
        verdict=_verdict(sizes, allotment.places, decoding),
    )


def _decoding(
    question: Question, sizes: ModelSizes, machine: Machine, places: Places
) -> tuple[tuple[float, float], str]:
    """The range of tokens a second, and what limits the slower end."""
    handling = MissHandling(misses=question.misses, n_planes=question.miss_planes)
    n_cached = question.context // 2
    costs = [
        decode(sizes, machine, places, skew, n_cached, handling)
        for skew in expected(sizes.most_experts)
    ]
    slowest: Cost = max(costs, key=lambda cost: cost.total)
    return _range([machine.factor / cost.total for cost in costs]), slowest.limit


def _range(speeds: Sequence[float]) -> tuple[float, float]:
    return min(speeds) * (1 - UNSURE), max(speeds) * (1 + UNSURE)


def _verdict(sizes: ModelSizes, places: Places, decoding: tuple[float, float]) -> str:
    if places.on_gpu + places.in_ram < sizes.n_experts:
        return FROM_DISK
    return WELL if (decoding[0] * decoding[1]) ** 0.5 >= READING_SPEED else SLOW


def speed_words(speeds: tuple[float, ...]) -> str:
    """Two digits each, and never an exponent."""
    return "-".join(f"{s:.0f}" if s >= 10 else f"{s:.2g}" for s in speeds)


def best(rows: Sequence[Row]) -> Row | None:
    """The most bits that reach reading speed; failing that, the fastest; None if nothing fits."""
    fitting = [row for row in rows if row.verdict != NOT]
    quick = [row for row in fitting if row.middle >= READING_SPEED]
    if quick:
        return quick[-1]
    return max(fitting, key=lambda row: row.middle, default=None)
