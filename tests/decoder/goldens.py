"""Of each family, what its checkpoints can differ in."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny_models import TinyModel
from torch import Tensor

THETA = 10_000.0
YARN = {
    "rope_type": "yarn",
    "rope_theta": THETA,
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 4.0,
    "beta_slow": 1.0,
}
BY_WAVELENGTH = {
    "rope_type": "llama3",
    "rope_theta": THETA,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONG = {
    "rope_type": "longrope",
    "rope_theta": THETA,
    "short_factor": [1.0, 1.1, 1.3, 1.7, 2.0, 3.0],
    "long_factor": [2.0, 2.5, 3.0, 4.0, 5.0, 6.0],
    "short_mscale": 1.2,
    "long_mscale": 1.3,
    "original_max_position_embeddings": 64,
}
ALPHA = {
    "rope_type": "dynamic",
    "type": "dynamic",
    "rope_theta": THETA,
    "alpha": 1000.0,
    "factor": 1.0,
}

_MIXTRAL = {
    "4 experts, top 2": TinyModel(config={}),
    "4 experts, top 1": TinyModel(config={"num_experts_per_tok": 1}),
    "4 experts, top 3": TinyModel(config={"num_experts_per_tok": 3}),
    "8 experts, top 2": TinyModel(config={"num_local_experts": 8}),
    "8 experts, top 3, fp16, shards": TinyModel(
        config={"num_local_experts": 8, "num_experts_per_tok": 3},
        saved_dtype=torch.float16,
        shard_size="20KB",
    ),
    "tied head": TinyModel(config={"tie_word_embeddings": True}),
    "tied head, bf16, shards": TinyModel(
        config={"tie_word_embeddings": True}, saved_dtype=torch.bfloat16, shard_size="30KB"
    ),
    "3 heads of 10 over 1": TinyModel(
        config={"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 10}
    ),
    "6 heads over 3": TinyModel(config={"num_attention_heads": 6, "num_key_value_heads": 3}),
    "5 heads of their own, odd sizes": TinyModel(
        config={
            "hidden_size": 50,
            "intermediate_size": 33,
            "num_attention_heads": 5,
            "num_key_value_heads": 5,
        }
    ),
    "sliding window": TinyModel(config={"sliding_window": 7}),
    "old spelling, bf16": TinyModel(
        config={"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        saved_dtype=torch.bfloat16,
        old_spelling=True,
    ),
    "old spelling, window, shards": TinyModel(
        config={"sliding_window": 16}, shard_size="50KB", old_spelling=True
    ),
}

_SIX_HEADS = {"num_attention_heads": 6, "num_key_value_heads": 3}
_ODD = {
    "hidden_size": 50,
    "intermediate_size": 33,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
}
GROUPS_OF_V2 = {
    "topk_method": "group_limited_greedy",
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 4.0,
}
_LIGHTNING, _WHOLE = "linear_attention", "full_attention"

GOLDENS: Mapping[str, Mapping[str, TinyModel]] = {
    "dbrx": {
        "top 3 of 6": TinyModel(config={}),
        "one key-value head, clamped more": TinyModel(
            config={"attn_config": {"kv_n_heads": 1, "clip_qkv": 0.7, "rope_theta": 5e4}}
        ),
        "top 1 of 4, shards": TinyModel(
            config={
                "ffn_config": {"ffn_hidden_size": 33, "moe_num_experts": 4, "moe_top_k": 1},
                "attn_config": {"kv_n_heads": 4, "clip_qkv": 0.4, "rope_theta": 5e4},
            },
            shard_size="30KB",
        ),
    },
    "deepseek_v2": {
        "lite": TinyModel(config={"q_lora_rank": None}),
        "groups, scaled": TinyModel(config=GROUPS_OF_V2),
        "yarn, all layers of experts, shards": TinyModel(
            config={
                "rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.7},
                "first_k_dense_replace": 0,
            },
            shard_size="30KB",
        ),
    },
    "deepseek_v3": {
        "groups": TinyModel(config={}),
        "yarn": TinyModel(
            config={"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}}
        ),
        "yarn of other shares, two shared, shards": TinyModel(
            config={
                "rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.4},
                "n_shared_experts": 2,
                "routed_scaling_factor": 2.5,
            },
            shard_size="30KB",
        ),
        "queries without a latent": TinyModel(
            config={"q_lora_rank": None, "first_k_dense_replace": 0, "norm_topk_prob": False}
        ),
    },
    "deepseek_v32": {
        "as far as all are seen": TinyModel(config={}),
        "yarn": TinyModel(
            config={"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}}
        ),
        "no groups, not renormalized, shards": TinyModel(
            config={"n_group": 1, "topk_group": 1, "norm_topk_prob": False}, shard_size="30KB"
        ),
    },
    "dots1": {
        "one plain layer": TinyModel(config={}),
        "two shared, not renormalized": TinyModel(
            config={"n_shared_experts": 2, "norm_topk_prob": False, "first_k_dense_replace": 2}
        ),
        "biases, groups": TinyModel(
            config={"attention_bias": True, "n_group": 4, "topk_group": 2}, shard_size="30KB"
        ),
        "a window in the last layers": TinyModel(
            config={"sliding_window": 7, "max_window_layers": 1, "first_k_dense_replace": 0}
        ),
    },
    "ernie4_5_moe": {
        "tied": TinyModel(config={"tie_word_embeddings": True}),
        "no shared": TinyModel(config={"moe_num_shared_experts": 0, "moe_k": 3}),
        "every second layer, bf16": TinyModel(
            config={"moe_layer_interval": 2, "moe_layer_start_index": 0, **_SIX_HEADS},
            saved_dtype=torch.bfloat16,
        ),
    },
    "glm4_moe": {
        "normed heads, biases": TinyModel(config={"partial_rotary_factor": 0.5}),
        "no norms, groups": TinyModel(
            config={"use_qk_norm": False, "n_group": 4, "topk_group": 2, "n_shared_experts": 2}
        ),
        "no biases, no plain layers, scaled": TinyModel(
            config={
                "attention_bias": False,
                "first_k_dense_replace": 0,
                "routed_scaling_factor": 2.5,
                "norm_topk_prob": False,
            },
            shard_size="30KB",
        ),
    },
    "glm4_moe_lite": {
        "one plain layer": TinyModel(config={}),
        "plain in the middle, scaled": TinyModel(
            config={
                "mlp_layer_types": ["sparse", "dense", "sparse"],
                "routed_scaling_factor": 1.8,
            }
        ),
        "6 heads, groups, bf16": TinyModel(
            config={
                "num_attention_heads": 6,
                "num_key_value_heads": 6,
                "n_group": 2,
                "topk_group": 1,
            },
            saved_dtype=torch.bfloat16,
        ),
    },
    "gpt_oss": {
        "window of 7": TinyModel(config={}),
        "scaled, top 3": TinyModel(
            config={"num_experts_per_tok": 3, "rope_parameters": {**YARN, "truncate": False}}
        ),
        "all layers whole, low limit": TinyModel(
            config={"layer_types": ["full_attention"] * 3, "swiglu_limit": 0.5}, shard_size="30KB"
        ),
    },
    "gpt2": {
        "as published": TinyModel(config={}),
        "a head of its own, narrow": TinyModel(
            config={"tie_word_embeddings": False, "n_inner": 33, "n_head": 3}
        ),
        "another epsilon, fp16, shards": TinyModel(
            config={"layer_norm_epsilon": 1e-3, "n_head": 6},
            saved_dtype=torch.float16,
            shard_size="30KB",
        ),
    },
    "granitemoe": {
        "top 2 of 6": TinyModel(config={}),
        "tied": TinyModel(config={"tie_word_embeddings": True, "num_experts_per_tok": 4}),
        "biases, odd sizes": TinyModel(config={"attention_bias": True, **_ODD}),
    },
    "grok-1": {
        "tied": TinyModel(config={"tie_word_embeddings": True}),
        "capped more, top 3, shards": TinyModel(
            config={"max_attn_value": 0.7, "num_experts_per_tok": 3}, shard_size="30KB"
        ),
        "6 heads over 3, bf16": TinyModel(config=_SIX_HEADS, saved_dtype=torch.bfloat16),
    },
    "hunyuan_v1_moe": {
        "top 2 of 6": TinyModel(config={}),
        "alpha": TinyModel(config={"rope_parameters": ALPHA}),
        "lists, tied, biases": TinyModel(
            config={"moe_topk": [3, 3, 3], "tie_word_embeddings": True, "attention_bias": True}
        ),
    },
    "kimi_k2": {
        "no groups": TinyModel(config={}),
        "yarn": TinyModel(
            config={"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}}
        ),
        "all layers of experts": TinyModel(config={"first_k_dense_replace": 0}),
    },
    "llama": {
        "plain": TinyModel(config={}),
        "wavelengths": TinyModel(config={"rope_parameters": BY_WAVELENGTH}),
        "linear, tied, biases": TinyModel(
            config={
                "rope_parameters": {"rope_type": "linear", "rope_theta": THETA, "factor": 4.0},
                "tie_word_embeddings": True,
                "attention_bias": True,
            }
        ),
        "yarn, odd sizes, fp16": TinyModel(
            config={"rope_parameters": YARN, **_ODD}, saved_dtype=torch.float16
        ),
        "old spelling": TinyModel(config={}, old_spelling=True),
    },
    "llama4": {"within a model that sees": TinyModel(config={})},
    "llama4_text": {
        "experts everywhere": TinyModel(config={}),
        "every second layer, no norms": TinyModel(
            config={"interleave_moe_layer_step": 2, "use_qk_norm": False}
        ),
        "wavelengths without a ramp, top 2": TinyModel(
            config={
                "rope_parameters": {**BY_WAVELENGTH, "high_freq_factor": 1.0},
                "num_experts_per_tok": 2,
                "attn_temperature_tuning": False,
            },
            shard_size="30KB",
        ),
        "biases": TinyModel(config={"attention_bias": True, "attention_chunk_size": 16}),
    },
    "minimax": {
        "lightning on either side": TinyModel(config={}),
        "6 heads, top 3, another order, shards": TinyModel(
            config={
                "layer_types": [_WHOLE, _LIGHTNING, _LIGHTNING],
                "num_experts_per_tok": 3,
                "full_attn_beta_factor": 0.6,
                **_SIX_HEADS,
            },
            shard_size="30KB",
        ),
        "by turns, all layers alike, tied": TinyModel(
            config={
                "layer_types": None,
                "tie_word_embeddings": True,
                **dict.fromkeys(("full_attn_alpha_factor", "linear_attn_alpha_factor"), 3.5),
                **dict.fromkeys(("full_attn_beta_factor", "linear_attn_beta_factor"), 1.0),
            }
        ),
    },
    "minimax_m1": {"as its makers spell it": TinyModel(config={})},
    "minimax_m2": {
        "half turns": TinyModel(config={}),
        "a quarter turns, top 3": TinyModel(config={"rotary_dim": 4, "num_experts_per_tok": 3}),
        "all turns, 6 heads": TinyModel(config={"rotary_dim": 16, **_SIX_HEADS}, shard_size="30KB"),
    },
    "minimax_text_01": {
        "as its makers spell it": TinyModel(config={}),
        "lightning in the middle": TinyModel(
            config={"layer_types": [_WHOLE, _LIGHTNING, _WHOLE], "mlp_beta_factor": 1.3}
        ),
    },
    "mistral": {
        "plain": TinyModel(config={}),
        "window": TinyModel(config={"sliding_window": 7}),
        "3 heads of 10 over 1, bf16": TinyModel(
            config={"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 10},
            saved_dtype=torch.bfloat16,
        ),
    },
    "mixtral": _MIXTRAL,
    "olmoe": {
        "top 2 of 6": TinyModel(config={}),
        "clamped, renormalized": TinyModel(config={"clip_qkv": 0.8, "norm_topk_prob": True}),
        "biases, heads of their own": TinyModel(
            config={"attention_bias": True, "num_key_value_heads": 4}, shard_size="30KB"
        ),
    },
    "phimoe": {
        "plain rope": TinyModel(config={}),
        "long rope": TinyModel(config={"rope_parameters": LONG}),
        "no biases, wide jitter": TinyModel(
            config={"attention_bias": False, "lm_head_bias": False, "router_jitter_noise": 0.3}
        ),
    },
    "qwen": {
        "plain": TinyModel(config={}),
        "6 heads": TinyModel(config={"num_attention_heads": 6, "num_key_value_heads": 6}),
        "bf16, shards": TinyModel(config={}, saved_dtype=torch.bfloat16),
    },
    "qwen2": {
        "plain": TinyModel(config={}),
        "tied": TinyModel(config={"tie_word_embeddings": True, **_SIX_HEADS}),
        "a window in the last layers": TinyModel(
            config={"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
        ),
        "yarn": TinyModel(config={"rope_parameters": YARN}),
    },
    "qwen2_moe": {
        "experts everywhere": TinyModel(config={}),
        "a plain layer, renormalized": TinyModel(
            config={"mlp_only_layers": [1], "norm_topk_prob": True}
        ),
        "every second layer, no biases": TinyModel(
            config={"decoder_sparse_step": 2, "qkv_bias": False}, shard_size="30KB"
        ),
    },
    "qwen3_5_moe": {"within a model that sees, experts in one": TinyModel(config={})},
    "qwen3_5_moe_text": {
        "nets on either side": TinyModel(config={}),
        "3 heads of values to one of keys, top 4": TinyModel(
            config={"linear_num_value_heads": 6, "num_experts_per_tok": 4}
        ),
        "tied, half turns, bf16": TinyModel(
            config={
                "tie_word_embeddings": True,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": THETA,
                    "partial_rotary_factor": 0.5,
                },
                "layer_types": [_WHOLE, _LIGHTNING, _WHOLE],
            },
            saved_dtype=torch.bfloat16,
        ),
    },
    "qwen3_moe": {
        "experts everywhere": TinyModel(config={}),
        "plain layers, not renormalized, biases": TinyModel(
            config={"mlp_only_layers": [0, 2], "norm_topk_prob": False, "attention_bias": True}
        ),
        "window, tied, top 4": TinyModel(
            config={
                "use_sliding_window": True,
                "sliding_window": 7,
                "tie_word_embeddings": True,
                "num_experts_per_tok": 4,
            }
        ),
    },
    "qwen3_next": {
        "nets on either side": TinyModel(config={}),
        "plain in the middle, not renormalized, 3 heads of values to one": TinyModel(
            config={
                "mlp_only_layers": [1],
                "norm_topk_prob": False,
                "linear_num_value_heads": 6,
                **_SIX_HEADS,
            },
            shard_size="30KB",
        ),
        "nets first, two taps, a head of keys each": TinyModel(
            config={
                "layer_types": [_LIGHTNING, _LIGHTNING, _WHOLE],
                "linear_conv_kernel_dim": 2,
                "linear_num_key_heads": 3,
                "linear_num_value_heads": 3,
                "linear_key_head_dim": 10,
            }
        ),
        "whole in the last layers, tied": TinyModel(
            config={"layer_types": [_LIGHTNING, _WHOLE, _WHOLE], "tie_word_embeddings": True}
        ),
    },
    "skywork": {
        "spread of 1": TinyModel(config={}),
        "wider, of 4": TinyModel(config={"moe_gate_norm_std": 2.5, "num_local_experts": 4}),
        "6 heads, bf16, shards": TinyModel(
            config={"num_attention_heads": 6, "num_key_value_heads": 6, "moe_gate_norm_std": 0.6},
            saved_dtype=torch.bfloat16,
            shard_size="30KB",
        ),
    },
    "skywork_moe": {"of the other name": TinyModel(config={"moe_gate_norm_std": 1.5})},
}


def spell_as_the_family_does(folder: Path, family: str) -> None:
    """Names and config.json of a checkpoint that transformers' class of the same maths saved."""
    if family in SPELLINGS:
        SPELLINGS[family](folder)


