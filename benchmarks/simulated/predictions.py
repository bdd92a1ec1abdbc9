"""How fast do models of real shapes decode on one machine, where each miss is computed?   tokens/s.

Counts:      lowmoe's own scheduling, tiers and policy over a machine in simulated time: a card with
             room for some of the experts, RAM for others, a disk for the rest; 64 tokens after 64.
Leaves out:  a model's values: tokens go where experts come again as often as was published
             (routing.py); kernels that do not reach the bandwidths given.

Beside it: the bound, as every run reports it, from the bytes moved and the bandwidths.

    python -m benchmarks.simulated.predictions [--gpu 4090] [--ram 96] [--write docs/performance.md]
"""

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.simulated.gpu import NO_OVERHEADS, USUAL_OVERHEADS, Overheads, Sizes
from benchmarks.simulated.machine import Speeds
from benchmarks.simulated.model import VOCABULARY, Outcome, Shape, SimulatedModel
from lowmoe.cards import CARDS, CardProfile
from lowmoe.checkpoint.layout import Recipe, dense_tensors
from lowmoe.experts.gpu_slots import GpuSlots
from lowmoe.experts.split import MISSES, Misses
from lowmoe.experts.staging import Staging
from lowmoe.families import read_config
from lowmoe.families.aliases import ALIASES
from lowmoe.kernels.cuda import MARGIN_BYTES
from lowmoe.spec import GroupedQueryAttention, ModelSpec
from quant.layout import SYMBOL_BITS

BEGIN, END = "<!-- simulated: begin -->", "<!-- simulated: end -->"
N_TOKENS = 64
CONTEXT, CACHED = 8192, 2048  # tokens that there is room for, and that attention reads
WORKING_BYTES = 2**30  # of the GPU, for a chunk of a prompt
OTHERS_RAM = 6 * 2**30  # left to everybody else
# RAM and bus of the reference machine (design: two channels of DDR5, PCIe 4 x16, one disk).
RAM, BUS, DISK = 80e9, 25e9, 7e9


@dataclass(frozen=True, slots=True)
class Row:
    """A model at some bits.  memory, skew: see routing.py, with their reasons below."""

    model: str
    bits: int
    memory: float
    skew: float


# Mixtral: any of the two comes again in 50 to 63 % of tokens (arXiv 2401.04088, table 5), popular
# alike; Qwen3-30B: 45 % of experts come again (kekzl/imp issue 1359); nothing is published of
# DeepSeek-V3: a quarter is assumed.
MIXTRAL, QWEN3, DEEPSEEK = (0.15, 0.2), (0.7, 0.5), (0.5, 0.5)
ROWS = [
    Row("mixtral-8x7b", 4, *MIXTRAL),
    Row("mixtral-8x22b", 2, *MIXTRAL),
    Row("mixtral-8x22b", 4, *MIXTRAL),
    Row("qwen3-30b-a3b", 6, *QWEN3),
    Row("deepseek-v3", 2, *DEEPSEEK),
]


