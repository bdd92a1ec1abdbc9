"""The demo model's page: figures, samples, two pictures.

    python -m benchmarks.demo_model.page RESULTS.json docs

writes demo_model.md and pictures/demo_experts.png and demo_slots.png there.

Knows:        what evaluate.py wrote.
Ignorant of:  models.
"""

import argparse
import json
from pathlib import Path
from string import Template
from typing import Any

from matplotlib.figure import Figure

# SmolLM2-135M, a dense model of 135M parameters, on the same stories; measured with the first
# version, in pieces of a length that was not written down.
SMOLLM2_BITS_PER_BYTE = 0.686
TEMPLATE = Path(__file__).with_name("page_template.md")
KINDS = {"stories": "stories", "scenes": "scenes", "qa": "questions", "fairy": "fairy tales"}
EXPERTS, SLOTS = "pictures/demo_experts.png", "pictures/demo_slots.png"


def draw_experts(routing: dict[str, Any], path: Path) -> None:
    """A heat map for each kind of text: layers by experts."""
    shares = routing["shares"]
    figure = Figure(figsize=(2.6 * len(shares), 3.2), layout="constrained")
    most = max(max(map(max, rows)) for rows in shares.values())
    for axes, (kind, rows) in zip(figure.subplots(1, len(shares)), shares.items(), strict=True):
        image = axes.imshow(rows, vmin=0, vmax=most, cmap="viridis", aspect="auto")
        axes.set(title=KINDS[kind], xlabel="expert", xticks=range(len(rows[0])))
        axes.set_yticks(range(len(rows)))
    figure.axes[0].set_ylabel("layer")
    figure.colorbar(image, ax=figure.axes, label="share of the layer's choices")
    figure.savefig(path, dpi=120)


def draw_slots(routing: dict[str, Any], path: Path) -> None:
    """Hit rate by slots, a curve for each kind; what chance would hit beside them."""
    slots = routing["slots"]
    figure = Figure(figsize=(6, 3.8), layout="constrained")
    axes = figure.add_subplot()
    for kind, hits in routing["hits"].items():
        axes.plot(slots, hits, marker=".", label=KINDS[kind])
    axes.plot(slots, [n / slots[-1] for n in slots], "k:", label="experts used alike, at random")
    axes.set(xlabel=f"slots, of {slots[-1]} experts", ylabel="hit rate", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def table(head: list[str], rows: list[list[str]]) -> str:
    """In Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def losses_table(models: list[dict[str, Any]]) -> str:
    """A row for each model; the yardstick last."""
    head = ["", *(f"{kind}, nats a token" for kind in KINDS.values()), "stories, bits a byte"]
    rows = [
        [m["name"], *(f"{m['loss'][kind]:.3f}" for kind in KINDS), f"{m['bits_per_byte']:.3f}"]
        for m in models
    ]
    return table(head, [*rows, ["SmolLM2-135M", "", "", "", "", f"{SMOLLM2_BITS_PER_BYTE:.3f}"]])


def widths_table(widths: list[dict[str, Any]]) -> str:
    """What narrower experts cost."""
    head = ["experts at", "perplexity", "KL divergence, nats a token", "same top token"]
    rows = [
        [
            f"{row['bits']} bits",
            f"{row['perplexity']:.2f}",
            f"{row['kl']:.4f}",
            f"{row['top1']:.1%}",
            *(f"{row['about'][what]:.0%}" for what in ("who", "what", "ended")),
        ]
        for row in widths
    ]
    return table([*head, "name who was asked for", "and what", "end"], rows)


def repeats_table(repeats: dict[str, list[float]]) -> str:
    """Of each kind, layer by layer."""
    layers = range(len(next(iter(repeats.values()))))
    rows = [[KINDS[k], *(f"{rate:.0%}" for rate in rates)] for k, rates in repeats.items()]
    return table(["layer", *map(str, layers)], rows)


def samples_section(widths: list[dict[str, Any]]) -> str:
    """Every prompt, and its answer at each width."""
    parts = []
    for number, first in enumerate(widths[0]["samples"]):
        parts.append(f"### {first['prompt']}")
        for row in widths:
            sample = row["samples"][number]
            quoted = "\n".join(f"> {line}".rstrip() for line in sample["text"].splitlines())
            ended = "" if sample["n_tokens"] < sample["most_tokens"] else ", cut off"
            parts.append(f"**{row['bits']} bits**, {sample['n_tokens']} tokens{ended}\n\n{quoted}")
    return "\n\n".join(parts)


def page(results: dict[str, Any]) -> str:
    """In Markdown."""
    widths, routing = results["widths"], results["routing"]
    n_active = routing["n_active"]
    n_experts = len(next(iter(routing["shares"].values()))[0])
    return Template(TEMPLATE.read_text("utf-8")).substitute(
        machine=results["machine"],
        context=results["context"],
        losses=losses_table(results["models"]),
        widths=widths_table(widths),
        most_tokens=widths[0]["samples"][0]["most_tokens"],
        experts=EXPERTS,
        slots=SLOTS,
        n_active=n_active,
        chance=f"{n_active / n_experts:.0%}",
        repeats=repeats_table(routing["repeats"]),
        samples=samples_section(widths),
    )


def main() -> None:
    """Write the page and its pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("docs", type=Path)
    arguments = parser.parse_args()
    results = json.loads(arguments.results.read_text("utf-8"))
    (arguments.docs / "pictures").mkdir(parents=True, exist_ok=True)
    draw_experts(results["routing"], arguments.docs / EXPERTS)
    draw_slots(results["routing"], arguments.docs / SLOTS)
    (arguments.docs / "demo_model.md").write_text(page(results), encoding="utf-8")


if __name__ == "__main__":
    main()
