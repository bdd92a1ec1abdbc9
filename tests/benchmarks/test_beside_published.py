"""Predictions beside what others have published."""

from pathlib import Path

import quant
from benchmarks.beside_published import BEGIN, END, FIGURES, table

PAGE = Path(quant.__file__).parents[1] / "docs" / "performance.md"


def test_the_page_says_what_the_planner_predicts_now() -> None:
    """If not: python -m benchmarks.beside_published --write docs/performance.md"""
    written = PAGE.read_text("utf-8").split(BEGIN)[1].split(END)[0]
    assert written.strip().splitlines() == table()


def test_every_figure_has_a_source_and_every_prediction_a_reason() -> None:
    for of, line in zip(FIGURES, table()[2:], strict=True):
        assert of.source.startswith("https://")
        assert "does not fit" not in line
        assert not line.endswith("| - |")
