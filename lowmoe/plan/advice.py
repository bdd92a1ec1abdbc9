"""What width a model is to be made at, and whether it can run here at all: asked before its first
byte is read.

Knows:        what loading was asked for, what a user is told.
Ignorant of:  downloads, files.
"""

from dataclasses import dataclass, fields, replace

from lowmoe.cards import CARDS, profile_name
from lowmoe.engine.gpu import AUTO, NONE, find_gpu
from lowmoe.engine.load import DEFAULT_CONTEXT
from lowmoe.engine.load_options import LoadOptions
from lowmoe.engine.memory import parse_budget
from lowmoe.errors import MemoryBudgetError, UsageError
from lowmoe.plan.here import Described, is_here, machine_of
from lowmoe.plan.machine import Machine
from lowmoe.plan.planner import NOT, Question, Row, best, plan, speed_words
from lowmoe.plan.run_line import run_line
from lowmoe.settings import Settings
from lowmoe.spec import ModelSpec

LEAST_CONTEXT = 256  # tokens, of those that are advised


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """bits: to make it at; words: what to expect of that here, in a line."""

    bits: int
    words: str


def advise(name: str, spec: ModelSpec, options: LoadOptions, settings: Settings) -> Advice:
    """The width that was asked for, or the best.

    Raises MemoryBudgetError, with the line that would work, for what cannot run here; UsageError
    for a card that is not here, or no more planes than are read of misses.
    """
    machine, _ = machine_of(_described(options), settings)
    question = Question(
        spec=spec,
        context=options.context or min(DEFAULT_CONTEXT, spec.context_length),
        kv=options.kv_format,
        n_sequences=options.sequences,
        misses=options.misses_kind,
        miss_planes=options.miss_planes,
    )
    rows = plan(question, machine)
    wanted = rows if options.bits == "auto" else [r for r in rows if r.bits == options.bits]
    if not wanted:
        raise UsageError(
            f"miss_planes is {options.miss_planes}, and experts of {options.bits} bits have no "
            "more planes. Give fewer, or more bits."
        )
    row = best(wanted)
    if row is None:
        raise MemoryBudgetError(_Refusal(name, options, question, machine).words(wanted[0], rows))
    assert row.decode_tokens_per_s is not None
    words = (
        f"{name} at {row.bits} bits {row.verdict} here: {speed_words(row.decode_tokens_per_s)} "
        f"tokens/s are expected, limited by {row.limit}"
    )
    return Advice(bits=row.bits, words=words)


def _described(options: LoadOptions) -> Described:
    """This machine, as far as a model may take it.  Raises UsageError for a card that is not here,
    nor a larger one.
    """
    described = Described(
        gpu=options.gpu, ram=options.ram, vram=options.vram, threads=options.threads
    )
    if options.gpu in (AUTO, NONE):
        return described
    find_gpu(options.gpu)
    if is_here(described):
        return described
    # A larger one stands in for it: as fast as that is, with no more memory than the named one has.
    n_bytes = CARDS[profile_name(options.gpu)].memory_bytes
    vram = n_bytes
    if options.vram is not None:
        vram = min(n_bytes, parse_budget(options.vram, name="vram", whole_bytes=n_bytes))
    return replace(described, gpu=AUTO, vram=vram)


@dataclass(frozen=True, slots=True)
class _Refusal:
    """What is said where nothing of what was asked for fits."""

    name: str
    options: LoadOptions
    question: Question
    machine: Machine

    def words(self, least: Row, rows: list[Row]) -> str:
        found = f"{self.name} at {least.bits} bits does not fit: {least.allotment.why}"
        line = self._line(rows)
        if line is None:
            return f"{found}. Nothing would on this machine; lowmoe plan --all shows what does."
        return f"{found}. This would: {line}"

    def _line(self, rows: list[Row]) -> str | None:
        """At another width, or with less context."""
        if (other := best(rows)) is not None:
            return self._run(other, self.options.context)
        context = self.question.context // 2
        while context >= LEAST_CONTEXT:
            row = plan(replace(self.question, context=context), self.machine)[0]
            if row.verdict != NOT:
                return self._run(row, context)
            context //= 2
        return None

    def _run(self, row: Row, context: int | None) -> str:
        options = replace(self.options, context=context)
        values = {field.name: getattr(options, field.name) for field in fields(options)}
        return run_line(self.name, row.bits, values)
