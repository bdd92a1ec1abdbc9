"""What would be in a config.json, out of a GGUF file's header: an architecture, a function each.

Knows:        llama.cpp's keys, and constants that its code has instead of keys.
Ignorant of:  where tensors lie.

Source: llama.cpp's conversion/, which wrote the keys, and src/models/, which reads them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lowmoe.errors import UnsupportedModelError
from lowmoe.families.gguf.grouped import deepseek2, deepseek32, dots1, glm4_moe
from lowmoe.families.gguf.model import EMBEDDING, GgufModel
from lowmoe.families.gguf.recurrent import minimax_01, qwen3_next, qwen35_moe
from lowmoe.families.gguf.usual import SIGMOID, experts, of_own_size, require_gating, shape, usual

# What llama.cpp reads of some or all architectures, and the values of it that change nothing.
_NEUTRAL: Mapping[str, Sequence[float]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.scale": (0,),
    "attention.temperature_length": (0,),
    "attn_logit_softcapping": (0,),
    "embedding_scale": (0, 1),
    "expert_group_count": (0, 1),
    "expert_weights_scale": (0, 1),
    "final_logit_softcapping": (0,),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "rope.scaling.attn_factor": (0, 1),
    "rope.scaling.yarn_attn_factor": (1,),
    "rope.scaling.yarn_ext_factor": (-1, 1),
    "router_logit_softcapping": (0,),
    "use_parallel_residual": (False,),
}


def config_of(m: GgufModel) -> dict[str, Any]:
    """Raises UnsupportedModelError for an architecture that is not here."""
    make = ARCHITECTURES.get(m.architecture)
    if make is None:
        raise UnsupportedModelError(
            f"GGUF: general.architecture is {m.architecture[:40]!r}, but implemented are "
            f"{', '.join(sorted(ARCHITECTURES))}."
        )
    if EMBEDDING not in m.shapes:
        raise UnsupportedModelError(
            f"GGUF: there is no tensor {EMBEDDING}; the file holds a vocabulary, an adapter or a "
            "part of a model. Give the model itself."
        )
    made = make(m)
    m.require_neutral(_NEUTRAL)
    return made


# --- dense


def _plain(m: GgufModel, model_type: str) -> dict[str, Any]:
    return usual(m, model_type) | {"intermediate_size": m.integer("feed_forward_length")}


def _llama(m: GgufModel) -> dict[str, Any]:
    """And Mistral's models, of the same architecture there, with experts or without."""
    if m.integer("expert_count", 0) == 0:
        return _plain(m, "llama")
    return _plain(m, "mixtral") | experts(m, "num_local_experts")


def _first_qwen(m: GgufModel) -> dict[str, Any]:
    found = usual(m, "qwen")
    return found | {
        "intermediate_size": m.integer("feed_forward_length"),
        "rotary_emb_base": found["rope_parameters"]["rope_theta"],
        "seq_length": found["max_position_embeddings"],
        "layer_norm_epsilon": found["rms_norm_eps"],
        "no_bias": True,
    }


def _gpt2(m: GgufModel) -> dict[str, Any]:
    found = shape(m, "gpt2")
    return found | {
        "n_embd": found["hidden_size"],
        "n_head": found["num_attention_heads"],
        "n_layer": found["num_hidden_layers"],
        "n_positions": found["max_position_embeddings"],
        "n_inner": m.columns("ffn_down"),  # the key says four times n_embd, whatever it is
        "layer_norm_epsilon": found["rms_norm_eps"],
    }


# --- experts


def _qwen2_moe(m: GgufModel) -> dict[str, Any]:
    found = usual(m, "qwen2_moe") | experts(m, "num_experts") | of_own_size(m)
    shared = m.columns("ffn_down_shexp")
    return found | {"shared_expert_intermediate_size": shared, "norm_topk_prob": False}


def _qwen3_moe(m: GgufModel) -> dict[str, Any]:
    found = usual(m, "qwen3_moe") | experts(m, "num_experts") | of_own_size(m)
    return found | {"norm_topk_prob": True}


def _olmoe(m: GgufModel) -> dict[str, Any]:
    found = usual(m, "olmoe") | experts(m, "num_experts")
    return found | {"intermediate_size": m.columns("ffn_down_exps"), "norm_topk_prob": False}


def _gpt_oss(m: GgufModel) -> dict[str, Any]:
    found = usual(m, "gpt_oss", theta=150_000.0) | experts(m, "num_local_experts")
    # Its makers do not round the ends of YaRN's ramp; llama.cpp does, for all models.
    rope = found["rope_parameters"]
    if rope["rope_type"] == "yarn":
        rope["truncate"] = False
    return found | {
        "intermediate_size": m.columns("ffn_down_exps"),
        "sliding_window": m.integer("attention.sliding_window"),
    }


def _granite_moe(m: GgufModel) -> dict[str, Any]:
    found = usual(m, "granitemoe") | experts(m, "num_local_experts")
    return found | {
        "intermediate_size": m.columns("ffn_down_exps"),
        "attention_multiplier": m.number("attention.scale", found["head_dim"] ** -0.5),
        "embedding_multiplier": m.number("embedding_scale", 1.0),
        "residual_multiplier": m.number("residual_scale", 1.0),
        "logits_scaling": m.number("logit_scale"),
    }


