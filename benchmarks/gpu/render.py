"""Writes the tables of docs/performance.md from the JSON files of kernel_table.py.

Knows:        the markers between which tables stand, what a row of JSON holds.
Ignorant of:  how anything was measured.

    python -m benchmarks.gpu.render docs/performance.md benchmarks/results/gpu-*.json
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
NOTHING = "No result of a card is in `benchmarks/results/` yet: nothing on this page was measured."


def tables(results: list[dict[str, Any]]) -> str:
    """Markdown of all results; a sentence where there is none."""
    return "\n\n".join(map(table, results)) if results else NOTHING


def table(result: dict[str, Any]) -> str:
    """Markdown of one card's result."""
    bandwidth, flops = result["copy_bytes_s"], result["half_precision_flops"]
    lines = [
        f"**{result['card']}** (sm_{result['sm']}, torch {result['torch']}): copy "
        f"{bandwidth / 1e9:.0f} GB/s, float16 {flops / 1e12:.0f} TFLOPS; one launch "
        + ", ".join(f"{name} {1e6 * s:.1f} us" for name, s in result["launch_seconds"].items()),
        "",
        "| kernel | shape | planes | tokens | us | rate | of the ceiling |",
        "|---|---|---|---|---|---|---|",
    ]
    return "\n".join(lines + [line(row, bandwidth, flops) for row in result["rows"]])


def line(row: dict[str, Any], bandwidth: float, flops: float) -> str:
    """One row of a table: bytes are held against the copy, operations against float16."""
    time = statistics.median(row["seconds"])
    if "flops" in row:
        speed = row["flops"] / time
        rate, share = f"{speed / 1e12:.0f} TFLOPS", speed / flops
    else:
        speed = row["bytes"] / time
        rate, share = f"{speed / 1e9:.0f} GB/s", speed / bandwidth
    cells = [
        row["kernel"], row["shape"], str(row.get("planes", "")), str(row["tokens"]),
        f"{1e6 * time:.1f}", rate, f"{share:.0%}",
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def replaced(page: str, text: str) -> str:
    """The page with other text between its markers."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"the page has no {BEGIN} … {END} to write between")
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def main() -> None:
    """Write the page anew."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", type=Path)
    parser.add_argument("results", type=Path, nargs="*")
    arguments = parser.parse_args()
    results = [json.loads(path.read_text("utf-8")) for path in arguments.results]
    page = arguments.page.read_text("utf-8")
    arguments.page.write_text(replaced(page, tables(results)), "utf-8")


if __name__ == "__main__":
    main()
