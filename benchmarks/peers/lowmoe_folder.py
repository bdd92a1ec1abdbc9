"""lowmoe's model folders of random codes, made where they are missing.

Knows:        how a shape and bits become a folder.
Ignorant of:  what is measured with it.
"""

from pathlib import Path

from benchmarks.peers.shapes import Shape
from lowmoe.checkpoint.layout import Recipe, folder_layout
from lowmoe.families import read_config
from lowmoe.loader.synthetic import write_synthetic
from quant.layout import SYMBOL_BITS


def synthetic_folder(work: Path, name: str, shape: Shape, bits: int) -> Path:
    """A folder in `work` whose experts have so many bits; one that is there is taken as it is."""
    config = shape.lowmoe_config()
    folder = work / f"{name}-lowmoe-{bits}bit"
    if not folder.exists():
        print(f"writing {folder.name}", flush=True)
    write_synthetic(
        folder,
        config,
        read_config(config),
        _recipe(bits),
        name=name,
        progress=lambda done, total: None,
    )
    return folder


def folder_bytes(shape: Shape, bits: int) -> int:
    """What that folder takes on disk, whether it is there or not."""
    spec = read_config(shape.lowmoe_config()).spec
    return folder_layout(spec, _recipe(bits)).total_bytes


def _recipe(bits: int) -> Recipe:
    return Recipe(expert_planes=bits // SYMBOL_BITS)
