"""Writes a Hugging Face checkpoint as a GGUF file, as llama.cpp's converter does.

With the gguf package's writer, its names of tensors and of keys; what the converter does beyond
names is written here again, from its conversion/*.py. Files of the converter itself, of every
family here, gave the same logits.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

Config = Mapping[str, Any]
Writer = gguf.GGUFWriter
Type = gguf.GGMLQuantizationType

ARCHITECTURES = {
    "dbrx": "dbrx",
    "deepseek_v3": "deepseek2",
    "dots1": "dots1",
    "ernie4_5_moe": "ernie4_5-moe",
    "glm4_moe": "glm4moe",
    "glm4_moe_lite": "deepseek2",
    "gpt_oss": "gpt-oss",
    "granitemoe": "granitemoe",
    "hunyuan_v1_moe": "hunyuan-moe",
    "kimi_k2": "deepseek2",
    "llama": "llama",
    "llama4_text": "llama4",
    "minimax_m2": "minimax-m2",
    "mistral": "llama",
    "mixtral": "llama",
    "olmoe": "olmoe",
    "phimoe": "phimoe",
    "qwen": "qwen",
    "qwen2": "qwen2",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
}


def write_gguf(
    folder: Path,
    path: Path,
    *,
    type: Type = Type.F32,
    split: int = 0,
    more: Callable[[Writer], None] = lambda writer: None,
) -> None:
    """Write the checkpoint's model.  type: of matrices whose rows it fits; split: tensors a file;
    more: adds what else is to be in the header."""
    config = json.loads((folder / "config.json").read_text())
    architecture = ARCHITECTURES[config["model_type"]]
    writer = Writer(path, architecture, split_max_tensors=split)
    describe(writer, config)
    more(writer)
    for name, tensor in named(dict(converted(all_tensors(folder), config)), architecture):
        fits = tensor.dim() > 1 and tensor.shape[-1] % gguf.GGML_QUANT_SIZES[type][0] == 0
        kind = type if fits and "ffn_gate_inp" not in name else Type.F32
        writer.add_tensor(name, gguf.quantize(tensor.float().numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def all_tensors(folder: Path) -> dict[str, Tensor]:
    """Of all shards."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def named(tensors: Mapping[str, Tensor], architecture: str) -> Iterator[tuple[str, Tensor]]:
    """Under llama.cpp's names, as the gguf package knows them."""
    (kind,) = (k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, 10)
    for name, tensor in tensors.items():
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            assert name in (*ROPE_TENSORS, "blk"), name
        yield found or name, tensor


ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


# --- tensors


def converted(tensors: Mapping[str, Tensor], config: Config) -> Iterator[tuple[str, Tensor]]:
    """Under Hugging Face's names still, but stacked, split and turned over as there."""
    stacks: dict[str, dict[int, Tensor]] = {}
    for name, tensor in tensors.items():
        if found := re.fullmatch(r"(.*\.experts)\.(\d+)(\..*)", name):
            stacks.setdefault(found[1] + found[3], {})[int(found[2])] = tensor
        elif f"layers.{config.get('num_hidden_layers')}." not in name:  # which guesses further
            yield from _of_one(name, tensor, config)
    for name, experts in stacks.items():
        yield name, torch.stack([experts[i] for i in sorted(experts)])
    yield from _rope_tensors(config)


def _of_one(name: str, tensor: Tensor, config: Config) -> Iterator[tuple[str, Tensor]]:
    if (split := _SPLIT.get(config["model_type"])) and (found := list(split(name, tensor, config))):
        yield from found
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


_SPLIT: Mapping[str, Callable[[str, Tensor, Config], Iterator[tuple[str, Tensor]]]] = {
    "dbrx": _split_dbrx,
    "deepseek_v3": _split_latent,
    "glm4_moe_lite": _split_latent,
    "kimi_k2": _split_latent,
    "gpt_oss": _split_sinks_and_pairs,
    "granitemoe": _split_granite,
    "llama4_text": _split_halves,
}


def _rope_tensors(config: Config) -> Iterator[tuple[str, Tensor]]:
    rope = _rope(config)
    if rope.get("rope_type") == "llama3":
        yield "rope_freqs.weight", torch.tensor(llama3_factors(rope, _head_size(config)))
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


