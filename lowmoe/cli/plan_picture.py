"""A picture of a plan: tokens/s against VRAM, against RAM, at every width.

Knows:        matplotlib, which curves are worth a look.
Ignorant of:  the arithmetic.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from lowmoe.errors import UsageError
from lowmoe.plan.machine import Machine
from lowmoe.plan.planner import Question, plan

POINTS = 24
GB = 1e9


def draw(path: Path, model: str, question: Question, machine: Machine) -> None:
    """Write it.  Raises UsageError without matplotlib, or for a name it knows no format for."""
    columns: list[tuple[str, Callable[[int], Machine], int]] = [
        ("RAM for the model, GB", lambda n: replace(machine, ram_bytes=n), machine.ram_bytes)
    ]
    if machine.card is not None:
        columns.insert(
            0, ("VRAM, GB", lambda n: replace(machine, vram_bytes=n), machine.vram_bytes)
        )
    figure = figure_of(6 * len(columns), 4)
    for number, (label, change, here) in enumerate(columns, start=1):
        _curves(figure.add_subplot(1, len(columns), number), label, change, here, question)
    figure.suptitle(f"{model}, predicted: tokens/s of decode, the range of texts")
    save(figure, path)


def figure_of(width: float, height: float) -> Any:
    """An empty one, in inches.  Raises UsageError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise UsageError(
            "--plot needs matplotlib, which is not installed: pip install matplotlib"
        ) from e
    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Any, path: Path) -> None:
    """Write it.  Raises UsageError for a name that says no known format."""
    try:
        figure.savefig(path)
    except (ValueError, OSError) as e:
        raise UsageError(f"{path}: no picture was written: {e}.") from e


def _curves(
    axes: Any, label: str, change: Callable[[int], Machine], here: int, question: Question
) -> None:
    amounts = [here * 2 * i // POINTS for i in range(1, POINTS + 1)]
    rows = [plan(question, change(amount)) for amount in amounts]
    for width in range(len(rows[0])):
        points = [(a / GB, row[width]) for a, row in zip(amounts, rows, strict=True)]
        found = [(x, *row.decode_tokens_per_s) for x, row in points if row.decode_tokens_per_s]
        if found:
            x, low, high = zip(*found, strict=True)
            bits = rows[0][width].bits
            axes.fill_between(x, low, high, alpha=0.3, label=f"{bits} bits")
            axes.plot(x, [row.middle for _, row in points if row.decode_tokens_per_s])
    axes.axvline(here / GB, color="black", linestyle="dotted", label="this plan")
    axes.set_xlabel(label)
    axes.set_ylabel("tokens/s")
    axes.set_yscale("log")
    axes.legend()
