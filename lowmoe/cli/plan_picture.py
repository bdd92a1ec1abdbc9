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
from lowmoe.plan.planner import READING_SPEED, Question, plan, speed_words

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
    figure = figure_of(6 * len(columns), 4.5)
    every = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for axes, (label, change, here) in zip(every, columns, strict=True):
        _curves(axes, label, change, here, question)
    _scale(every[0])
    every[0].set_ylabel("tokens/s of decode")
    every[-1].legend(loc="best")
    card = (
        "no GPU"
        if machine.card is None
        else f"{machine.card_name}, {machine.vram_bytes / GB:.0f} GB"
    )
    figure.suptitle(
        f"{model}, predicted; bands are the range of texts\n"
        f"{card}, {machine.ram_bytes / GB:.0f} GB of RAM for it",
        fontsize="medium",
    )
    save(figure, path)


def _scale(axes: Any) -> None:
    """Plain numbers on a logarithmic axis, and the speed at which people read."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))


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
    axes.axhline(READING_SPEED, color="gray", linestyle="dashed", linewidth=1, label="as one reads")
    axes.axvline(here / GB, color="black", linestyle="dotted", label="this plan")
    for row in plan(question, change(here)):
        if row.middle:
            axes.plot(here / GB, row.middle, "o", color="black", markersize=4)
            axes.annotate(
                f"{speed_words((row.middle,))} at {row.bits} bits", (here / GB, row.middle),
                xytext=(6, -12), textcoords="offset points", fontsize=9,
            )  # fmt: skip
    axes.set_xlim(0, 2 * here / GB)
    axes.set_xlabel(label)
    axes.grid(alpha=0.3)
