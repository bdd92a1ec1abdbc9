"""`lowmoe plan`: what to expect of a model, before it is downloaded.

Knows:        the table, the picture's file, the command that would run it.
Ignorant of:  the arithmetic.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lowmoe.cli.render import billions, out, print_json, size
from lowmoe.engine.load import DEFAULT_CONTEXT
from lowmoe.engine.load_options import DEFAULT_KV
from lowmoe.errors import UsageError
from lowmoe.experts.split import Misses
from lowmoe.families import read_config
from lowmoe.families.aliases import ALIASES
from lowmoe.kernels import cpu
from lowmoe.library.configs import spec_of
from lowmoe.plan.here import AUTO, NONE, Described, machine_of, ram_is_here
from lowmoe.plan.machine import Machine
from lowmoe.plan.planner import NOT, Question, Row, best, mixed, plan, speed_words
from lowmoe.plan.run_line import run_line
from lowmoe.settings import read_settings
from lowmoe.spec import ModelSpec
from quant.layout import SYMBOL_BITS

_HEADS = " {:>8} {:>8} {:>8} {:>14} {:>11} {:>9}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """bits: "2", "4", "6" or "auto" for all rows; context: None for the default."""

    machine: Described
    bits: str = AUTO
    context: int | None = None
    kv: str | None = None
    sequences: int = 1
    misses: Misses = "auto"
    plot: Path | None = None
    json: bool = False


def plan_command(model: str, asked: Asked) -> None:
    """One model, a row for each width."""
    settings = read_settings()
    spec = spec_of(model, settings)
    machine, source = machine_of(asked.machine, settings)
    question = _question(spec, asked)
    every = plan(question, machine)
    rows = [row for row in every if asked.bits in (AUTO, str(row.bits))]
    chosen = best(rows)
    rows += [row for row in mixed(question, machine, rows) if asked.bits in (AUTO, str(row.bits))]
    if asked.plot is not None:
        from lowmoe.cli.plan_picture import draw

        draw(asked.plot, model, question, machine)
    if asked.json:
        values = [{**row.to_json(), "command": _command(model, row, asked)} for row in rows]
        print_json(
            {
                "model": model,
                "parameters": spec.n_parameters,
                "active_parameters": spec.n_active_parameters,
                "machine": source,
                "context": question.context,
                "rows": values,
            }
        )
        return
    print_machine(machine, source, question.context)
    licence = f"; {ALIASES[model].licence}" if model in ALIASES else ""
    out.print(
        f"{billions(spec.n_parameters)} parameters, {billions(spec.n_active_parameters)} a token"
        f"{licence}",
        style="dim", markup=False, soft_wrap=True,
    )  # fmt: skip
    _print_table("bits", [(_width(row) + " *" * (row is chosen), row) for row in rows])
    _print_legend(chosen, rows)
    for note in sorted({row.allotment.why for row in rows if row.allotment.why}):
        out.print(note, style="dim", markup=False, soft_wrap=True)
    if chosen is not None:
        out.print(_command(model, chosen, asked), markup=False, soft_wrap=True)


def plan_all_command(asked: Asked) -> None:
    """Every model with an alias and such a context, each at its best width, the fastest first."""
    settings = read_settings()
    machine, source = machine_of(asked.machine, settings)
    found: list[tuple[str, Row]] = []
    specs = {name: read_config(alias.config).spec for name, alias in ALIASES.items()}
    longest = max(spec.context_length for spec in specs.values())
    if asked.context is not None:  # of models that were made for less nothing is asked
        specs = {n: spec for n, spec in specs.items() if asked.context <= spec.context_length}
    if not specs:
        raise UsageError(
            f"--context is {asked.context} tokens, but no model with an alias was made for more "
            f"than {longest}."
        )
    for name, spec in specs.items():
        question = _question(spec, asked)
        rows = [row for row in plan(question, machine) if asked.bits in (AUTO, str(row.bits))]
        found.append((name, best(rows) or rows[0]))
    found.sort(key=lambda pair: -pair[1].middle)
    if asked.json:
        values: list[dict[str, Any]] = [
            {"model": name, **row.to_json(), "command": _command(name, row, asked)}
            for name, row in found
        ]
        print_json({"machine": source, "rows": values})
        return
    print_machine(machine, source, asked.context)
    _print_table("model", [(f"{name} at {row.bits} bits", row) for name, row in found])


def print_machine(machine: Machine, source: str, context: int | None) -> None:
    """What is planned for."""
    card = "no GPU" if machine.card is None else f"{machine.card_name}, {size(machine.vram_bytes)}"
    tokens = "" if context is None else f", a context of {context} tokens"
    out.print(
        f"{card}; {size(machine.ram_bytes)} of RAM for the model{tokens}", markup=False,
        soft_wrap=True,
    )  # fmt: skip
    out.print(source, style="dim", markup=False, soft_wrap=True)


def question_of(spec: ModelSpec, context: int | None, kv: str | None) -> Question:
    """With the defaults of what was not given.  Raises UsageError for too long a context."""
    context = context or min(DEFAULT_CONTEXT, spec.context_length)
    if context > spec.context_length:
        raise UsageError(
            f"--context is {context} tokens, but this model was made for {spec.context_length}."
        )
    kv_format = next((known for known in cpu.KV_FORMATS if known == kv), DEFAULT_KV)
    return Question(spec=spec, context=context, kv=kv_format)


def _question(spec: ModelSpec, asked: Asked) -> Question:
    question = question_of(spec, asked.context, asked.kv)
    return replace(question, n_sequences=asked.sequences, misses=asked.misses)


def _width(row: Row) -> str:
    return f"{row.bits}" if row.miss_bits is None else f"{row.bits}, misses {row.miss_bits}"


def _command(model: str, row: Row, asked: Asked) -> str | None:
    """The line that runs this row; None where nothing does."""
    if row.verdict == NOT:
        return None
    said = asked.machine
    if row.allotment.vram_bytes == 0 and said.gpu != AUTO:  # it would be refused by name
        said = replace(said, gpu=NONE, vram=None)
    options = {
        "gpu": said.gpu,
        "ram": asked.machine.ram if ram_is_here(asked.machine) else None,
        "vram": said.vram,
        "threads": said.threads,
        "context": asked.context,
        "kv": asked.kv,
        "misses": asked.misses,
        "miss_planes": None if row.miss_bits is None else row.miss_bits // SYMBOL_BITS,
    }
    return run_line(model, row.bits, options)


def _print_table(first: str, rows: list[tuple[str, Row]]) -> None:
    """A line a row, in as many columns as they need: a terminal may be narrow, a file is not."""
    width = max(len(first), *(len(name) for name, _ in rows))
    heads = _HEADS.format("disk", "RAM", "VRAM", "GPU/RAM/disk", "prefill", "decode")
    out.print(f"{first:{width}}{heads}  tokens/s", markup=False, soft_wrap=True)
    for name, row in rows:
        out.print(f"{name:{width}}{_cells(row)}", markup=False, soft_wrap=True)


def _print_legend(chosen: Row | None, rows: list[Row]) -> None:
    """What the table's short words stand for, of those that it has."""
    parts = ["GPU/RAM/disk: how many experts begin there"]
    if chosen is not None:
        parts.insert(0, "*: what --bits auto takes")
    narrower = [row for row in rows if row.miss_bits is not None]
    if narrower:
        n_planes = (narrower[0].miss_bits or 0) // SYMBOL_BITS
        where = "on the GPU" if narrower[0].allotment.vram_bytes else "in RAM"
        parts.append(
            f"{_width(narrower[0])}: with --miss-planes {n_planes}, experts that are not {where} "
            "at fewer bits, a worse model"
        )
    out.print("; ".join(parts), style="dim", markup=False, soft_wrap=True)


def _cells(row: Row) -> str:
    places, n = row.allotment.places, row.sizes.n_experts
    on_disk = n - places.on_gpu - places.in_ram
    cells = _HEADS.format(
        size(row.sizes.disk_bytes),
        size(row.allotment.ram_bytes),
        size(row.allotment.vram_bytes) if row.allotment.vram_bytes else "-",
        f"{places.on_gpu}/{places.in_ram}/{on_disk}",
        _span(row.prefill_tokens_per_s),
        _span(row.decode_tokens_per_s),
    )
    return f"{cells}  {row.verdict}" + (f", limited by {row.limit}" if row.limit else "")


def _span(speeds: tuple[float, float] | None) -> str:
    return "-" if speeds is None else speed_words(speeds)
