"""Tiny checkpoints whose matrices are packed as their families' uploads are.

Knows:        which matrices uploads pack, the programs that pack them.
Ignorant of:  how we read them.
"""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny_models import TinyModel
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.integrations.finegrained_fp8 import Fp8Quantize
from transformers.integrations.mxfp4 import FP4_VALUES

from tests.checkpoint.packed_weights import compressed

FP8_BLOCK = [16, 8]  # which divides all of them, as transformers wants it
# Rows of less than a block of 64, which bitsandbytes 0.50 codes like others, its CPU kernel decodes
# to numbers three times as far from what was coded (rms of 32 columns: 0.047, ours: 0.013).
BITSANDBYTES_SIZES: dict[str, dict[str, Any]] = {
    "qwen3_next": {"shared_expert_intermediate_size": 64, "linear_value_head_dim": 16}
}


def rewrite(
    folder: Path, config: dict[str, Any], pack: Callable[[str, Tensor], dict[str, Tensor]]
) -> None:
    """Replace the tensors of a checkpoint by what each is packed into."""
    weights = load_file(folder / "model.safetensors")
    packed = {n: t for name, weight in weights.items() for n, t in pack(name, weight).items()}
    tensors = {name: tensor.contiguous() for name, tensor in packed.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": config}))


def write_mxfp4(folder: Path) -> None:
    """gpt-oss: stacks of experts, everything else in bfloat16."""
    TinyModel(config={"hidden_size": 64, "intermediate_size": 32}, saved_dtype=torch.bfloat16).save(
        folder, "gpt_oss"
    )

    def pack(name: str, weight: Tensor) -> dict[str, Tensor]:
        if not name.endswith(("gate_up_proj", "down_proj")):
            return {name: weight}
        blocks = weight.float().transpose(1, 2).unflatten(2, (-1, 32))
        power = blocks.abs().amax(-1).clamp_min(1e-9).log2().floor() - 2  # 4 to 6 at the most
        scaled = blocks / power.exp2()[..., None]
        code = (scaled[..., None] - torch.tensor(FP4_VALUES)).abs().argmin(-1).to(torch.uint8)
        both = code[..., 0::2] | (code[..., 1::2] << 4)
        return {name + "_blocks": both, name + "_scales": (power + 127).to(torch.uint8)}

    excluded = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"]
    rewrite(folder, {"quant_method": "mxfp4", "modules_to_not_convert": excluded}, pack)


def write_fp8(folder: Path) -> None:
    """DeepSeek-V3: all matrices but embeddings, head and routers, by transformers' operation."""
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "moe_intermediate_size": 32,
        "q_lora_rank": 32,
        "kv_lora_rank": 24,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
    }
    TinyModel(config=sizes, saved_dtype=torch.bfloat16).save(folder, "deepseek_v3")
    config = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        # As DeepSeek-V3.1; other scales would not survive transformers' bfloat16.
        "scale_fmt": "ue8m0",
        "weight_block_size": FP8_BLOCK,
    }
    settings = SimpleNamespace(weight_block_size=FP8_BLOCK, scale_fmt="ue8m0")
    operation = Fp8Quantize(SimpleNamespace(quantization_config=settings))

    def pack(name: str, weight: Tensor) -> dict[str, Tensor]:
        left = ("embed_tokens.weight", "lm_head.weight", "gate.weight")
        if weight.dim() < 2 or name.endswith(left):
            return {name: weight}
        packed: dict[str, Tensor] = operation.convert({name: weight})
        assert name + "_scale_inv" in packed
        return packed

    rewrite(folder, config, pack)


def write_words(folder: Path) -> None:
    """Kimi-K2-Thinking: experts alone, in words of compressed-tensors'."""
    sizes = {"hidden_size": 64, "moe_intermediate_size": 32}
    TinyModel(config=sizes, saved_dtype=torch.bfloat16).save(folder, "kimi_k2")
    config: dict[str, Any] = {}

    def pack(name: str, weight: Tensor) -> dict[str, Tensor]:
        if ".experts." not in name:
            return {name: weight}
        packed = compressed(weight, num_bits=4, type="int", strategy="group", group_size=32)
        config.update(packed.config)
        module = name.removesuffix("weight")
        return {n.replace("layer.", module): tensor for n, tensor in packed.tensors.items()}

    rewrite(folder, config, pack)
    _spell_kimi(folder)


def _spell_kimi(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "kimi_k2"}))


def write_bitsandbytes(folder: Path, family: str, **how: Any) -> Any:
    """Saved by transformers; returns its model with numbers instead of codes."""
    plain = folder / "plain"
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    TinyModel(config=sizes | BITSANDBYTES_SIZES.get(family, {})).save(plain, family)
    model: Any = AutoModelForCausalLM.from_pretrained(
        plain,
        quantization_config=BitsAndBytesConfig(**how),
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    model.save_pretrained(folder)
    return model.dequantize(dtype=torch.float32)
