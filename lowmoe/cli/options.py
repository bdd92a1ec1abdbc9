"""Options that several commands have, each said once.

Knows:        typer, what an option is called and means.
Ignorant of:  which commands there are, what they do.
"""

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str,
    typer.Argument(
        help="An alias, a hub repository (owner/name), a model folder, a checkpoint or a GGUF file."
    ),
]
OptionalModel = Annotated[
    str,
    typer.Argument(
        help="An alias, a hub repository (owner/name), a model folder, a checkpoint or a GGUF "
        "file. Without it: the demo model that comes with lowmoe."
    ),
]
ModelHere = Annotated[
    str,
    typer.Argument(
        help="A model folder, a checkpoint, a GGUF file, or the name of a model that is here. "
        "Without it: the demo model that comes with lowmoe."
    ),
]
FolderHere = Annotated[
    str,
    typer.Argument(
        help="A model folder, or the name of a model that is here. Without it: the demo model that "
        "comes with lowmoe."
    ),
]
Gpu = Annotated[str, typer.Option(help="auto, none, or a card's name such as 4090.")]
Bits = Annotated[str, typer.Option(help="Bits a weight of experts: 2, 4, 6 or auto.")]
Ram = Annotated[
    str | None,
    typer.Option(help="RAM for weights and cache: 24GiB, 64GB, 90%. Default: what is free."),
]
PlannedRam = Annotated[
    str | None,
    typer.Option(
        help="RAM for weights and cache: 24GiB, 64GB, 90%. Default: what is free. With a --gpu "
        "that is not here: all RAM that its PC has."
    ),
]
Vram = Annotated[
    str | None,
    typer.Option(help="GPU memory for all of it: 24GiB, 64GB, 90%. Default: what is free."),
]
DiskSpeed = Annotated[str | None, typer.Option(help="What the disk reads, such as 7GB/s.")]
RamSpeed = Annotated[str | None, typer.Option(help="What all threads read of RAM, such as 80GB/s.")]
Threads = Annotated[int | None, typer.Option(help="Threads. Default: the physical cores.")]
Context = Annotated[
    int | None,
    typer.Option(
        help="Tokens a conversation may have. Default: 8192, or what the model was made for if "
        "that is less."
    ),
]
Kv = Annotated[
    str | None,
    typer.Option(help="How keys and values are kept: float16, int8 or float32. Default: float16."),
]
TraceTimeline = Annotated[
    Path | None,
    typer.Option(help="Write when everything began and ended to this file, for ui.perfetto.dev."),
]
CacheAwareRouting = Annotated[
    float | None,
    typer.Option(
        help="Prefer experts in memory over others up to this share likelier, such as 0.1: faster "
        "where experts are on disk, and a worse model."
    ),
]
MissPlanes = Annotated[
    int | None,
    typer.Option(
        help="Planes of 2 bits that are read of an expert on disk until it is wanted again: faster "
        "than all of them, and a worse model."
    ),
]
Misses = Annotated[
    str,
    typer.Option(
        help="Where experts are computed that a GPU has no room for: cpu, page (brought to the GPU "
        "when needed) or auto, which measures."
    ),
]
HideThinking = Annotated[
    bool,
    typer.Option("--hide-thinking", help="Show answers without what the model thinks before them."),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object as the last line of stdout.")]
Calibration = Annotated[
    Path | None, typer.Option(help="Text to calibrate on. Default: the one that comes with lowmoe.")
]
NoCalibration = Annotated[
    bool,
    typer.Option(
        "--no-calibration",
        help="Skip calibration: faster, and with a large model a worse one, at 2 bits far worse.",
    ),
]
MakeBits = Annotated[int, typer.Option("--bits", help="Bits a weight of experts: 2, 4 or 6.")]
Format = Annotated[str, typer.Option(help="trellis, nf4, bf16, fp16 or fp32.")]
