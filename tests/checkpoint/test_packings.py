"""Do we read weights that other programs packed as the numbers that those programs read?"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowmoe.checkpoint import files
from lowmoe.checkpoint.packings.codes import from_e4m3, is_e4m3_nan, unpack
from lowmoe.checkpoint.packings.packing import CHUNK_WEIGHTS
from lowmoe.checkpoint.reader import Checkpoint
from lowmoe.decoder.weights import CheckpointTensors
from lowmoe.errors import CheckpointError, UnsupportedModelError
from lowmoe.families import read_config
from tests.checkpoint.packed_weights import (
    GROUP,
    KINDS,
    NAME,
    Packed,
    compressed,
    eight_bits,
    four_bits,
    fp8,
    mxfp4,
    normal,
    read,
)
from tests.checkpoint.tiny_mixtral import CountingShards, Options, contents, convert
from tests.live_bytes import LiveBytes

STACKS = {"mxfp4", "fp8, blocks of a stack"}
GPTQ = Path(__file__).parent.parent / "data" / "gptqmodel" / "gptq-4bit-reordered"


def all_rows(packed: Packed, folder: Path) -> Tensor:
    checkpoint, shape = packed.write(folder), tuple(packed.numbers.shape)
    if len(shape) == 2:
        return read(checkpoint, shape)
    return torch.stack([read(checkpoint, shape, slice(i, i + 1)) for i in range(shape[0])])


# As others read them


@pytest.mark.parametrize("kind", KINDS)
def test_packed_weights_are_read_as_who_packed_them_reads_them(tmp_path: Path, kind: str) -> None:
    packed = KINDS[kind]()
    found = all_rows(packed, tmp_path)
    assert found.dtype == torch.float32
    # Where ours rounds once, theirs may round twice more, 2^-24 each; near a zero of 8 bits a
    # difference of codes is small beside both.
    torch.testing.assert_close(found, packed.numbers, rtol=2**-22, atol=0)


def test_every_8_bit_float_is_torchs() -> None:
    octets = torch.arange(256, dtype=torch.uint8)
    wanted = octets.view(torch.float8_e4m3fn).float()
    assert [is_e4m3_nan(octet[None]) for octet in octets] == wanted.isnan().tolist()
    numbers = ~wanted.isnan()
    assert torch.equal(from_e4m3(octets)[numbers], wanted[numbers])


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (1, 5), (3, 4)])
def test_codes_lie_lowest_bits_first_whichever_way_words_do(
    bits: int, shape: tuple[int, int]
) -> None:
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, generator=generator)
    wanted = [
        [(word >> shift) % 2**bits for word in row for shift in range(0, 32, bits)]
        for row in words.tolist()
    ]
    assert unpack(words, bits).tolist() == wanted
    assert unpack(words.T.contiguous().T, bits).tolist() == wanted


# Rows


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - STACKS))
def test_some_rows_are_those_of_the_whole(tmp_path: Path, kind: str) -> None:
    packed = KINDS[kind]()
    checkpoint, shape = packed.write(tmp_path), tuple(packed.numbers.shape)
    whole = read(checkpoint, shape)
    for first, end in [(0, 1), (1, 2), (1, shape[0]), (shape[0] // 2, shape[0] - 1)]:
        assert torch.equal(read(checkpoint, shape, slice(first, end)), whole[first:end])


@pytest.mark.parametrize("kind", ["gptq-4bit-reordered", "gptq-8bit", "awq"])
def test_some_rows_are_those_of_the_whole_in_gptqmodels_files(kind: str) -> None:
    checkpoint = Checkpoint(GPTQ.parent / kind)
    name = "model.layers.0.mlp.experts.1.up_proj.weight"
    whole = read(checkpoint, (64, 64), name=name)
    for first, end in [(0, 1), (3, 4), (7, 30), (8, 16), (61, 64)]:
        assert torch.equal(read(checkpoint, (64, 64), slice(first, end), name), whole[first:end])


ROWS_ALONE = {
    "fp8": lambda: fp8(256, 512, block=(128, 128)),
    "words": lambda: compressed(normal(256, 512).bfloat16(), **GROUP),
    "nf4": lambda: four_bits(256, 512),
    "int8": lambda: eight_bits(256, 512),
    "a stack": lambda: fp8(64, 32, 64, block=(32, 32)),
    "mxfp4": lambda: mxfp4(64, 64, 32),
}


@pytest.mark.parametrize("kind", ROWS_ALONE)
def test_only_what_holds_the_rows_is_read(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = ROWS_ALONE[kind]()
    checkpoint, shape = packed.write(tmp_path), tuple(packed.numbers.shape)
    n_read, read_at = [0], files.read_at

    def counted(descriptor: int, buffer: memoryview, offset: int, path: Path) -> None:
        n_read[0] += len(buffer)
        read_at(descriptor, buffer, offset, path)

    read(checkpoint, shape, slice(0, 1))
    monkeypatch.setattr(files, "read_at", counted)
    read(checkpoint, shape, slice(0, 1))
    whole = (tmp_path / "model.safetensors").stat().st_size
    # A row of 256 or an expert of 64, with tables and scales of blocks of rows.
    assert n_read[0] < whole / 20


def test_memory_beside_codes_and_numbers_is_a_chunks(tmp_path: Path) -> None:
    n_out, n_in = 2048, 1024
    for i, packed in enumerate((fp8(n_out, n_in, block=(128, 128)), four_bits(n_out, n_in))):
        checkpoint = packed.write(tmp_path / str(i))
        stored = sum(t.nbytes for t in packed.tensors.values())
        with LiveBytes() as live:
            read(checkpoint, (n_out, n_in))
        # Of a chunk: codes, numbers in float32 twice and once more as looked up.
        assert live.peak < 4 * n_out * n_in + stored + 32 * CHUNK_WEIGHTS


# Refused before weights are read

CONFIGS: Mapping[str, tuple[Any, str]] = {
    "text": ("fp8", "quantization_config is fp8, but must be an object"),
    "no method": ({}, "quant_method is 'None', but implemented are awq, bitsandbytes, compressed"),
    "another method": ({"quant_method": "aqlm"}, "quant_method is 'aqlm', but implemented are"),
    "a list for a method": ({"quant_method": ["fp8"]}, "quant_method is .*, but implemented are"),
    "e5m2": ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt is 'e5m2', but only 'e4m3'"),
    "one size": (
        {"quant_method": "fp8", "weight_block_size": [128]},
        r"weight_block_size is \[128\], but must be two sizes",
    ),
    "a size of 0": (
        {"quant_method": "fp8", "weight_block_size": [0, 128]},
        "weight_block_size is 0, but must be a whole number from 1",
    ),
    "3 bits": ({"quant_method": "gptq", "bits": 3}, "bits is 3, but only 2, 4, 8"),
    "no bits": ({"quant_method": "gptq", "group_size": 32}, "bits is missing"),
    "no groups": ({"quant_method": "gptq", "bits": 4}, "group_size is missing"),
    "marlin": (
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "marlin"},
        "checkpoint_format is 'marlin', but only 'gptq' or 'gptq_v2'",
    ),
    "several widths": (
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "dynamic": {"+:.*up": {"bits": 8}}},
        "dynamic is .* but only one width for all modules",
    ),
    "gemv": (
        {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemv"},
        "version is 'gemv', but only 'gemm'",
    ),
    "8-bit awq": (
        {"quant_method": "awq", "w_bit": 8, "q_group_size": 32}, "w_bit is 8, but only 4"
    ),
    "another table": (
        {"quant_method": "bitsandbytes", "bnb_4bit_quant_type": "af4"},
        "bnb_4bit_quant_type is 'af4', but only 'nf4'",
    ),
    "no groups of modules": ({"quant_method": "compressed-tensors"}, "config_groups is None, but"),
    "turned weights": (
        {"quant_method": "compressed-tensors", "transform_config": {"a": 1}},
        "transform_config is .* but only None or {}",
    ),
    "sparse weights": (
        {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-bitmask"}},
        "format is 'sparse-bitmask', but only 'dense'",
    ),
    "not packed yet": (
        {"quant_method": "compressed-tensors", "quantization_status": "frozen"},
        "quantization_status is 'frozen', but only 'compressed'",
    ),
    "nvfp4": (
        {
            "quant_method": "compressed-tensors",
            "config_groups": {},
            "format": "nvfp4-pack-quantized",
        },
        "format is 'nvfp4-pack-quantized', but only",
    ),
    "5 bits": (
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {
                "all": {"weights": {"num_bits": 5, "type": "int", "strategy": "channel"}}
            },
        },
        "num_bits is 5, but only 2, 4, 8",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_what_nobody_implemented_is_refused_before_weights_are_opened(
    tmp_path: Path, name: str
) -> None:
    config, message = CONFIGS[name]
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    shards = CountingShards(tmp_path)
    with pytest.raises((UnsupportedModelError, CheckpointError), match=f"config.json: {message}"):
        Checkpoint(tmp_path, shards)
    assert not shards.fetched


# Files that contradict config.json or themselves


def without(suffix: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.pop(NAME + suffix)


def changed(
    suffix: str, change: Callable[[Tensor], Tensor]
) -> Callable[[dict[str, Tensor]], object]:
    def apply(tensors: dict[str, Tensor]) -> None:
        tensors[NAME + suffix] = change(tensors[NAME + suffix]).contiguous()

    return apply


def state(**values: Any) -> Callable[[dict[str, Tensor]], object]:
    """Other values in bitsandbytes' JSON."""

    def change(tensor: Tensor) -> Tensor:
        old = json.loads(tensor.numpy().tobytes())
        return torch.tensor(list(json.dumps(old | values).encode()), dtype=torch.uint8)

    return changed(".quant_state.bitsandbytes__nf4", change)


