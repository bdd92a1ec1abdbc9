"""What does the planner predict for machines that others have published figures of?   tokens/s.

    python -m benchmarks.beside_published [--write docs/performance.md]

Counts:      decode of one answer, as `lowmoe plan` predicts it: nothing here was run.
Leaves out:  whether both models are as good: bits a weight are those nearest to the published.

Where a source does not say what RAM a machine has, it is taken for the reference PC's.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

from lowmoe.cards import CARDS
from lowmoe.engine.memory import margin_bytes
from lowmoe.families import read_config
from lowmoe.families.aliases import ALIASES
from lowmoe.plan.here import SYSTEM_BYTES
from lowmoe.plan.machine import (
    CORES,
    DISK_BYTES_PER_S,
    ISA,
    RAM_BYTES_PER_S,
    Machine,
    processor,
)
from lowmoe.plan.planner import Question, plan, speed_words

BEGIN, END = "<!-- published: begin -->", "<!-- published: end -->"
GIB = 2**30
CONTEXT = 4096
# Of its data sheet, two channels of DDR5 read as much (lowmoe/plan/machine.py).
USABLE = 0.83


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """A figure of somebody else's.  bits: ours to set beside theirs; ram_gib, channels: GB/s of the
    data sheet, None where the source does not say.
    """

    model: str
    theirs: str
    engine: str
    card: str
    tokens_per_s: str
    source: str
    bits: int
    ram_gib: int = 64
    ram_gb_s: float | None = None
    cores: int = CORES
    note: str = ""

    def machine(self) -> Machine:
        """The planner's."""
        card, n_bytes = CARDS[self.card], self.ram_gib * GIB
        speed = RAM_BYTES_PER_S if self.ram_gb_s is None else USABLE * self.ram_gb_s * 1e9
        return Machine(
            ram_bytes=n_bytes - margin_bytes(n_bytes) - SYSTEM_BYTES,
            ram_bytes_per_s=speed,
            disk_bytes_per_s=DISK_BYTES_PER_S,
            cpu=processor(ISA, self.cores),
            card=card,
            card_name=self.card,
            vram_bytes=card.memory_bytes,
        )


GITHUB = "https://github.com"
FIGURES = [
    Published(
        model="mixtral-8x7b", theirs="Q4_K_M, 28 of 33 layers", engine="llama.cpp", card="3090",
        tokens_per_s="24", source=f"{GITHUB}/ggml-org/llama.cpp/issues/4729", bits=4,
    ),
    Published(
        model="mixtral-8x7b", theirs="not said, 20 layers", engine="llama.cpp", card="4090",
        tokens_per_s="8-10", source=f"{GITHUB}/ollama/ollama/issues/1556", bits=4,
    ),
    Published(
        model="mixtral-8x7b", theirs="Q4_K_M, experts cross the bus", engine="moe-l2",
        card="4090", tokens_per_s="3.7", source=f"{GITHUB}/yalun753/moe-l2", bits=4,
    ),
    Published(
        model="mixtral-8x7b", theirs="HQQ, experts of 2 bits", engine="mixtral-offloading",
        card="3060", tokens_per_s="2.3", source="https://arxiv.org/abs/2312.17238", bits=2,
        ram_gib=32,
    ),
    Published(
        model="gpt-oss-120b", theirs="MXFP4, experts of 25 layers on the CPU", engine="llama.cpp",
        card="3090", tokens_per_s="32-33", source="https://ai-maestro.online/drastically-improve-"
        "prompt-processing-speed-for-n-cpu-moe-partially-offloaded-models/", bits=4, ram_gib=96,
    ),
    Published(
        model="qwen3-235b-a22b", theirs="Q2_K", engine="moe-l2", card="4090", tokens_per_s="3.9",
        source=f"{GITHUB}/yalun753/moe-l2", bits=2, ram_gib=128,
    ),
    Published(
        model="qwen3.5-397b-a17b", theirs="4 bits, from NVMe", engine="flash-moe", card="4090",
        tokens_per_s="5.4", source=f"{GITHUB}/danveloper/flash-moe/pull/7", bits=4,
    ),
    Published(
        model="deepseek-v3", theirs="Q4_K_M, one socket", engine="KTransformers", card="4090",
        tokens_per_s="8.7", source=f"{GITHUB}/kvcache-ai/ktransformers/blob/main/doc/en/"
        "DeepseekR1_V3_tutorial.md", bits=4, ram_gib=512,
        ram_gb_s=307.2, cores=32, note="Xeon 6454S, eight channels of DDR5-4800, a 4090D",
    ),
]  # fmt: skip


def table() -> list[str]:
    """Lines of Markdown."""
    lines = [
        "| model | machine | published | tokens/s | lowmoe, predicted | limited by |",
        "|---|---|---|---|---|---|",
    ]
    for of in FIGURES:
        question = Question(
            spec=read_config(ALIASES[of.model].config).spec, context=CONTEXT, kv="float16"
        )
        row = next(row for row in plan(question, of.machine()) if row.bits == of.bits)
        speeds = row.decode_tokens_per_s
        where = "" if row.allotment.vram_bytes else ", on the CPU"
        predicted = "does not fit" if speeds is None else speed_words(speeds)
        lines.append(
            f"| {of.model} | {of.card}, {of.ram_gib} GiB of RAM at "
            f"{of.machine().ram_bytes_per_s / 1e9:.0f} GB/s"
            f"{'' if of.ram_gb_s else ' (not said)'}{'; ' * bool(of.note)}{of.note} | {of.engine}, "
            f"{of.theirs} ([source]({of.source})) | {of.tokens_per_s} | **{predicted}** at "
            f"{of.bits} bits{where} | {row.limit or '-'} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, help="a page with marks to put the table between")
    page = parser.parse_args().write
    text = "\n".join(table())
    print(text)
    if page is not None:
        before, rest = page.read_text("utf-8").split(BEGIN)
        page.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}", "utf-8")


if __name__ == "__main__":
    main()