def shape_of(row: Row, card: CardProfile, ram_bytes: int) -> Shape:
    """What the card and RAM have of a model, its other weights at 6 bits on the card."""
    recipe = Recipe(expert_planes=row.bits // SYMBOL_BITS)
    spec = read_config(ALIASES[row.model].config).spec
    routed = [layer for layer in spec.layers if layer.feed_forward.n_experts]
    parts = recipe.expert_format(spec).part_bytes
    experts = routed[0].feed_forward
    described = {name: t.itemsize * math.prod(s) for name, t, s in dense_tensors(spec, recipe)}
    dense = sum(described.values())
    ends = {end: _of(described, end) for end in ("embedding", "head")}
    head = ends["head"] or ends["embedding"]
    n_layers = len(routed)
    staged = Staging.needed_bytes(parts, experts.n_experts)
    beside = dense + CONTEXT * _cached_bytes(spec) + WORKING_BYTES + MARGIN_BYTES + staged
    n_slots = int(card.memory_bytes - beside) // GpuSlots.slot_bytes(parts)
    total = n_layers * experts.n_experts
    n_slots = min(n_slots, total)
    return Shape(
        n_layers=n_layers,
        n_experts=experts.n_experts,
        n_active=experts.router.n_active,
        sizes=Sizes(
            expert=sum(parts),
            layer=(dense - sum(ends.values())) / n_layers,
            head=head,
            cached=CACHED * _cached_bytes(spec) / n_layers,
            vocabulary=VOCABULARY,
        ),
        n_slots=n_slots,
        n_in_ram=min(total - n_slots + 1, (ram_bytes - OTHERS_RAM) // sum(parts)),
        memory=row.memory,
        skew=row.skew,
    )


def _of(described: dict[str, int], end: str) -> int:
    return sum(n for name, n in described.items() if name.split(".")[0] == end)


def _cached_bytes(spec: ModelSpec) -> int:
    """Of a token, in float16."""
    total = 0
    for layer in spec.layers:
        of = layer.attention
        if isinstance(of, GroupedQueryAttention):
            total += 2 * 2 * of.kv_size
        else:
            total += 2 * (of.kv_rank + of.rope_size)
    return total


def predicted(
    row: Row, misses: Misses, card: CardProfile, ram_bytes: int, overheads: Overheads
) -> Outcome:
    """64 tokens after as many."""
    speeds = Speeds(
        gpu=card.bandwidth, bus=min(BUS, card.bus_bandwidth), ram=RAM, cpu=RAM, disk=DISK
    )
    shape = shape_of(row, card, ram_bytes)
    with SimulatedModel(shape, speeds, misses, overheads=overheads) as model:
        model.decode(N_TOKENS)
        return model.decode(N_TOKENS)


def table(results: list[tuple[Row, Shape, dict[str, Outcome]]]) -> Iterator[str]:
    """Markdown."""
    yield (
        "| | experts on the GPU / in RAM / on disk | hits | page | cpu | auto "
        "| auto, bytes alone | bound |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    for row, shape, by in results:
        total, auto = shape.n_layers * shape.n_experts, by["auto"]
        on_disk = max(0, total - shape.n_slots - shape.n_in_ram)
        where = f"{shape.n_slots / total:.0%} / {(total - shape.n_slots - on_disk) / total:.0%}"
        alone = by["bytes alone"]
        share = alone.tokens_per_s / alone.bound_tokens_per_s
        yield (
            f"| {row.model}, {row.bits} bits | {where} / {on_disk / total:.0%} "
            f"| {auto.hit_rate.gpu:.0%} | {by['page'].tokens_per_s:.1f} "
            f"| {by['cpu'].tokens_per_s:.1f} | **{auto.tokens_per_s:.1f}** "
            f"| {alone.tokens_per_s:.1f}, {share:.0%} of the bound "
            f"| {alone.bound_tokens_per_s:.1f} |"
        )


def write(page: Path, text: str) -> None:
    """Between the marks of a page."""
    old = page.read_text(encoding="utf-8")
    before, rest = old.split(BEGIN)
    _, after = rest.split(END)
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", default="4090", choices=CARDS)
    parser.add_argument("--ram", type=int, default=128, help="GiB")
    parser.add_argument("--write", type=Path, help="a page with marks to put the table between")
    options = parser.parse_args()

    card, ram_bytes = CARDS[options.gpu], options.ram * 2**30
    results: list[tuple[Row, Shape, dict[str, Outcome]]] = []
    for row in ROWS:
        by: dict[str, Outcome] = {
            m: predicted(row, m, card, ram_bytes, USUAL_OVERHEADS) for m in MISSES
        }
        by["bytes alone"] = predicted(row, "auto", card, ram_bytes, NO_OVERHEADS)
        results.append((row, shape_of(row, card, ram_bytes), by))
    text = "\n".join(table(results))
    print(text)
    if options.write is not None:
        write(options.write, text)
    print(json.dumps([_plain(row, by) for row, _, by in results]))


def _plain(row: Row, by: dict[str, Outcome]) -> dict[str, Any]:
    return {
        "model": row.model,
        "bits": row.bits,
        **{
            how: {"tokens_per_s": of.tokens_per_s, "bound_tokens_per_s": of.bound_tokens_per_s}
            for how, of in by.items()
        },
    }


if __name__ == "__main__":
    main()
