"""Tiny random Mixtral checkpoints, and how to convert them.

Knows:        a config, random weights of the shapes it asks for, which shard each goes to.
Ignorant of:  what is tested with them.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lowmoe.checkpoint.file_names import INDEX, SINGLE
from lowmoe.checkpoint.layout import Recipe
from lowmoe.checkpoint.manifest import Source
from lowmoe.checkpoint.reader import Checkpoint, Shards
from lowmoe.decoder.weights import CheckpointTensors
from lowmoe.families import read_config
from lowmoe.kernels.cpu import isas
from lowmoe.kernels.cpu.encode import NativeEncoder
from lowmoe.loader.convert import CalibrationText, Conversion, Progress
from lowmoe.spec import checkpoint_tensors

CONFIG: Mapping[str, Any] = {
    "model_type": "mixtral",
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "tie_word_embeddings": False,
    "vocab_size": 80,
}
DEFAULT_RECIPE = Recipe()
SMALL_FILES = {"tokenizer.json": b'{"model": {}}', "generation_config.json": b"{}"}


def config_with(**changes: object) -> dict[str, Any]:
    return {**CONFIG, **changes}


def random_weights(config: Mapping[str, Any], dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    family, generator = read_config(config), torch.Generator().manual_seed(seed)
    return {
        family.tensor_name(role): (torch.randn(shape, generator=generator) * 0.1).to(dtype)
        for role, shape in checkpoint_tensors(family.spec)
    }


def write_tiny_mixtral(
    folder: Path,
    config: Mapping[str, Any] = CONFIG,
    *,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    shard_of: Callable[[str], str] | None = None,
) -> dict[str, Tensor]:
    """Write config.json and the weights, in one file or in those shard_of names; returns them."""
    weights = random_weights(config, dtype, seed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shard_of is None:
        save_file(weights, folder / SINGLE)
        return weights
    weight_map = {name: shard_of(name) for name in weights}
    for shard in sorted(set(weight_map.values())):
        save_file({n: w for n, w in weights.items() if weight_map[n] == shard}, folder / shard)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return weights


def random_text(n_vocab: int, lengths: Iterable[int]) -> CalibrationText:
    generator = torch.Generator().manual_seed(1)
    sequences = tuple(torch.randint(0, n_vocab, (n,), generator=generator) for n in lengths)
    return CalibrationText(sequences=sequences, text_hash="of random token ids")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a conversion is asked for, beside the checkpoint."""

    recipe: Recipe = DEFAULT_RECIPE
    calibrated: bool = True
    isa: str = isas()[0]
    n_threads: int = 1
    name: str = "tiny"
    lengths: tuple[int, ...] = (24, 17, 7)  # of the calibration sequences, in tokens


def convert(
    source: Path,
    folder: Path,
    options: Options | None = None,
    *,
    shards: Shards | None = None,
    progress: Callable[[Progress], None] = lambda _: None,
) -> None:
    """Convert a checkpoint folder that write_tiny_mixtral made.

    shards: as from a hub, where a commit says which weights they are.
    """
    options = options or Options()
    checkpoint = Checkpoint(source, shards)
    tensors = CheckpointTensors(checkpoint, read_config(checkpoint.config))
    n_vocab = tensors.family.spec.n_vocab
    Conversion(
        tensors,
        folder,
        options.recipe,
        source=Source(name=options.name, commit=None if shards is None else "0" * 40),
        small_files=SMALL_FILES,
        calibration=random_text(n_vocab, options.lengths) if options.calibrated else None,
        encode=NativeEncoder(isa=options.isa, threads=options.n_threads).encode,
        progress=progress,
    ).run()


class CountingShards:
    """A folder's shards that are counted, and gone when they are released."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fetched: list[str] = []
        self.released: list[str] = []

    def fetch(self, name: str) -> Path:
        assert name not in self.released
        self.fetched.append(name)
        return self.folder / name

    def release(self, name: str) -> None:
        self.released.append(name)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file's name and bytes."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
