"""What making a model folder takes of RAM and disk, checked before work begins.

Knows:        what a conversion holds at once, in memory and of shards on the disk.
Ignorant of:  how a conversion is run, what the weights are.
"""

import math
from collections.abc import Mapping
from pathlib import Path

from lowmoe.checkpoint import files
from lowmoe.checkpoint.file_names import CONFIG, INDEX, SINGLE
from lowmoe.checkpoint.layout import folder_layout
from lowmoe.checkpoint.packings.quantization_config import Packings, read_packings
from lowmoe.checkpoint.reader import read_json
from lowmoe.checkpoint.writer import SPARE_BYTES
from lowmoe.engine.machine import physical_cores
from lowmoe.engine.memory import available_ram_bytes
from lowmoe.engine.report import Reporter
from lowmoe.errors import DiskSpaceError, MemoryBudgetError
from lowmoe.families import Family
from lowmoe.library.calibration import calibration_tokens
from lowmoe.library.options import MakeOptions
from lowmoe.loader.hub import HubRepository
from lowmoe.spec import ModelSpec, Role, layer_parts

# Working memory of a conversion beside experts, hidden states and one layer's dense weights in
# float32: the interpreter, torch, what is made of a matrix at a time.
CONVERSION_SPARE_BYTES = 2**30
# What each thread of the encoder holds, see encoder_rows.h: 64 rows in float32 twice and as table
# values, sums for every 64 columns, and for feedback three depths' errors of two Hadamard blocks.
THREAD_BYTES_A_COLUMN = 64 * (4 + 4 + 1) + 12
THREAD_BYTES = 2**20


def check_ram(family: Family, options: MakeOptions) -> None:
    """Raises MemoryBudgetError if a conversion will not fit."""
    needed, available = _conversion_bytes(family.spec, options), available_ram_bytes()
    if available < needed:
        raise MemoryBudgetError(
            f"making this model needs about {needed} bytes of RAM, but {available} are available. "
            "Close other programs, or make it on a larger machine and copy the folder."
        )


def _conversion_bytes(spec: ModelSpec, options: MakeOptions) -> int:
    """An expert twice in float32, hidden states, one layer: what a conversion holds at once."""
    parts = [list(layer_parts(layer, spec)) for layer in spec.layers]
    dense = 4 * max(sum(math.prod(part.shape) for part in of) for of in parts)
    experts = spec.uniform_experts()
    n_inner, expert = experts.n_inner, experts.n_matrices * spec.n_hidden * experts.n_inner
    embedding = spec.n_vocab * spec.n_hidden
    states = 4 * _state_bytes(spec, options)
    widest = max(spec.n_hidden, n_inner, *(part.n_columns or 0 for of in parts for part in of))
    thread = THREAD_BYTES_A_COLUMN * widest + THREAD_BYTES
    threads = (options.threads or physical_cores()) * thread
    largest = max(2 * 4 * expert, 4 * embedding, dense)
    return largest + states + threads + CONVERSION_SPARE_BYTES


def _state_bytes(spec: ModelSpec, options: MakeOptions) -> int:
    """Hidden states of the calibration tokens in float32."""
    return 4 * calibration_tokens(options) * spec.n_hidden


def check_pull_disk(
    repository: HubRepository,
    shards: int,
    family: Family,
    folder: Path,
    options: MakeOptions,
    report: Reporter,
) -> None:
    """Raises DiskSpaceError if the result, shards and calibration state will not fit at once.

    shards: the most bytes of them that are on the disk at once.
    """
    layout = folder_layout(family.spec, options.recipe())
    made = [folder / name for name in layout.sizes if (folder / name).is_file()]
    needed = layout.total_bytes - sum(path.stat().st_size for path in made)
    needed += max(0, shards - repository.shard_bytes_here())
    # A state is whole on the disk before the one before it goes.
    needed += 2 * _state_bytes(family.spec, options) + SPARE_BYTES
    free = files.free_bytes(folder)
    report.note(
        f"{repository.repo_id}: {repository.total_bytes()} bytes to download, "
        f"{layout.total_bytes} bytes in the end, at most {needed} more bytes of disk in between, "
        f"{free} free"
    )
    if free < needed:
        raise DiskSpaceError(
            f"{folder}: needs {needed} bytes of free disk, but {free} are free. Free "
            f"{needed - free} bytes more, or set LOWMOE_HOME to a folder on another disk."
        )


def shards_of_pull(repository: HubRepository, small_files: Path, family: Family) -> int:
    """The most bytes of safetensors that a conversion keeps on the disk at once.

    small_files: the folder with the repository's index, if it has one.
    """
    packings = read_packings(read_json(small_files / CONFIG))
    shard_of = _shard_of(small_files, family)
    return most_shard_bytes(shard_of, repository.shard_bytes(), family, packings)


def _shard_of(folder: Path, family: Family) -> Mapping[str, str]:
    if (folder / INDEX).is_file():
        weight_map: Mapping[str, str] = read_json(folder / INDEX)["weight_map"]
        return weight_map
    return {family.tensor_name(role): SINGLE for role in family.shapes}


def most_shard_bytes(
    shard_of: Mapping[str, str],
    shard_bytes: Mapping[str, int],
    family: Family,
    packings: Packings,
) -> int:
    """The most bytes of shards that a conversion keeps on the disk at once.

    shard_of: where each tensor lies. A shard comes in the step that first reads from it and goes
    at the end of the last that does, so one that holds both ends of the model stays throughout.
    """
    steps: dict[str, list[int]] = {}
    family = family.as_found(set(shard_of))
    for role in family.shapes:
        # A tensor or shard that is missing is complained of where tensors are read.
        name = family.tensor_name(role)
        for stored in packings.stored(name, shard_of) or (name,):
            shard = shard_of.get(stored)
            if shard is not None and shard in shard_bytes:
                steps.setdefault(shard, []).append(_step(role, family.spec))
    return max(
        sum(shard_bytes[name] for name, of in steps.items() if min(of) <= step <= max(of))
        for step in range(len(family.spec.layers) + 3)
    )


def _step(role: Role, spec: ModelSpec) -> int:
    """When a conversion reads a tensor: embedding, layer by layer, final norm, head."""
    if role.layer_id is not None:
        return 1 + role.layer_id
    if role.name == "embedding":
        return 0
    return len(spec.layers) + (2 if role.name in ("head", "head_bias") else 1)