def _rewrite(
    folder: Path,
    tensors: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    config: Callable[[dict[str, Any]], dict[str, Any]],
) -> None:
    found = load_file(folder / "model.safetensors")
    save_file({n: t.contiguous() for n, t in tensors(found).items()}, folder / "model.safetensors")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config(values)))


def _within_a_model_that_sees(folder: Path) -> None:
    vision = {"vision_model.class_embedding": torch.ones(3)}
    _rewrite(
        folder,
        lambda tensors: {f"language_model.{n}": t for n, t in tensors.items()} | vision,
        lambda values: {"model_type": "llama4", "text_config": values},
    )


def _under_its_own_name(folder: Path) -> None:
    own = {
        "model_type": "kimi_k2",
        "auto_map": {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"},
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
    }
    guessing = {"model.layers.3.embed_tokens.weight": torch.ones(3)}
    _rewrite(folder, lambda tensors: tensors | guessing, lambda values: values | own)


def _as_minimax_does(model_type: str, architecture: str) -> Callable[[Path], None]:
    kinds = {"full_attn": "full_attention", "linear_attn": "linear_attention", "mlp": "mlp"}

    def config(values: dict[str, Any]) -> dict[str, Any]:
        own = {
            f"layernorm_{ours}_{name}": values.pop(f"{theirs}_{name}_factor")
            for theirs, ours in kinds.items()
            for name in ("alpha", "beta")
        }
        own["attn_type_list"] = [int(kind == _WHOLE) for kind in values.pop("layer_types")]
        own["rope_theta"] = values.pop("rope_parameters")["rope_theta"]
        return values | own | {
            "model_type": model_type,
            "auto_map": {"AutoModelForCausalLM": f"modeling_{model_type}.{architecture}"},
            "postnorm": True,
            "rotary_dim": values["head_dim"],
            "shared_intermediate_size": 0,
        }  # fmt: skip

    def tensors(found: dict[str, Tensor]) -> dict[str, Tensor]:
        return {n: t for n, t in found.items() if not n.endswith(("_decay", "slope_rate"))}

    return lambda folder: _rewrite(folder, tensors, config)


def _experts_in_one_within_a_model_that_sees(folder: Path) -> None:
    """As Qwen/Qwen3.5-35B-A3B was published."""

    def named(found: dict[str, Tensor]) -> dict[str, Tensor]:
        kept = {n: t for n, t in found.items() if ".experts." not in n}
        for i in range(3):
            place = f"model.layers.{i}.mlp.experts."
            gate, up, down = (
                torch.stack([found[f"{place}{e}.{m}_proj.weight"] for e in range(6)])
                for m in ("gate", "up", "down")
            )
            kept[place + "gate_up_proj"] = torch.cat([gate, up], dim=1)
            kept[place + "down_proj"] = down
        inside = {n.replace("model.", "model.language_model.", 1): t for n, t in kept.items()}
        return inside | {
            "model.visual.pos_embed.weight": torch.ones(3),
            "mtp.layers.0.mlp.experts.0.up_proj.weight": torch.ones(3),
        }

    _rewrite(
        folder,
        named,
        lambda values: {
            "model_type": "qwen3_5_moe",
            "text_config": values,
            "tie_word_embeddings": values["tie_word_embeddings"],
        },
    )


def _as_the_first(folder: Path) -> None:
    """QwenLM/Qwen's names: gate and up are w2 and w1, and counted together."""

    def named(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {
            "transformer.wte.weight": tensors["model.embed_tokens.weight"],
            "transformer.ln_f.weight": tensors["model.norm.weight"],
            "lm_head.weight": tensors["lm_head.weight"],
        }
        for i in range(3):
            old, new = f"model.layers.{i}.", f"transformer.h.{i}."
            for kind in ("weight", "bias"):
                qkv = [tensors[f"{old}self_attn.{p}_proj.{kind}"] for p in "qkv"]
                found[f"{new}attn.c_attn.{kind}"] = torch.cat(qkv)
            found[f"{new}attn.c_proj.weight"] = tensors[f"{old}self_attn.o_proj.weight"]
            found[f"{new}ln_1.weight"] = tensors[f"{old}input_layernorm.weight"]
            found[f"{new}ln_2.weight"] = tensors[f"{old}post_attention_layernorm.weight"]
            for ours, theirs in (("w2", "gate_proj"), ("w1", "up_proj"), ("c_proj", "down_proj")):
                found[f"{new}mlp.{ours}.weight"] = tensors[f"{old}mlp.{theirs}.weight"]
        return found

    def config(values: dict[str, Any]) -> dict[str, Any]:
        keys = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
        return {
            **{key: values[key] for key in keys},
            "model_type": "qwen",
            "auto_map": {"AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel"},
            "intermediate_size": 2 * values["intermediate_size"],
            "layer_norm_epsilon": values["rms_norm_eps"],
            "rotary_emb_base": values["rope_parameters"]["rope_theta"],
            "seq_length": 128,
            "no_bias": True,
            "use_dynamic_ntk": True,
            "use_logn_attn": True,
        }

    _rewrite(folder, named, config)


def _with_masks_and_without_a_beginning(folder: Path) -> None:
    """As the first GPT-2 was published; those with a head of their own, as transformers saves."""
    values = json.loads((folder / "config.json").read_text())
    if not values["tie_word_embeddings"] or not (folder / "model.safetensors").is_file():
        return
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 64, 64) for i in range(3)}
    masks |= {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(3)}
    _rewrite(
        folder,
        lambda tensors: {n.removeprefix("transformer."): t for n, t in tensors.items()} | masks,
        lambda values: values,
    )


def _as_skywork(name: str) -> Callable[[Path], None]:
    """Keys of its own; tensors are called as a Mixtral's."""

    def rewrite(folder: Path) -> None:
        path = folder / "config.json"
        values = json.loads(path.read_text())
        values |= {"model_type": name, "num_experts": [values.pop("num_local_experts")]}
        del values["num_experts_per_tok"]
        values["auto_map"] = {"AutoModelForCausalLM": "modeling_skywork.SkyworkForCausalLM"}
        path.write_text(json.dumps(values))

    return rewrite


SPELLINGS: Mapping[str, Callable[[Path], None]] = {
    "gpt2": _with_masks_and_without_a_beginning,
    "kimi_k2": _under_its_own_name,
    "llama4": _within_a_model_that_sees,
    "minimax_m1": _as_minimax_does("minimax_m1", "MiniMaxM1ForCausalLM"),
    "minimax_text_01": _as_minimax_does("minimax_text_01", "MiniMaxText01ForCausalLM"),
    "qwen": _as_the_first,
    "qwen3_5_moe": _experts_in_one_within_a_model_that_sees,
    "skywork": _as_skywork("skywork"),
    "skywork_moe": _as_skywork("skywork_moe"),
}
