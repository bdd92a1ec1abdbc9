"""Plans are held to runs: what the planner says now of settings that were measured once."""

import json
import statistics
from pathlib import Path

import quant
from benchmarks.plan_accuracy import SETTINGS, offs, setting_of

RESULTS = Path(quant.__file__).parents[1] / "benchmarks" / "results"


def test_the_planner_predicts_what_was_measured() -> None:
    """The bounds are docs/plan.md's: memory 5 %, tokens/s 15 % at the median and 30 % at worst."""
    results = json.loads((RESULTS / "zen5-plan-accuracy.json").read_text("utf-8"))
    assert len(results) >= 20
    assert {setting_of(result) for result in results} <= set(SETTINGS)
    off = offs(results)
    assert max(off["memory"]) <= 0.05
    assert statistics.median(off["tokens/s"]) <= 0.15
    assert max(off["tokens/s"]) <= 0.30
