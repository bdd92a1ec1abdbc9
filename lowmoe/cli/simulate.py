"""`lowmoe trace` and `lowmoe simulate`.

Knows:        what is recorded of what, what is compared with what.
Ignorant of:  tiers, policies, routing.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lowmoe.cli.evaluate import read_text
from lowmoe.cli.plan import print_machine, question_of
from lowmoe.cli.render import TerminalReporter, out, print_json
from lowmoe.cli.run import load_model, require_place
from lowmoe.engine.load_options import LoadOptions
from lowmoe.engine.record import record
from lowmoe.errors import MemoryBudgetError, PromptError, UsageError
from lowmoe.experts.trace import RoutingTrace, read_trace, write_trace
from lowmoe.families import read_config
from lowmoe.families.routing_fits import FITS
from lowmoe.library.names import demo_folder, locate, made_folder
from lowmoe.library.optimize import optimize
from lowmoe.plan.cost import decode_with_hits
from lowmoe.plan.here import Described, machine_of
from lowmoe.plan.planner import placed, speed_words
from lowmoe.plan.policies import NAMES, counted, halves, policy_of
from lowmoe.plan.simulate import Replayed, replay
from lowmoe.plan.synthetic_trace import synthetic_trace
from lowmoe.settings import read_settings
from quant.layout import MAX_PLANES, SYMBOL_BITS

PICTURE_POINTS = 8
ALL, CEILING = "all", "belady"


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """policy: one of NAMES or "all"; plot: None for no picture."""

    machine: Described
    policy: str
    bits: int
    context: int | None
    kv: str | None
    plot: Path | None
    json: bool


def trace_command(
    model: str,
    file: Path | None,
    path: Path,
    n_tokens: int,
    options: LoadOptions,
    *,
    synthetic: bool,
) -> None:
    """Write a trace of a text, or a drawn one."""
    if n_tokens < 2:
        raise UsageError(f"--tokens is {n_tokens}, but a trace has at least 2.")
    require_place(path, "out")
    if synthetic == (file is not None):
        raise UsageError("trace takes a text file, or --synthetic without one. Give one of them.")
    if file is None:
        if model not in FITS:
            raise UsageError(f"{model!r} has no fit. Those that do: {', '.join(FITS)}.")
        write_trace(path, synthetic_trace(model, n_tokens))
        return
    text = read_text(file)
    with load_model(model, options) as loaded, TerminalReporter() as report:
        ids = loaded.runtime.text.encode(text)[:n_tokens]
        if len(ids) < 2:
            raise PromptError(f"{file} has {len(ids)} tokens, but a trace has at least 2.")
        trace = record(
            loaded.runtime, [ids], lambda done, total: report.step("trace", done, total, "tokens")
        )
    write_trace(path, trace)


def optimize_command(model: str, path: Path) -> None:
    """Write what a trace says of experts into their folder."""
    settings = read_settings()
    folder = made_folder(locate(model, settings), settings)
    if folder is None:
        raise UsageError(
            f"{model}: has no model folder here yet. Make one first: lowmoe pull, or quantize."
        )
    if folder == demo_folder():
        raise UsageError(
            f"{model} comes with lowmoe, and has counts of its own. Make it again from a "
            "checkpoint to have other ones."
        )
    n_tokens = optimize(folder, read_trace(path))
    out.print(
        f"{folder}: begins with the experts that {n_tokens} tokens used most",
        markup=False,
        soft_wrap=True,
    )


def simulate_command(path: Path, asked: Asked) -> None:
    """Hit rates and tokens/s, a line for each policy."""
    if asked.policy not in (ALL, *NAMES):
        raise UsageError(f"--policy is {asked.policy!r}, but must be all, {', '.join(NAMES)}.")
    if asked.bits not in [SYMBOL_BITS * n for n in range(1, MAX_PLANES + 1)]:
        raise UsageError(f"--bits is {asked.bits}, but must be 2, 4 or 6.")
    trace = read_trace(path)
    if trace.n_tokens < 2:
        raise UsageError(f"{path} has {trace.n_tokens} token, but is replayed after a first half.")
    spec = read_config(trace.config).spec
    machine, source = machine_of(asked.machine, read_settings())
    question = question_of(spec, asked.context, asked.kv)
    sizes, machine, allotment = placed(question, machine, asked.bits // SYMBOL_BITS)
    if not allotment.fits:
        raise MemoryBudgetError(f"{trace.model} at {asked.bits} bits: {allotment.why}.")
    places = allotment.places
    names = NAMES if asked.policy == ALL else (asked.policy,)
    results, n_cached = {}, question.context // 2
    for name in names:
        found = _replayed(trace, name, places.on_gpu, places.in_ram)
        cost = decode_with_hits(sizes, machine, found.gpu, found.gpu + found.ram, n_cached)
        results[name] = {
            "gpu": found.gpu,
            "ram": found.ram,
            "disk": max(0.0, 1 - found.gpu - found.ram),
            "promoted_per_token": found.promoted,
            "tokens_per_s": machine.factor / cost.total,
            "limit": cost.limit,
        }
    if asked.plot is not None:
        from lowmoe.cli.simulate_picture import draw

        draw(asked.plot, trace.model, _curves(trace, names))
    if asked.json:
        print_json({"model": trace.model, "tokens": trace.n_tokens, "policies": results})
        return
    print_machine(machine, source, question.context)
    _print(trace, places.on_gpu, places.in_ram, results)


def _print(trace: RoutingTrace, on_gpu: int, in_ram: int, results: dict[str, Any]) -> None:
    total = sum(trace.n_experts)
    out.print(
        f"{trace.model}: {trace.n_tokens} tokens, {total} experts, {on_gpu} on the GPU, {in_ram} "
        "in RAM",
        markup=False,
        soft_wrap=True,
    )
    out.print(f"{'policy':10}{'GPU':>7}{'RAM':>7}{'disk':>7}{'moved up':>10}{'tokens/s':>10}")
    for name, r in results.items():
        speed = speed_words((r["tokens_per_s"],))
        out.print(
            f"{name:10}{r['gpu']:7.1%}{r['ram']:7.1%}{r['disk']:7.1%}"
            f"{r['promoted_per_token']:10.2f}{speed:>10}",
            markup=False,
        )


def _replayed(trace: RoutingTrace, name: str, n_gpu: int, n_ram: int) -> Replayed:
    """The second half, after a profile of the first for those that want one."""
    first, second = halves(trace)
    make = partial(policy_of, name, second, counted(first))
    if name == CEILING and n_gpu:
        # Slots that take in every miss, whatever that costs: no way of moving experts does better.
        on_gpu = replay(second, n_gpu=0, n_ram=n_gpu, policy=make).ram
        in_memory = 1.0
        if n_gpu + n_ram < sum(trace.n_experts):
            in_memory = replay(second, n_gpu=0, n_ram=n_gpu + n_ram, policy=make).ram
        promoted = (1 - on_gpu) * trace.n_layers * trace.n_active
        return Replayed(gpu=on_gpu, ram=in_memory - on_gpu, promoted=promoted)
    return replay(second, n_gpu=n_gpu, n_ram=n_ram, policy=make)


def _curves(trace: RoutingTrace, names: tuple[str, ...]) -> dict[str, list[tuple[float, float]]]:
    """Hit rate of one tier by the share of experts it holds."""
    total = sum(trace.n_experts)
    shares = [i / PICTURE_POINTS for i in range(1, PICTURE_POINTS + 1)]
    return {
        name: [
            (share, _replayed(trace, name, 0, max(2, int(share * total))).ram) for share in shares
        ]
        for name in names
    }
