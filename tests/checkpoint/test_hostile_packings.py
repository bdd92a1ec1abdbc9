"""Does a damaged or hostile checkpoint of packed weights end in numbers or in an error of ours?

A hundred thousand mutations of files and of what config.json says of them, the same in every run.
"""

import json
import math
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from lowmoe.checkpoint.packings.packing import Weight
from lowmoe.checkpoint.packings.quantization_config import read_packings
from lowmoe.checkpoint.reader import Checkpoint
from lowmoe.checkpoint.safetensors_file import DTYPES
from lowmoe.errors import LowMoeError
from tests.checkpoint.mutations import mutated_bytes
from tests.checkpoint.packed_weights import (
    GROUP,
    NAME,
    ROWS,
    Packed,
    compressed,
    eight_bits,
    four_bits,
    fp8,
    mxfp4,
    normal,
)
from tests.live_bytes import LiveBytes


def gptq(*, method: str = "gptq") -> Packed:
    """Codes at random, in the places where GPTQ and AWQ have them."""
    generator = torch.Generator().manual_seed(0)

    def words(*shape: int) -> Tensor:
        return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, generator=generator)

    tensors = {"layer.scales": torch.rand(2, 16).half(), "layer.qzeros": words(2, 2)}
    if method == "gptq":
        tensors |= {"layer.qweight": words(4, 16), "layer.g_idx": torch.arange(32).int() // 16}
    else:
        tensors |= {"layer.qweight": words(32, 2)}
    config = {"quant_method": method, "bits": 4, "group_size": 16, "desc_act": method == "gptq"}
    return Packed(config=config, tensors=tensors, numbers=torch.empty(16, 32))


VICTIMS: Mapping[str, Callable[[], Packed]] = {
    "fp8": lambda: fp8(12, 20, block=(8, 8)),
    "a stack": lambda: fp8(2, 8, 12, block=(8, 8)),
    "mxfp4": lambda: mxfp4(2, 32, 4),
    "words": lambda: compressed(normal(16, 64).bfloat16(), **GROUP, symmetric=False, shuffled=True),
    "int8 with zeros": lambda: compressed(
        normal(8, 16).bfloat16(), format="int-quantized", **ROWS, symmetric=False
    ),
    "nf4": lambda: four_bits(6, 50),
    "int8": lambda: eight_bits(6, 16),
    "gptq": gptq,
    "awq": lambda: gptq(method="awq"),
}
NUMBERS = [-1, 0, 1, 2, 3, 4, 8, 31, 32, 64, 2**31, 2**62, 2**63, 10**400, 0.5, 1e308, True, None]
WORDS = ["", "fp8", "gptq", "awq", "mxfp4", "nf4", "int", "float", "group", "tensor", "\ud800", "x"]
ODD: list[Any] = [*NUMBERS, *WORDS, [], [0], [2, 2], [128, 128], {}, {"a": 1}, [[[]]]]


def mutated_config(config: Any, pick: random.Random) -> Any:
    """The same with a value or a key, somewhere within, that is another."""
    if isinstance(config, dict) and config and pick.random() < 0.9:
        key = pick.choice(sorted(config))
        rest = {k: v for k, v in config.items() if k != key}
        if pick.random() < 0.1:
            return rest
        if pick.random() < 0.1:
            return rest | {str(pick.choice(WORDS)): config[key]}
        return config | {key: mutated_config(config[key], pick)}
    if isinstance(config, list) and config and pick.random() < 0.5:
        return [mutated_config(config[0], pick), *config[1:]]
    return pick.choice(ODD)


def mutated_tensors(tensors: Mapping[str, Tensor], pick: random.Random) -> dict[str, Tensor]:
    """A tensor of another shape, dtype or content, of another name, or none."""
    name = pick.choice(sorted(tensors))
    tensor, others = tensors[name], {n: t for n, t in tensors.items() if n != name}
    what = pick.randrange(5)
    if what == 0:
        return others
    if what == 1:
        return others | {
            pick.choice([*tensors, "layer.bias", "other"]) + "x"[: pick.randrange(2)]: tensor
        }
    octets = tensor.flatten().view(torch.uint8)
    if what == 2:
        random_bytes = bytearray(pick.randbytes(octets.numel()))
        changed = torch.frombuffer(random_bytes, dtype=torch.uint8) if random_bytes else octets
        return others | {name: changed.view(tensor.dtype).view(tensor.shape)}
    if what == 3:
        dtype = pick.choice(list(DTYPES.values()))
        whole = octets[: octets.numel() // dtype.itemsize * dtype.itemsize]
        return others | {name: whole.view(dtype)}
    size = max(0, pick.choice([0, 1, tensor.numel() // 2, tensor.numel() - 1]))
    return others | {name: tensor.flatten()[:size]}


def mutated_shape(shape: tuple[int, ...], pick: random.Random) -> tuple[int, ...]:
    sizes = [pick.choice([n, n + 1, n - 1, 2 * n, 1, 2**20, 2**40, 2**61]) for n in shape]
    return tuple(sizes[: pick.choice([1, 2, 3, 3, 3])])


def reads_or_refuses(folder: Path, shape: tuple[int, ...]) -> Tensor | None:
    """What we read, None where we refuse; anything but an error of ours passes through."""
    try:
        checkpoint = Checkpoint(folder)
        weight = Weight(name=NAME, shape=shape, files=checkpoint)
        packed = read_packings(checkpoint.config).open(weight)
        return None if packed is None else packed.rows(0, shape[0])
    except LowMoeError:
        return None


def overwrite(path: Path, data: bytes) -> None:
    """Not emptied in between, after which some file systems wait for the disk."""
    with path.open("r+b") as file:
        file.write(data)
        file.truncate()


class Damage:
    """Mutations of one checkpoint."""

    def __init__(self, packed: Packed, folder: Path, seed: str) -> None:
        self.packed, self.folder, self.pick = packed, folder, random.Random(seed)
        packed.write(folder)
        self.file, self.config_file = folder / "model.safetensors", folder / "config.json"
        self.data, self.config = self.file.read_bytes(), self.config_file.read_text()
        self.shape = tuple(packed.numbers.shape)

    def files(self, n: int) -> Iterator[Tensor | None]:
        for _ in range(n):
            tensors, shape = self.packed.tensors, self.shape
            what = self.pick.random()
            if what < 0.5:
                overwrite(self.file, mutated_bytes(self.data, self.pick))
            else:
                tensors = mutated_tensors(tensors, self.pick)
                overwrite(self.file, save({n: t.contiguous() for n, t in tensors.items()}))
            if what > 0.9:
                shape = mutated_shape(shape, self.pick)
            yield reads_or_refuses(self.folder, shape)
        overwrite(self.file, self.data)

    def configs(self, n: int) -> Iterator[Tensor | None]:
        for _ in range(n):
            config = mutated_config(dict(self.packed.config), self.pick)
            overwrite(self.config_file, json.dumps({"quantization_config": config}).encode())
            yield reads_or_refuses(self.folder, self.shape)
        overwrite(self.config_file, self.config.encode())


@pytest.fixture(params=sorted(VICTIMS))
def damage(request: pytest.FixtureRequest, tmp_path: Path) -> Damage:
    return Damage(VICTIMS[request.param](), tmp_path, request.param)


def test_damaged_files_are_read_or_refused(damage: Damage) -> None:
    found = [numbers is not None for numbers in damage.files(7000)]
    assert any(found)  # some damages are to values alone
    assert not all(found)


def test_damaged_configs_are_read_or_refused(damage: Damage) -> None:
    found = [numbers is not None for numbers in damage.configs(4500)]
    assert any(found)
    assert not all(found)


def test_no_damage_takes_more_memory_than_file_and_numbers(damage: Damage) -> None:
    numbers = 4 * math.prod(damage.shape)
    for mutations in (damage.files(300), damage.configs(100)):
        while True:
            with LiveBytes() as live:
                if next(mutations, damage) is damage:
                    break
            # Numbers as they are made and as they are returned; tables of 256 pairs.
            assert live.peak < 2 * len(damage.data) + 4 * numbers + 16384
