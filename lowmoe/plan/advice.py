"""What width a model is to be made at, and whether it can run here at all: asked before its first
byte is read.

Knows:        what loading was asked for, what a user is told.
Ignorant of:  downloads, files.
"""

from dataclasses import dataclass, replace

from lowmoe.engine.gpu import AUTO, NONE, find_gpu
from lowmoe.engine.load import DEFAULT_CONTEXT
from lowmoe.engine.load_options import LoadOptions
from lowmoe.engine.memory import available_ram_bytes
from lowmoe.errors import MemoryBudgetError
from lowmoe.plan.here import Described, is_here, machine_of
from lowmoe.plan.machine import Machine
from lowmoe.plan.planner import NOT, Question, Row, best, plan, speed_words
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
    for a card that is not here.
    """
    described = Described(
        gpu=options.gpu, ram=options.ram, vram=options.vram, threads=options.threads
    )
    if options.gpu not in (AUTO, NONE):
        find_gpu(options.gpu)
        if options.ram is None and not is_here(described):  # a larger one stands in for it
            described = replace(described, ram=available_ram_bytes())
    machine, _ = machine_of(described, settings)
    context = options.context or min(DEFAULT_CONTEXT, spec.context_length)
    question = Question(spec=spec, context=context, kv=options.kv_format)
    rows = plan(question, machine)
    wanted = rows if options.bits == "auto" else [r for r in rows if r.bits == options.bits]
    row = best(wanted)
    if row is None:
        raise MemoryBudgetError(_refusal(name, wanted[0], rows, question, machine))
    assert row.decode_tokens_per_s is not None
    words = (
        f"{name} at {row.bits} bits {row.verdict} here: {speed_words(row.decode_tokens_per_s)} "
        f"tokens/s are expected, limited by {row.limit}"
    )
    return Advice(bits=row.bits, words=words)


def _refusal(name: str, least: Row, rows: list[Row], question: Question, machine: Machine) -> str:
    found = f"{name} at {least.bits} bits does not fit: {least.allotment.why}"
    other = best(rows)
    if other is not None:
        return f"{found}. This would: lowmoe run {name} --bits {other.bits}"
    context = question.context // 2
    while context >= LEAST_CONTEXT:
        row = plan(replace(question, context=context), machine)[0]
        if row.verdict != NOT:
            return f"{found}. This would: lowmoe run {name} --bits {row.bits} --context {context}"
        context //= 2
    return f"{found}. Nothing would on this machine; lowmoe plan --all shows what does."
