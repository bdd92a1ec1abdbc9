"""The tensors of a Hugging Face checkpoint, stacked, split and turned over as llama.cpp's converter
does, under Hugging Face's names still.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from tests.gguf_headers import Config, head_size, rope_of


def converted(tensors: Mapping[str, Tensor], config: Config) -> Iterator[tuple[str, Tensor]]:
    """Under Hugging Face's names still, but stacked, split and turned over as there."""
    stacks: dict[str, dict[int, Tensor]] = {}
    for name, tensor in tensors.items():
        if found := re.fullmatch(r"(.*\.experts)\.(\d+)(\..*)", name):
            stacks.setdefault(found[1] + found[3], {})[int(found[2])] = tensor
        elif f"layers.{config.get('num_hidden_layers')}." not in name:  # which guesses further
            yield from _of_one(name, tensor, config)
    for name, experts in stacks.items():
        whole = torch.stack([experts[i] for i in sorted(experts)])
        yield from _of_one(name, whole, config)
    yield from _rope_tensors(config)


def _of_one(name: str, tensor: Tensor, config: Config) -> Iterator[tuple[str, Tensor]]:
    if (split := _SPLIT.get(config["model_type"])) and (found := list(split(name, tensor, config))):
        yield from (part for part in found if part[0])
    elif config["model_type"] in _PERMUTED and re.search(r"\.[qk]_proj\.", name):
        heads = "num_attention_heads" if ".q_proj." in name else "num_key_value_heads"
        yield name, _permuted(tensor, config[heads])
    elif name.endswith("shared_expert_gate.weight"):
        yield name, tensor[0]  # as most files have it
    elif name.endswith("e_score_correction_bias"):
        yield name.replace("_correction_bias", "_correction.bias"), tensor.squeeze()
    else:
        yield name, tensor


_PERMUTED = ("llama", "mistral", "mixtral", "granitemoe")