# --- the header


def _rope(config: Config) -> Config:
    found: Config = config.get("rope_parameters") or {"rope_theta": config.get("rope_theta", 1e4)}
    return found


def _head_size(config: Config) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def describe(writer: Writer, config: Config) -> None:
    """The architecture's keys."""
    writer.add_tokenizer_model("no_vocab")
    if config["model_type"] == "dbrx":
        _describe_dbrx(writer, config)
        return
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config.get("max_position_embeddings", config.get("seq_length")))
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config.get("intermediate_size_mlp", config["intermediate_size"]))
    writer.add_head_count(config["num_attention_heads"])
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", config.get("layer_norm_epsilon")))
    writer.add_vocab_size(config["vocab_size"])
    _describe_rope(writer, config)
    for key, add in _OPTIONAL.items():
        # Latents are one head of keys and values to llama.cpp.
        value = 1 if key == "num_key_value_heads" and "kv_lora_rank" in config else config.get(key)
        if value is not None:
            add(writer, value)
    if config["model_type"] in _OF_FAMILIES:
        _OF_FAMILIES[config["model_type"]](writer, config)


def _describe_rope(writer: Writer, config: Config) -> None:
    rope = _rope(config)
    theta = rope.get("rope_theta", config.get("rotary_emb_base", 1e4))
    if rope.get("alpha"):
        size = _head_size(config)
        theta *= rope["alpha"] ** (size / (size - 2))
    writer.add_rope_freq_base(theta)
    if config["model_type"] in ("llama", "mistral", "mixtral", "granitemoe", "llama4_text"):
        writer.add_rope_dimension_count(_head_size(config))
    kind = rope.get("rope_type")
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
        writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
    if kind == "longrope":
        whole = config["max_position_embeddings"] / rope["original_max_position_embeddings"]
        log = math.log(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(whole) / log))
    if kind in ("yarn", "longrope"):
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if rope.get("mscale_all_dim"):
        writer.add_rope_scaling_yarn_log_mul(0.1 * rope["mscale_all_dim"])


def _same(value: Any) -> Any:
    """Of a value that some configs have for each layer."""
    return value[0] if isinstance(value, list) else value


_OPTIONAL: Mapping[str, Callable[[Writer, Any], None]] = {
    "num_key_value_heads": lambda w, v: w.add_head_count_kv(v),
    "head_dim": lambda w, v: (w.add_key_length(v), w.add_value_length(v)),
    "num_experts": lambda w, v: w.add_expert_count(_same(v)),
    "num_local_experts": lambda w, v: w.add_expert_count(v),
    "n_routed_experts": lambda w, v: w.add_expert_count(v),
    "num_experts_per_tok": lambda w, v: w.add_expert_used_count(v),
    "moe_topk": lambda w, v: w.add_expert_used_count(_same(v)),
    "moe_intermediate_size": lambda w, v: w.add_expert_feed_forward_length(_same(v)),
    "shared_expert_intermediate_size": lambda w, v: w.add_expert_shared_feed_forward_length(v),
    "n_group": lambda w, v: w.add_expert_group_count(v),
    "topk_group": lambda w, v: w.add_expert_group_used_count(v),
    "n_shared_experts": lambda w, v: w.add_expert_shared_count(v),
    "first_k_dense_replace": lambda w, v: w.add_leading_dense_block_count(v),
    "routed_scaling_factor": lambda w, v: w.add_expert_weights_scale(v),
}


def _describe_latent(writer: Writer, config: Config) -> None:
    rank, turning = config["kv_lora_rank"], config["qk_rope_head_dim"]
    writer.add_expert_weights_norm(config["norm_topk_prob"])
    if config["q_lora_rank"] is not None:
        writer.add_q_lora_rank(config["q_lora_rank"])
    writer.add_kv_lora_rank(rank)
    writer.add_key_length(rank + turning)
    writer.add_value_length(rank)
    writer.add_key_length_mla(config["qk_nope_head_dim"] + turning)
    writer.add_value_length_mla(config["v_head_dim"])
    writer.add_rope_dimension_count(turning)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)


