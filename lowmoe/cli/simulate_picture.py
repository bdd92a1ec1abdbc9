"""A picture of policies: hit rate against the share of experts that a tier holds.

Knows:        matplotlib.
Ignorant of:  how hit rates are found.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from lowmoe.cli.plan_picture import figure_of, save


def draw(path: Path, model: str, curves: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """Write it.  Raises as plan_picture does."""
    figure = figure_of(6, 4)
    axes = figure.add_subplot()
    for name, points in curves.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.plot([0, 1], [0, 1], color="black", linestyle="dotted", label="uniform routing")
    axes.set_xlabel("share of experts held")
    axes.set_ylabel("hit rate")
    axes.set_title(f"{model}: experts found, by policy")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    axes.grid(alpha=0.3)
    axes.legend()
    save(figure, path)