def _hunyuan_moe(m: GgufModel) -> dict[str, Any]:
    found = usual(m, "hunyuan_v1_moe")
    n_inner, shared = m.columns("ffn_down_exps"), m.columns("ffn_down_shexp")
    return found | {
        "intermediate_size": n_inner,
        "moe_intermediate_size": shared,  # refused unless it is the same
        "num_experts": m.n_experts(),
        "moe_topk": m.integer("expert_used_count"),
    }


def _ernie_moe(m: GgufModel) -> dict[str, Any]:
    n_shared = m.integer("expert_shared_count", 0)
    return (
        usual(m, "ernie4_5_moe")
        | of_own_size(m)
        | {
            "moe_num_experts": m.n_experts(),
            "moe_k": m.integer("expert_used_count"),
            "moe_num_shared_experts": n_shared,
            "moe_layer_interval": m.integer("interleave_moe_layer_step", 1),
            "moe_layer_start_index": m.integer("leading_dense_block_count", 0),
        }
    )


def _minimax_m2(m: GgufModel) -> dict[str, Any]:
    require_gating(m, SIGMOID)
    found = usual(m, "minimax_m2") | experts(m, "num_local_experts")
    return found | {
        "intermediate_size": m.columns("ffn_down_exps"),
        "rotary_dim": m.integer("rope.dimension_count", found["head_dim"]),
    }


def _phi_moe(m: GgufModel) -> dict[str, Any]:
    found = _plain(m, "phimoe") | experts(m, "num_local_experts")
    window = m.integer("attention.sliding_window", 0)
    return found | {
        "sliding_window": window or None,
        "lm_head_bias": "output.bias" in m.shapes,
    }


def _dbrx(m: GgufModel) -> dict[str, Any]:
    found = usual(m, "dbrx")
    attention = {
        "kv_n_heads": found["num_key_value_heads"],
        "clip_qkv": m.number("attention.clamp_kqv") if m.has("attention.clamp_kqv") else None,
    }
    feed_forward = {
        "ffn_hidden_size": m.integer("feed_forward_length"),
        "moe_num_experts": m.n_experts(),
        "moe_top_k": m.integer("expert_used_count"),
    }
    return {
        "model_type": "dbrx",
        "d_model": found["hidden_size"],
        "n_heads": found["num_attention_heads"],
        "n_layers": found["num_hidden_layers"],
        "max_seq_len": found["max_position_embeddings"],
        "attn_config": attention,
        "ffn_config": feed_forward,
        **{key: found[key] for key in ("vocab_size", "tie_word_embeddings", "eos_token_id")},
        "rope_parameters": found["rope_parameters"],
    }


def _grok(m: GgufModel) -> dict[str, Any]:
    """Grok-1; keys that older files have not are as in llama.cpp, which caps no router's scores
    either, whatever the file says of them.
    """
    m.has("router_logit_softcapping")
    found = usual(m, "grok-1") | experts(m, "num_experts")
    size = m.number("attention.output_scale", found["head_dim"] ** -0.5)
    return found | {
        "intermediate_size": m.integer("feed_forward_length"),
        "attn_output_multiplier": size,
        "max_attn_value": m.number("attn_logit_softcapping", 30.0),
        "embedding_multiplier_scale": m.number("embedding_scale", 78.38367176906169),
        "output_multiplier_scale": m.number("logit_scale", 3**-0.5),
    }


def _llama4(m: GgufModel) -> dict[str, Any]:
    n_experts = m.n_experts()
    found = usual(m, "llama4_text") | experts(m, "num_local_experts")
    return found | {
        "intermediate_size": m.columns("ffn_down_exps"),
        "intermediate_size_mlp": m.integer("feed_forward_length"),
        "interleave_moe_layer_step": m.integer("interleave_moe_layer_step"),
        # None of these is kept; llama.cpp too knows Maverick by its number of experts.
        "use_qk_norm": n_experts != 128,
        "attention_chunk_size": 8192,
        "no_rope_layer_interval": 4,
        "attn_temperature_tuning": True,
        "floor_scale": 8192,
        "attn_scale": 0.1,
    }


ARCHITECTURES: Mapping[str, Callable[[GgufModel], dict[str, Any]]] = {
    "dbrx": _dbrx,
    "deepseek2": deepseek2,
    "dots1": dots1,
    "ernie4_5-moe": _ernie_moe,
    "glm4moe": glm4_moe,
    "deepseek32": deepseek32,
    "gpt-oss": _gpt_oss,
    "gpt2": _gpt2,
    "granitemoe": _granite_moe,
    "grok": _grok,
    "hunyuan-moe": _hunyuan_moe,
    "llama": _llama,
    "llama4": _llama4,
    "minimax-01": minimax_01,
    "minimax-m2": _minimax_m2,
    "olmoe": _olmoe,
    "phimoe": _phi_moe,
    "qwen": _first_qwen,
    "qwen2": lambda m: _plain(m, "qwen2"),
    "qwen2moe": _qwen2_moe,
    "qwen35moe": qwen35_moe,
    "qwen3moe": _qwen3_moe,
    "qwen3next": qwen3_next,
}