def filled(value: float) -> Callable[[Tensor], Tensor]:
    return lambda tensor: torch.full_like(tensor, value)


DAMAGES: Mapping[str, tuple[str, Callable[[dict[str, Tensor]], object], str]] = {
    "no scales": (
        "fp8, whole blocks", without("_scale_inv"),
        "layer.weight has dtype F8_E4M3 and nothing beside it",
    ),
    "too few scales": (
        "fp8, whole blocks", changed("_scale_inv", lambda t: t[:1]),
        r"_scale_inv is \[1, 3\], but scales for 32 x 32 of a weight of \[64, 96\] are needed",
    ),
    "another dtype": (
        "fp8, whole blocks", changed("", lambda t: t.bfloat16()),
        r"layer.weight is BF16 \[64, 96\], but a packed layer.weight of .* needs F8_E4M3",
    ),
    "another shape": (
        "fp8, whole blocks", changed("", lambda t: t[:32]), r"layer.weight is F8_E4M3 \[32, 96\]"
    ),
    "whole scales": (
        "fp8, whole blocks", changed("_scale_inv", lambda t: t.to(torch.int32)),
        "_scale_inv is I32 .* needs F32 or BF16 or F16",
    ),
    "NaN among codes": (
        "fp8, whole blocks", changed("", lambda t: t.view(torch.uint8).fill_(127).view(t.dtype)),
        "layer.weight: holds NaN, but weights are finite",
    ),
    "infinity among scales": (
        "fp8, whole blocks", changed("_scale_inv", filled(torch.inf)),
        "layer.weight holds NaN or infinity",
    ),
    "blocks without scales": ("mxfp4", without("_scales"), "has no tensor layer.weight_scales"),
    "scales without blocks": ("mxfp4", without("_blocks"), "has no tensor layer.weight_blocks"),
    "blocks of 30": (
        "mxfp4", changed("_blocks", lambda t: t[..., :15]),
        r"_blocks is U8 \[3, 40, 2, 15\], but .* needs U8 \[3, 40, 2, 16\]",
    ),
    "NaN among powers": ("mxfp4", changed("_scales", filled(255)), "a scale is NaN"),
    "half of the words": (
        "words, 4 bits", changed("_packed", lambda t: t[:, :6]), r"_packed is I32 \[48, 6\]"
    ),
    "words without scales": ("words, 4 bits", without("_scale"), "no tensor layer.weight_scale"),
    "another weight_shape": (
        "words, 4 bits", changed("_shape", lambda t: t.flip(0)),
        r"weight_shape is \[96, 48\], but config.json needs \[48, 96\]",
    ),
    "zeros of another shape": (
        "words, 4 bits with zeros", changed("_zero_point", lambda t: t[:1]),
        r"_zero_point is I32 \[1, 3\]",
    ),
    "a group there is not": (
        "words, 4 bits out of order", changed("_g_idx", lambda t: t + 1),
        "groups are 1 to 3, but there are 3 of them",
    ),
    "a negative group": (
        "words, 4 bits out of order", changed("_g_idx", lambda t: t - 1), "groups are -1 to 1"
    ),
    "half of the codes": ("nf4", changed("", lambda t: t[:9]), "is U8 of 9 bytes, but 4-bit codes"),
    "no table": ("nf4", without(".quant_map"), "has no tensor layer.weight.quant_map"),
    "too few blocks": (
        "nf4", changed(".absmax", lambda t: t[:1]), r"absmax is U8 \[1\], but .* needs U8 \[52\]"
    ),
    "no JSON": (
        "nf4", changed(".quant_state.bitsandbytes__nf4", filled(123)), "quant_state is not JSON"
    ),
    "JSON too long": (
        "nf4", changed(".quant_state.bitsandbytes__nf4", lambda t: t.repeat(1000)),
        "at most 65536 bytes of JSON are expected",
    ),
    "blocks of 3": ("nf4", state(blocksize=3), "blocksize is 3, but a power of two"),
    "blocks of nothing": ("nf4", state(blocksize=0), "blocksize is 0, but a power of two"),
    "another shape in JSON": ("nf4", state(shape=[66, 50]), r"quant_state has shape \[66, 50\]"),
    "an offset of text": ("nf4", state(nested_offset="x"), "nested_offset is x, but a number"),
    "an endless offset": ("nf4", state(nested_offset=10**400), "nested_offset is 1000.* number"),
    "columns one after the other": (
        "int8", changed("_format", filled(1)), "weight_format is not 0"
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_files_that_contradict_what_is_said_of_them_are_refused(
    tmp_path: Path, damage: str
) -> None:
    kind, change, message = DAMAGES[damage]
    packed = KINDS[kind]()
    packed.write(tmp_path)
    tensors = {n: t.clone() for n, t in packed.tensors.items()}
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    shape = tuple(packed.numbers.shape)
    with pytest.raises(CheckpointError, match=message):
        read(Checkpoint(tmp_path), shape, slice(0, 1))


@pytest.mark.parametrize(
    ("suffix", "change", "message"),
    [
        ("qweight", lambda t: t[:-1], r"qweight is I32 \[7, 64\], but .* needs I32 \[8, 64\]"),
        ("qzeros", lambda t: t[:1], r"qzeros is I32 \[1, 8\]"),
        ("scales", lambda t: t[:, 1:], r"scales is F16 \[2, 63\]"),
        ("scales", lambda t: t.fill_(torch.inf), "up_proj.weight holds NaN or infinity"),
        ("g_idx", lambda t: t + 1, "groups are 1 to 2, but there are 2"),
    ],
)
def test_contradictions_among_gptqs_tensors_are_refused(
    tmp_path: Path, suffix: str, change: Callable[[Tensor], Tensor], message: str
) -> None:
    module = "model.layers.0.mlp.experts.1.up_proj."
    tensors = load_file(GPTQ / "model.safetensors")
    tensors[module + suffix] = change(tensors[module + suffix]).contiguous()
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(GPTQ / "config.json", tmp_path)
    with pytest.raises(CheckpointError, match=message):
        read(Checkpoint(tmp_path), (64, 64), name=module + "weight")


def test_groups_out_of_order_must_be_stored(tmp_path: Path) -> None:
    tensors = load_file(GPTQ / "model.safetensors")
    kept = {n: t for n, t in tensors.items() if not n.endswith("up_proj.g_idx")}
    save_file(kept, tmp_path / "model.safetensors")
    shutil.copy(GPTQ / "config.json", tmp_path)
    with pytest.raises(CheckpointError, match=r"has no tensor .*up_proj\.g_idx"):
        open_tensors(tmp_path)


# Tensors beside weights


def open_tensors(folder: Path) -> CheckpointTensors:
    checkpoint = Checkpoint(folder)
    return CheckpointTensors(checkpoint, read_config(checkpoint.config))


def with_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """The kept checkpoint with further tensors in it."""
    save_file({**load_file(GPTQ / "model.safetensors"), **tensors}, folder / "model.safetensors")
    shutil.copy(GPTQ / "config.json", folder)


def test_biases_of_zeros_are_passed_by(tmp_path: Path) -> None:
    """AutoGPTQ gave every matrix one."""
    with_tensors(tmp_path, {"model.layers.0.mlp.experts.1.up_proj.bias": torch.zeros(64)})
    open_tensors(tmp_path)


def test_biases_that_are_not_zero_are_not_passed_by(tmp_path: Path) -> None:
    with_tensors(tmp_path, {"model.layers.0.mlp.experts.1.up_proj.bias": torch.ones(64)})
    with pytest.raises(CheckpointError, match=r"up_proj\.bias is not zero"):
        open_tensors(tmp_path)


@pytest.mark.parametrize("name", ["mlp.experts.1.up_proj.qbits", "mlp.experts.9.up_proj.bias"])
def test_other_tensors_are_not_passed_by(tmp_path: Path, name: str) -> None:
    with_tensors(tmp_path, {f"model.layers.0.{name}": torch.zeros(64)})
    with pytest.raises(UnsupportedModelError, match="1 tensors that a qwen3_moe does not have"):
        open_tensors(tmp_path)


def test_scales_of_activations_are_passed_by(tmp_path: Path) -> None:
    with_tensors(tmp_path, {"model.layers.0.self_attn.k_scale": torch.ones(1)})
    open_tensors(tmp_path)


# Shards

SHARDINGS: Mapping[str, Callable[[str], str]] = {
    "codes apart from scales": lambda name: f"model-{name.rpartition('.')[2]}.safetensors",
    "a shard each": lambda name: f"{name}.safetensors",
}


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_every_shard_of_packed_weights_is_fetched_and_released_once(
    tmp_path: Path, sharding: str
) -> None:
    tensors, shard_of = load_file(GPTQ / "model.safetensors"), SHARDINGS[sharding]
    weight_map = {name: shard_of(name) for name in tensors}
    cut = tmp_path / "shards"
    cut.mkdir()
    shutil.copy(GPTQ / "config.json", cut)
    names = sorted(set(weight_map.values()))
    for shard in names:
        save_file({n: t for n, t in tensors.items() if weight_map[n] == shard}, cut / shard)
    (cut / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    shards, options = CountingShards(cut), Options(lengths=(9,))
    convert(cut, tmp_path / "of shards", options, shards=shards)
    assert sorted(shards.fetched) == names
    assert sorted(shards.released) == names
    convert(GPTQ, tmp_path / "of one", options)
    planes = {n: b for n, b in contents(tmp_path / "of one").items() if n.endswith(".safetensors")}
    assert planes.items() <= contents(tmp_path / "of shards").items()
