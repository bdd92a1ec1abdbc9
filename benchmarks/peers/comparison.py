"""The course of a comparison: every setting of llama.cpp in turn, then lowmoe against the fastest.

Knows:        the options of the scripts here, the two stages, what is printed last.
Ignorant of:  which question is asked.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.peers.contenders import PRESETS, Models, Workload
from benchmarks.peers.machine_state import MachineProbe
from benchmarks.peers.shapes import SHAPES
from benchmarks.peers.tables import fastest, print_ceiling, print_ratio, print_table
from benchmarks.peers.turns import Contender, Turn, TurnOptions, take_turns
from lowmoe.engine.machine import machine_line, physical_cores


def parser_of(question: str, *, tokens: int) -> argparse.ArgumentParser:
    """What all scripts here let their users choose."""
    parser = argparse.ArgumentParser(description=question)
    parser.add_argument(
        "--peer-python", type=_absolute, required=True, help="of llama.cpp's virtual environment"
    )
    parser.add_argument("--work", type=_absolute, required=True, help="folder for models")
    parser.add_argument("--shape", choices=SHAPES, default="mixtral-s")
    parser.add_argument("--tokens", type=int, default=tokens, help="of each sample")
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--samples", type=int, default=3, help="of each turn")
    parser.add_argument("--rounds", type=int, default=5, help="of lowmoe against the fastest peer")
    parser.add_argument(
        "--autogroup-nice",
        type=int,
        help="nice of what is timed as a scheduling group, such as -10; needs the right to it",
    )
    parser.add_argument(
        "--max-others-cores",
        type=float,
        default=0.2,
        help="a turn is taken again if other processes took more processor time",
    )
    return parser


def _absolute(text: str) -> Path:
    """Commands run in the repository's root, wherever this was started."""
    return Path(text).absolute()  # not resolved: a virtual environment's python is a link


def add_field_arguments(parser: argparse.ArgumentParser) -> None:
    """Where llama.cpp's fastest setting has to be found first."""
    parser.add_argument("--bits", type=int, nargs="+", choices=sorted(PRESETS), default=[4, 2])
    parser.add_argument("--field-rounds", type=int, default=2, help="of all settings of llama.cpp")


def turn_options(arguments: argparse.Namespace) -> TurnOptions:
    """Compiles the machine's probe."""
    arguments.work.mkdir(parents=True, exist_ok=True)
    return TurnOptions(
        probe=MachineProbe(
            arguments.work, arguments.threads, autogroup_nice=arguments.autogroup_nice
        ),
        autogroup_nice=arguments.autogroup_nice,
        max_others_cores=arguments.max_others_cores,
    )


def workload_of(arguments: argparse.Namespace, measure: str) -> Workload:
    """The options' workload, one warm-up a turn."""
    return Workload(
        measure=measure,
        tokens=arguments.tokens,
        threads=arguments.threads,
        samples=arguments.samples,
        warm_ups=1,
    )


def ask(question: str, measure: str, *, tokens: int) -> None:
    """A benchmark's whole way from its command line.  question: its first line."""
    parser = parser_of(question, tokens=tokens)
    add_field_arguments(parser)
    arguments = parser.parse_args()
    models = Models(
        work=arguments.work, shape_name=arguments.shape, peer_python=arguments.peer_python
    )
    compare(arguments, models, workload_of(arguments, measure))


def compare(arguments: argparse.Namespace, models: Models, workload: Workload) -> None:
    """Both stages for all bits, printed as they end; one JSON object comes last."""
    options = turn_options(arguments)
    print(machine_line())
    shape = f"{arguments.shape}, {workload.measure} of {workload.tokens} tokens"
    print(f"{shape}, {workload.threads} threads, random weights of these sizes on both sides")
    turns: list[Turn] = []
    ratios: dict[str, float] = {}
    try:
        for bits in arguments.bits:
            peers = models.llama_cpp(bits, workload)
            ours = models.lowmoe(bits, workload)
            turns += run_stage(peers, "field", arguments.field_rounds, options)
            best = fastest(undisturbed(turns), side="llama.cpp", bits=bits)
            duel = [ours, *(peer for peer in peers if peer.name == best)]
            turns += run_stage(duel, "duel", arguments.rounds, options)
            own = [turn for turn in turns if turn.bits == bits]
            ratios[f"{ours.name} / {best}"] = report(own, ours.name, best, workload)
    finally:  # what was measured is worth having even if the end was not reached
        print_json(arguments, workload, turns, ratios=ratios)


def run_stage(
    contenders: Sequence[Contender], stage: str, rounds: int, options: TurnOptions
) -> list[Turn]:
    """Take turns, a line printed for each."""
    turns = []
    for turn in take_turns(contenders, stage=stage, rounds=rounds, options=options):
        rates = " ".join(f"{rate:.2f}" for rate in turn.rates)
        seen = turn.observed
        note = ", disturbed: does not count" if seen.disturbed else ""
        print(
            f"  {stage} {turn.round}: {turn.contender}: {rates} tokens/s; RAM "
            f"{seen.before.read_all:.0f}, {seen.after.read_all:.0f} GB/s, {seen.link}; others "
            f"{seen.others_cores:.2f} cores, attempt {seen.attempts}{note}",
            flush=True,
        )
        turns.append(turn)
    return turns


def undisturbed(turns: Sequence[Turn]) -> list[Turn]:
    """The turns that count."""
    return [turn for turn in turns if not turn.observed.disturbed]


def report(turns: list[Turn], ours: str, best: str, workload: Workload) -> float:
    """The table, what the machine gave, and the ratio, which is returned."""
    turns = undisturbed(turns)
    if not turns:
        raise SystemExit("others disturbed every turn. Wait until the machine is quiet.")
    print()
    for engine in dict.fromkeys(turn.observed.result["engine"] for turn in turns):
        print(engine)
    print_table(turns, moves_weights=workload.measure == "decode")
    print_ceiling(turns)
    ratio = print_ratio([turn for turn in turns if turn.stage == "duel"], ours, best)
    print()
    return ratio


def print_json(
    arguments: argparse.Namespace, workload: Workload, turns: list[Turn], **more: Any
) -> None:
    """Everything measured, in one line."""
    print(
        json.dumps(
            {
                "machine": machine_line(),
                "shape": arguments.shape,
                "workload": asdict(workload),
                **more,
                "turns": [turn.to_json() for turn in turns],
            }
        )
    )
