"""The demo model's card.    python -m benchmarks.demo_model.card RESULTS.json MODEL_CARD.md

Knows:        what evaluate.py wrote; what the model learnt from, and on which terms.
Ignorant of:  models.
"""

import argparse
import json
from pathlib import Path
from string import Template
from typing import Any

from benchmarks.demo_model.page import KINDS, SMOLLM2_BITS_PER_BYTE

# Llama 3.1's licence, section 1.b.i: what was trained on its output carries its name in front.
NAME = "Llama-Storyteller-MoE-29M"
SHIPPED_BITS = 6
TEMPLATE = Path(__file__).with_name("card_template.md")


def card(results: dict[str, Any]) -> str:
    """In Markdown.  Raises SystemExit for results of a model whose training nobody counted."""
    if results["tokens"] is None:
        raise SystemExit(
            "the results do not say how many tokens the model learnt from. Evaluate a folder that "
            "benchmarks.demo_model.export wrote."
        )
    found = results["models"][0]
    shipped = next(row for row in results["widths"] if row["bits"] == SHIPPED_BITS)
    losses = ", ".join(f"{name} {found['loss'][kind]:.2f}" for kind, name in KINDS.items())
    return Template(TEMPLATE.read_text("utf-8")).substitute(
        name=NAME,
        million_tokens=f"{results['tokens'] / 1e6:.0f}",
        losses=losses,
        **{what: f"{share:.0%}" for what, share in shipped["about"].items()},
        most_tokens=shipped["samples"][0]["most_tokens"],
        bits_per_byte=f"{found['bits_per_byte']:.3f}",
        smollm2_bits_per_byte=f"{SMOLLM2_BITS_PER_BYTE:.3f}",
    )


def main() -> None:
    """Write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("card", type=Path)
    arguments = parser.parse_args()
    results = json.loads(arguments.results.read_text("utf-8"))
    arguments.card.write_text(card(results), encoding="utf-8")


if __name__ == "__main__":
    main()