def _describe_grouped(writer: Writer, config: Config) -> None:
    writer.add_expert_weights_norm(config["norm_topk_prob"])
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    if config["model_type"] == "glm4_moe":
        writer.add_rope_dimension_count(_head_size(config) // 2)


def _describe_ernie(writer: Writer, config: Config) -> None:
    writer.add_expert_count(config["moe_num_experts"])
    writer.add_expert_used_count(config["moe_k"])
    writer.add_expert_shared_count(config["moe_num_shared_experts"])
    writer.add_interleave_moe_layer_step(config["moe_layer_interval"])
    writer.add_leading_dense_block_count(config["moe_layer_start_index"])
    shared = config["moe_num_shared_experts"] * config["moe_intermediate_size"]
    writer.add_expert_shared_feed_forward_length(shared)


def _describe_hunyuan(writer: Writer, config: Config) -> None:
    writer.add_expert_feed_forward_length(config["intermediate_size"])
    writer.add_expert_shared_feed_forward_length(config["intermediate_size"])


def _describe_granite(writer: Writer, config: Config) -> None:
    writer.add_attention_scale(config["attention_multiplier"])
    writer.add_embedding_scale(config["embedding_multiplier"])
    writer.add_residual_scale(config["residual_multiplier"])
    writer.add_logit_scale(config["logits_scaling"])


def _describe_gpt_oss(writer: Writer, config: Config) -> None:
    writer.add_sliding_window(config["sliding_window"])
    writer.add_expert_feed_forward_length(config["intermediate_size"])


def _describe_llama4(writer: Writer, config: Config) -> None:
    writer.add_interleave_moe_layer_step(config["interleave_moe_layer_step"])
    writer.add_expert_feed_forward_length(config["intermediate_size"])


def _describe_minimax(writer: Writer, config: Config) -> None:
    writer.add_expert_feed_forward_length(config["intermediate_size"])
    writer.add_rope_dimension_count(config["rotary_dim"])
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)


def _describe_phi(writer: Writer, config: Config) -> None:
    writer.add_sliding_window(config.get("sliding_window") or 0)
    writer.add_rope_dimension_count(_head_size(config))


def _describe_dbrx(writer: Writer, config: Config) -> None:
    attention, feed_forward = config["attn_config"], config["ffn_config"]
    writer.add_block_count(config["n_layers"])
    writer.add_context_length(config["max_seq_len"])
    writer.add_embedding_length(config["d_model"])
    writer.add_feed_forward_length(feed_forward["ffn_hidden_size"])
    writer.add_head_count(config["n_heads"])
    writer.add_head_count_kv(attention["kv_n_heads"])
    writer.add_rope_freq_base(attention["rope_theta"])
    writer.add_clamp_kqv(attention["clip_qkv"])
    writer.add_expert_count(feed_forward["moe_num_experts"])
    writer.add_expert_used_count(feed_forward["moe_top_k"])
    writer.add_layer_norm_eps(1e-5)
    writer.add_vocab_size(config["vocab_size"])


_OF_FAMILIES: Mapping[str, Callable[[Writer, Config], None]] = {
    "deepseek_v3": _describe_latent,
    "dots1": _describe_grouped,
    "ernie4_5_moe": _describe_ernie,
    "glm4_moe": _describe_grouped,
    "glm4_moe_lite": _describe_latent,
    "gpt_oss": _describe_gpt_oss,
    "granitemoe": _describe_granite,
    "hunyuan_v1_moe": _describe_hunyuan,
    "kimi_k2": _describe_latent,
    "llama4_text": _describe_llama4,
    "minimax_m2": _describe_minimax,
    "phimoe": _describe_phi,
}


def rewritten(path: Path, to: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """The same file with other tensors, {name: (array, type)}, and the header's values as before.

    change: takes the table and changes it in place.
    """
    reader = gguf.GGUFReader(path)
    writer = Writer(to, reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if not key.startswith(("GGUF.", "general.architecture")):
            writer.add_key_value(key, field.contents(), *field.types[:2])
    tensors = {t.name: (np.array(t.data), t.tensor_type) for t in reader.tensors}
    change(tensors)
    for name, (data, type) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
