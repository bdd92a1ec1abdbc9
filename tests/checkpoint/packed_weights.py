"""Weights as other programs pack them: the stored tensors, and the numbers those programs read.

Knows:        transformers, compressed-tensors and bitsandbytes as oracles.
Ignorant of:  how we read them.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from lowmoe.checkpoint.reader import Checkpoint
from lowmoe.spec import Piece

NAME = "layer.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """config: its quantization_config; tensors: what files hold; numbers: what they stand for."""

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    numbers: Tensor

    def write(self, folder: Path, name: str = "model.safetensors") -> Checkpoint:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps({"quantization_config": self.config}))
        save_file({n: t.contiguous() for n, t in self.tensors.items()}, folder / name)
        return Checkpoint(folder)


def read(
    checkpoint: Checkpoint, shape: tuple[int, ...], rows: slice | None = None, name: str = NAME
) -> Tensor:
    """Rows of the weight, all if None."""
    first, end, _ = (rows or slice(None)).indices(shape[0])
    wanted = (end - first, *shape[1:])
    if len(shape) == 3:
        assert end - first == 1
        wanted = shape[1:]
    return checkpoint.read_piece(
        Piece(
            name=name,
            shape=shape,
            first=first,
            count=end - first,
            transposed=False,
            rows=slice(0, wanted[0], 1),
            wanted=wanted,
            pairs=None,
        )
    )


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def fp8(*shape: int, block: tuple[int, int] | None, scales: torch.dtype = torch.float32) -> Packed:
    """DeepSeek-V3's: blocks, the last of which may be cut short; one scale for all without."""
    codes = (normal(*shape) * 100).to(torch.float8_e4m3fn)
    grid = () if block is None else (-(-shape[-2] // block[0]), -(-shape[-1] // block[1]))
    scale = (normal(*(() if block is None else (*shape[:-2], *grid)), seed=1) * 2).exp2().to(scales)
    sizes = None if block is None else list(block)
    numbers = _dequantize_fp8_weight(codes, scale, sizes, torch.float32)
    config = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": sizes}
    return Packed(config=config, tensors={NAME: codes, NAME + "_scale_inv": scale}, numbers=numbers)


def mxfp4(n_experts: int, n_in: int, n_out: int) -> Packed:
    """gpt-oss's."""
    random = torch.Generator().manual_seed(0)
    shape = n_experts, n_out, n_in // 32
    blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=random)
    scales = torch.randint(100, 140, shape, dtype=torch.uint8, generator=random)
    numbers = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    tensors = {NAME + "_blocks": blocks, NAME + "_scales": scales}
    return Packed(config={"quant_method": "mxfp4"}, tensors=tensors, numbers=numbers)


def compressed(
    weight: Tensor, *, format: str = "pack-quantized", shuffled: bool = False, **how: Any
) -> Packed:
    """compressed-tensors', by its own compressors.  shuffled: groups of columns out of order."""
    pytest.importorskip("compressed_tensors")  # wants Python 3.11
    from compressed_tensors import compressors
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    args, (n_out, n_in) = QuantizationArgs(**how), weight.shape
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    in_words = format == "pack-quantized"
    name = "PackedQuantizationCompressor" if in_words else "NaiveQuantizationCompressor"
    compressor = getattr(compressors, name)
    packed = compressor.compress(_parameters(weight, args), scheme)
    # It computes in the dtype of the scales: in float32, so that nothing is rounded but once.
    exact = packed | {"weight_scale": packed["weight_scale"].float()}
    numbers = compressor.decompress(exact, scheme)["weight"].float()
    if shuffled:
        # Its compressor wants groups in order: the same columns elsewhere, each with its group.
        order = torch.randperm(n_in, generator=torch.Generator().manual_seed(2))
        codes = compressors.unpack_from_int32(packed["weight_packed"], args.num_bits, (n_out, n_in))
        packed["weight_packed"] = compressors.pack_to_int32(codes[:, order], args.num_bits)
        packed["weight_g_idx"] = (order // args.group_size).to(torch.int32)
        numbers = numbers[:, order]
    config = {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": json.loads(scheme.model_dump_json())},
        "ignore": ["lm_head", "re:.*self_attn.*"],
    }
    tensors = {f"layer.{name}": tensor for name, tensor in packed.items()}
    return Packed(config=config, tensors=tensors, numbers=numbers)


def _parameters(weight: Tensor, args: Any) -> dict[str, Tensor]:
    """A weight with scales and zeros that fit it."""
    n_out, n_in = weight.shape
    if args.strategy == "block":
        a, b = args.block_structure
        padded = torch.zeros(-(-n_out // a) * a, -(-n_in // b) * b)
        padded[:n_out, :n_in] = weight.float()
        runs = padded.unflatten(1, (-1, b)).unflatten(0, (-1, a)).transpose(1, 2).flatten(2)
    else:
        runs = weight.float().view(n_out, -1, args.group_size or n_in)
    low, high = runs.amin(-1).clamp_max(0), runs.amax(-1).clamp_min(0)
    if args.strategy == "tensor":
        low, high = low.min()[None], high.max()[None]
    top = 448.0 if args.type == "float" else 2.0 ** (args.num_bits - 1)
    if args.symmetric:
        scale = torch.maximum(high, -low) / (top - 0.5 if args.type == "int" else top)
        return {"weight": weight, "weight_scale": scale.to(weight.dtype)}
    scale = ((high - low) / (2 * top - 1)).to(weight.dtype)
    zero = (-low / scale.float() - top).round().clamp(-top, top - 1).to(torch.int8)
    return {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}


def four_bits(
    *shape: int,
    table: str = "nf4",
    block: int = 64,
    nested: bool = True,
    storage: torch.dtype = torch.uint8,
) -> Packed:
    """bitsandbytes', by its own functions."""
    codes, state = bnb.quantize_4bit(
        normal(*shape), blocksize=block, compress_statistics=nested, quant_type=table,
        quant_storage=storage,
    )  # fmt: skip
    tensors = {f"{NAME}.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    return Packed(
        config={"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": table},
        tensors={NAME: codes, **tensors},
        numbers=bnb.dequantize_4bit(codes, state).float(),
    )


def eight_bits(n_out: int, n_in: int) -> Packed:
    """LLM.int8's, by bitsandbytes' own functions."""
    codes, scales, _ = bnb.int8_vectorwise_quant(normal(n_out, n_in).half())
    tensors = {
        NAME: codes,
        "layer.SCB": scales,
        "layer.weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    return Packed(
        config={"quant_method": "bitsandbytes", "load_in_8bit": True},
        tensors=tensors,
        numbers=bnb.int8_vectorwise_dequant(codes, scales),
    )


ROWS = {"num_bits": 8, "type": "int", "strategy": "channel"}
FLOATS = {"format": "float-quantized", "num_bits": 8, "type": "float"}
GROUP = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
KINDS: Mapping[str, Callable[[], Packed]] = {
    "fp8, whole blocks": lambda: fp8(64, 96, block=(32, 32)),
    "fp8, blocks cut short": lambda: fp8(70, 90, block=(32, 64)),
    "fp8, blocks of a stack": lambda: fp8(3, 40, 64, block=(32, 32)),
    "fp8, one scale": lambda: fp8(30, 50, block=None),
    "fp8, bfloat16 scales": lambda: fp8(64, 96, block=(32, 32), scales=torch.bfloat16),
    "fp8, powers of two": lambda: fp8(64, 96, block=(32, 32), scales=torch.float8_e8m0fnu),
    "mxfp4": lambda: mxfp4(3, 64, 40),
    "words, 4 bits": lambda: compressed(normal(48, 96).bfloat16(), **GROUP),
    "words, 4 bits with zeros": lambda: compressed(
        normal(48, 96).bfloat16(), **GROUP, symmetric=False
    ),
    "words, 4 bits out of order": lambda: compressed(
        normal(48, 96).bfloat16(), **GROUP, shuffled=True
    ),
    "words, 4 bits, rows of odd length": lambda: compressed(
        normal(7, 77).bfloat16(), num_bits=4, type="int", strategy="channel"
    ),
    "words, 8 bits": lambda: compressed(normal(40, 64).half(), **ROWS),
    "words, 2 bits": lambda: compressed(normal(40, 64).bfloat16(), **GROUP | {"num_bits": 2}),
    "8-bit floats, rows": lambda: compressed(
        normal(40, 64).bfloat16(), **FLOATS, strategy="channel"
    ),
    "8-bit floats, one scale": lambda: compressed(
        normal(40, 64).bfloat16(), **FLOATS, strategy="tensor"
    ),
    "8-bit floats, blocks": lambda: compressed(
        normal(40, 72).bfloat16(), **FLOATS, strategy="block", block_structure=[32, 32]
    ),
    "8-bit integers, rows": lambda: compressed(
        normal(40, 64).bfloat16(), format="int-quantized", **ROWS
    ),
    "8-bit integers with zeros": lambda: compressed(
        normal(40, 64).bfloat16(), format="int-quantized", **ROWS, symmetric=False
    ),
    "nf4": lambda: four_bits(50, 66),
    "nf4, one table": lambda: four_bits(50, 66, nested=False),
    "nf4, blocks of 128": lambda: four_bits(3, 640, block=128),
    "nf4, stored as bfloat16": lambda: four_bits(50, 64, storage=torch.bfloat16),
    "fp4": lambda: four_bits(50, 66, table="fp4"),
    "int8": lambda: eight_bits(40, 64),
}
