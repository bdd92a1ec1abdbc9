from pathlib import Path
from typing import Any

import pytest

import quant
from benchmarks.gpu.render import BEGIN, END, NOTHING, line, replaced, tables

PAGE = Path(quant.__file__).parents[1] / "docs" / "performance.md"
DECODE: dict[str, Any] = {
    "kernel": "experts, decode",
    "shape": "mixtral-8x7b",
    "planes": 2,
    "tokens": 1,
    "seconds": [3e-4, 1e-4, 2e-4],
    "bytes": 1e8,
}
PREFILL = DECODE | {"tokens": 512, "flops": 4e10}
RESULT = {
    "card": "A Card",
    "sm": 89,
    "torch": "2.13.0",
    "copy_bytes_s": 1e12,
    "half_precision_flops": 4e14,
    "launch_seconds": {"eager": 5e-6, "graph": 1e-6},
    "rows": [DECODE, PREFILL],
}


def test_bytes_are_held_against_the_copy_and_operations_against_float16() -> None:
    # Of the median, 200 us: 1e8 bytes are 500 GB/s, 4e10 operations 200 TFLOPS.
    assert line(DECODE, 1e12, 4e14) == (
        "| experts, decode | mixtral-8x7b | 2 | 1 | 200.0 | 500 GB/s | 50% |"
    )
    assert line(PREFILL, 1e12, 4e14).endswith("| 200 TFLOPS | 50% |")


def test_a_result_becomes_a_table_with_its_card_and_ceilings_above() -> None:
    lines = tables([RESULT]).splitlines()
    assert "A Card" in lines[0]
    assert "1000 GB/s" in lines[0]
    assert "eager 5.0 us, graph 1.0 us" in lines[0]
    assert len(lines) == 4 + len(RESULT["rows"])  # type: ignore[arg-type]


def test_without_results_the_page_says_that_nothing_was_measured() -> None:
    assert tables([]) == NOTHING


def test_only_what_is_between_the_markers_is_written_anew() -> None:
    page = f"before {BEGIN} old {END} after"
    assert replaced(page, "new") == f"before {BEGIN}\nnew\n{END} after"
    with pytest.raises(SystemExit, match="no"):
        replaced("a page without markers", "new")


def test_the_page_in_docs_has_the_markers() -> None:
    assert replaced(PAGE.read_text("utf-8"), "new")