def _permuted(rows: Tensor, n_heads: int) -> Tensor:
    """Halves that turn against each other side by side."""
    halves = rows.view(n_heads, 2, rows.shape[0] // n_heads // 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)


def _split_latent(name: str, tensor: Tensor, config: Config) -> Iterator[tuple[str, Tensor]]:
    if name.endswith("kv_b_proj.weight"):
        sizes = [config["qk_nope_head_dim"], config["v_head_dim"]]
        heads = tensor.view(config["num_attention_heads"], sum(sizes), -1)
        keys, values = heads.split(sizes, dim=1)
        yield name.replace("kv_b", "k_b"), keys.transpose(1, 2).contiguous()
        yield name.replace("kv_b", "v_b"), values.contiguous()


def _split_sinks_and_pairs(
    name: str, tensor: Tensor, config: Config
) -> Iterator[tuple[str, Tensor]]:
    if name.endswith("sinks"):
        yield name + ".weight", tensor
    if name.endswith(("gate_up_proj", "gate_up_proj_bias")):
        bias = name.endswith("bias")
        rows = tensor if bias else tensor.transpose(1, 2)
        for part, first in (("gate", 0), ("up", 1)):
            place = name.replace("gate_up_proj_bias" if bias else "gate_up_proj", f"{part}_proj")
            yield place + (".bias" if bias else ".weight"), rows[:, first::2].contiguous()
    if name.endswith("experts.down_proj"):
        yield name + ".weight", tensor.transpose(1, 2).contiguous()
    if name.endswith("down_proj_bias"):
        yield name.replace("_bias", ".bias"), tensor


def _split_halves(name: str, tensor: Tensor, config: Config) -> Iterator[tuple[str, Tensor]]:
    if name.endswith("experts.gate_up_proj"):
        gate, up = tensor.transpose(1, 2).chunk(2, dim=1)
        yield name.replace("gate_up_proj", "gate_proj.weight"), gate.contiguous()
        yield name.replace("gate_up_proj", "up_proj.weight"), up.contiguous()
    if name.endswith("experts.down_proj"):
        yield name + ".weight", tensor.transpose(1, 2).contiguous()


def _split_granite(name: str, tensor: Tensor, config: Config) -> Iterator[tuple[str, Tensor]]:
    if name.endswith("input_linear.weight"):
        layer = name.split(".")[2]
        gate, up = tensor.chunk(2, dim=1)
        yield f"model.layers.{layer}.mlp.experts.gate_proj.weight", gate.contiguous()
        yield f"model.layers.{layer}.mlp.experts.up_proj.weight", up.contiguous()


def _split_dbrx(name: str, tensor: Tensor, config: Config) -> Iterator[tuple[str, Tensor]]:
    if ".ffn.experts.mlp." in name:
        n_experts = config["ffn_config"]["moe_num_experts"]
        experts = tensor.view(n_experts, -1, tensor.shape[-1])
        turned = experts.transpose(1, 2).contiguous() if name.endswith("w2") else experts
        yield name + ".weight", turned


def _turn_conv1d(name: str, tensor: Tensor, config: Config) -> Iterator[tuple[str, Tensor]]:
    """GPT-2's, whose names may lack their beginning; masks are left out."""
    if name.endswith((".attn.bias", ".masked_bias")):
        yield "", tensor
        return
    turned = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
    begun = name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
    yield begun, tensor.T.contiguous() if turned else tensor


_OF_GROK = {
    "attn.q_proj.": "multi_head_attention.query.",
    "attn.k_proj.": "multi_head_attention.key.",
    "attn.v_proj.": "multi_head_attention.value.",
    "attn.o_proj.": "multi_head_attention.linear.",
    "moe_block.experts.": "moe.",
    "moe_block.gate.": "router.",
    "pre_attn_norm.scale": "rms_norm.weight",
    "post_attn_norm.scale": "rms_norm_1.weight",
    "pre_moe_norm.scale": "rms_norm_2.weight",
    "post_moe_norm.scale": "rms_norm_3.weight",
}


def _as_xai_calls_them(name: str, tensor: Tensor, config: Config) -> Iterator[tuple[str, Tensor]]:
    """Under the names that the converter reads, those of another port of Grok-1."""
    if name == "model.norm.scale":
        yield "transformer.rms_norm.weight", tensor
    for ours, theirs in _OF_GROK.items():
        place = name.replace("model.layers.", "transformer.decoder_layer.")
        if ours in name:
            yield place.replace(ours, theirs), tensor


def _split_delta(name: str, tensor: Tensor, config: Config) -> Iterator[tuple[str, Tensor]]:
    """Qwen3-Next's nets; norms are kept whole."""
    if name.endswith(".A_log"):
        yield name, -torch.exp(tensor.float())
    elif name.endswith(".dt_bias"):
        yield name.replace(".dt_bias", ".dt_proj.bias"), tensor
    elif "conv1d" in name:
        yield name, tensor.squeeze()
    elif name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight"):
        yield name, tensor.float() + 1
    elif name.endswith("in_proj_qkvz.weight"):
        n, key = config["linear_num_key_heads"], config["linear_key_head_dim"]
        value = config["linear_value_head_dim"] * config["linear_num_value_heads"] // n
        parts = tensor.view(n, -1, tensor.shape[-1]).split([key, key, value, value], 1)
        *mixed, gate = (part.flatten(0, 1) for part in parts)
        yield name.replace("qkvz", "qkv"), torch.cat(mixed)
        yield name.replace("qkvz", "z"), gate


def _split_and_tile_delta(
    name: str, tensor: Tensor, config: Config
) -> Iterator[tuple[str, Tensor]]:
    """Qwen3.5's, whose heads of values lie one of each head of keys first."""
    n, n_values = config["linear_num_key_heads"], config["linear_num_value_heads"]

    def tiled(rows: Tensor) -> Tensor:
        heads = rows.view(n, n_values // n, rows.shape[0] // n_values, *rows.shape[1:])
        return heads.transpose(0, 1).reshape(rows.shape)

    if name.endswith(("in_proj_qkv.weight", "conv1d.weight")):
        keys = 2 * n * config["linear_key_head_dim"]
        tensor = torch.cat([tensor[:keys], tiled(tensor[keys:])])
    elif name.endswith((".A_log", ".dt_bias", "in_proj_z.weight", "_a.weight", "_b.weight")):
        tensor = tiled(tensor)
    elif name.endswith("linear_attn.out_proj.weight"):
        tensor = tiled(tensor.T.contiguous()).T.contiguous()
    yield from list(_split_delta(name, tensor, config)) or [(name, tensor)]


def _without_decays(name: str, tensor: Tensor, config: Config) -> Iterator[tuple[str, Tensor]]:
    if name.endswith(("_decay", "slope_rate")):
        yield "", tensor  # transformers keeps what it computes of the sizes


_SPLIT: Mapping[str, Callable[[str, Tensor, Config], Iterator[tuple[str, Tensor]]]] = {
    "dbrx": _split_dbrx,
    "deepseek_v2": _split_latent,
    "deepseek_v3": _split_latent,
    "glm4_moe_lite": _split_latent,
    "kimi_k2": _split_latent,
    "deepseek_v32": _split_latent,
    "gpt2": _turn_conv1d,
    "gpt_oss": _split_sinks_and_pairs,
    "granitemoe": _split_granite,
    "grok-1": _as_xai_calls_them,
    "llama4_text": _split_halves,
    "minimax": _without_decays,
    "qwen3_5_moe_text": _split_and_tile_delta,
    "qwen3_next": _split_delta,
}


def _rope_tensors(config: Config) -> Iterator[tuple[str, Tensor]]:
    rope = rope_of(config)
    if rope.get("rope_type") == "llama3":
        yield "rope_freqs.weight", torch.tensor(llama3_factors(rope, head_size(config)))
    if rope.get("rope_type") == "longrope":
        for which in ("long", "short"):
            yield f"rope_factors_{which}.weight", torch.tensor(rope[f"{which}_factor"])


def llama3_factors(rope: Config, head_size: int) -> list[float]:
    """What llama.cpp divides frequencies by, computed as its converter does."""
    low, high = (
        rope["original_max_position_embeddings"] / rope[f"{end}_freq_factor"]
        for end in ("low", "high")
    )
    found = []
    steps = torch.arange(0, head_size, 2, dtype=torch.float32) / head_size
    for frequency in 1.0 / (rope["rope_theta"] ** steps):
        wavelength = float(2 * math.pi / frequency)
        if wavelength < high:
            found.append(1.0)
        elif wavelength > low:
            found.append(rope["factor"])
        else:
            share = rope["original_max_position_embeddings"] / wavelength - rope["low_freq_factor"]
            share /= rope["high_freq_factor"] - rope["low_freq_factor"]
            found.append(1 / ((1 - share) / rope["factor"] + share))
    return found
