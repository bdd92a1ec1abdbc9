"""What would be in a config.json, out of a GGUF file's header: an architecture, a function each.

Knows:        llama.cpp's keys, and constants that its code has instead of keys.
Ignorant of:  where tensors lie.

Source: llama.cpp's conversion/, which wrote the keys, and src/models/, which reads them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lowmoe.errors import UnsupportedModelError
from lowmoe.families.gguf.model import EMBEDDING, HEAD, GgufModel
from lowmoe.families.gguf.rope import rope_parameters

_SOFTMAX, _SIGMOID = 1, 2
_CONTROL = 3  # a kind of tokens
# Control tokens that end an answer, whatever key a file has for them; llama.cpp looks for them too.
_ENDS = frozenset(
    ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end_of_text|>", "<|endoftext|>", "<|return|>")
)

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


def _usual(m: GgufModel, model_type: str, *, theta: float = 1e4) -> dict[str, Any]:
    """What all have but their feed-forwards.  theta: as llama.cpp where the file does not say."""
    n_hidden, n_heads = m.integer("embedding_length"), m.integer("attention.head_count")
    head_size = m.integer("attention.key_length", n_hidden // max(1, n_heads))
    value_size = m.integer("attention.value_length", head_size)
    if value_size != head_size:
        raise UnsupportedModelError(
            f"GGUF: keys of {head_size} channels and values of {value_size} are not implemented "
            f"for a {m.architecture}. This model cannot run here yet."
        )
    return _shape(m, model_type) | {
        "num_key_value_heads": m.integer("attention.head_count_kv", n_heads),
        "head_dim": head_size,
        "rope_parameters": rope_parameters(m, theta=theta, head_size=head_size),
        "attention_bias": "blk.0.attn_q.bias" in m.shapes or "blk.0.attn_qkv.bias" in m.shapes,
    }


def _shape(m: GgufModel, model_type: str) -> dict[str, Any]:
    epsilon = "attention.layer_norm_rms_epsilon"
    if not m.has(epsilon):
        epsilon = "attention.layer_norm_epsilon"
    return {
        "model_type": model_type,
        "vocab_size": m.shapes[EMBEDDING][0],
        "hidden_size": m.integer("embedding_length"),
        "num_hidden_layers": m.n_layers(),
        "num_attention_heads": m.integer("attention.head_count"),
        "max_position_embeddings": m.integer("context_length"),
        "rms_norm_eps": m.number(epsilon),
        "tie_word_embeddings": HEAD not in m.shapes,
        "eos_token_id": _end_ids(m),
    }


def _end_ids(m: GgufModel) -> list[int]:
    ids = m.token_ids("eos", "eot", "eom")
    tokens = m.values.get("tokenizer.ggml.tokens")
    kinds: list[int] = getattr(m.values.get("tokenizer.ggml.token_type"), "tolist", list)()
    if not isinstance(tokens, Sequence):
        return ids
    ids += [
        i
        for i, (token, kind) in enumerate(zip(tokens, kinds, strict=False))
        if kind == _CONTROL and token in _ENDS
    ]
    return sorted(set(ids))


# --- dense


def _plain(m: GgufModel, model_type: str) -> dict[str, Any]:
    return _usual(m, model_type) | {"intermediate_size": m.integer("feed_forward_length")}


def _llama(m: GgufModel) -> dict[str, Any]:
    """And Mistral's models, of the same architecture there, with experts or without."""
    if m.integer("expert_count", 0) == 0:
        return _plain(m, "llama")
    return _plain(m, "mixtral") | _experts(m, "num_local_experts")


def _first_qwen(m: GgufModel) -> dict[str, Any]:
    usual = _usual(m, "qwen")
    return usual | {
        "intermediate_size": m.integer("feed_forward_length"),
        "rotary_emb_base": usual["rope_parameters"]["rope_theta"],
        "seq_length": usual["max_position_embeddings"],
        "layer_norm_epsilon": usual["rms_norm_eps"],
        "no_bias": True,
    }


# --- experts


def _experts(m: GgufModel, count: str) -> dict[str, Any]:
    return {
        count: m.n_experts(),
        "num_experts_per_tok": m.integer("expert_used_count"),
    }


def _of_own_size(m: GgufModel) -> dict[str, Any]:
    """Experts of a size of their own beside dense feed-forwards of another."""
    return {
        "intermediate_size": m.integer("feed_forward_length"),
        "moe_intermediate_size": m.columns("ffn_down_exps"),
    }


def _qwen2_moe(m: GgufModel) -> dict[str, Any]:
    found = _usual(m, "qwen2_moe") | _experts(m, "num_experts") | _of_own_size(m)
    shared = m.columns("ffn_down_shexp")
    return found | {"shared_expert_intermediate_size": shared, "norm_topk_prob": False}


def _qwen3_moe(m: GgufModel) -> dict[str, Any]:
    found = _usual(m, "qwen3_moe") | _experts(m, "num_experts") | _of_own_size(m)
    return found | {"norm_topk_prob": True}


def _olmoe(m: GgufModel) -> dict[str, Any]:
    found = _usual(m, "olmoe") | _experts(m, "num_experts")
    return found | {"intermediate_size": m.columns("ffn_down_exps"), "norm_topk_prob": False}


def _gpt_oss(m: GgufModel) -> dict[str, Any]:
    found = _usual(m, "gpt_oss", theta=150_000.0) | _experts(m, "num_local_experts")
    # Its makers do not round the ends of YaRN's ramp; llama.cpp does, for all models.
    rope = found["rope_parameters"]
    if rope["rope_type"] == "yarn":
        rope["truncate"] = False
    return found | {
        "intermediate_size": m.columns("ffn_down_exps"),
        "sliding_window": m.integer("attention.sliding_window"),
    }


def _granite_moe(m: GgufModel) -> dict[str, Any]:
    found = _usual(m, "granitemoe") | _experts(m, "num_local_experts")
    return found | {
        "intermediate_size": m.columns("ffn_down_exps"),
        "attention_multiplier": m.number("attention.scale", found["head_dim"] ** -0.5),
        "embedding_multiplier": m.number("embedding_scale", 1.0),
        "residual_multiplier": m.number("residual_scale", 1.0),
        "logits_scaling": m.number("logit_scale"),
    }


def _hunyuan_moe(m: GgufModel) -> dict[str, Any]:
    found = _usual(m, "hunyuan_v1_moe")
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
        _usual(m, "ernie4_5_moe")
        | _of_own_size(m)
        | {
            "moe_num_experts": m.n_experts(),
            "moe_k": m.integer("expert_used_count"),
            "moe_num_shared_experts": n_shared,
            "moe_layer_interval": m.integer("interleave_moe_layer_step", 1),
            "moe_layer_start_index": m.integer("leading_dense_block_count", 0),
        }
    )


def _minimax_m2(m: GgufModel) -> dict[str, Any]:
    _require_gating(m, _SIGMOID)
    found = _usual(m, "minimax_m2") | _experts(m, "num_local_experts")
    return found | {
        "intermediate_size": m.columns("ffn_down_exps"),
        "rotary_dim": m.integer("rope.dimension_count", found["head_dim"]),
    }


def _phi_moe(m: GgufModel) -> dict[str, Any]:
    found = _plain(m, "phimoe") | _experts(m, "num_local_experts")
    window = m.integer("attention.sliding_window", 0)
    return found | {
        "sliding_window": window or None,
        "lm_head_bias": "output.bias" in m.shapes,
    }


def _dbrx(m: GgufModel) -> dict[str, Any]:
    usual = _usual(m, "dbrx")
    attention = {
        "kv_n_heads": usual["num_key_value_heads"],
        "clip_qkv": m.number("attention.clamp_kqv") if m.has("attention.clamp_kqv") else None,
    }
    feed_forward = {
        "ffn_hidden_size": m.integer("feed_forward_length"),
        "moe_num_experts": m.n_experts(),
        "moe_top_k": m.integer("expert_used_count"),
    }
    return {
        "model_type": "dbrx",
        "d_model": usual["hidden_size"],
        "n_heads": usual["num_attention_heads"],
        "n_layers": usual["num_hidden_layers"],
        "max_seq_len": usual["max_position_embeddings"],
        "attn_config": attention,
        "ffn_config": feed_forward,
        **{key: usual[key] for key in ("vocab_size", "tie_word_embeddings", "eos_token_id")},
        "rope_parameters": usual["rope_parameters"],
    }


def _llama4(m: GgufModel) -> dict[str, Any]:
    n_experts = m.n_experts()
    found = _usual(m, "llama4_text") | _experts(m, "num_local_experts")
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


# --- experts by sigmoid, in groups


def _grouped(m: GgufModel) -> dict[str, Any]:
    found = _experts(m, "n_routed_experts") | _of_own_size(m)
    return found | {
        "n_shared_experts": m.integer("expert_shared_count"),
        "first_k_dense_replace": m.integer("leading_dense_block_count", 0),
        "n_group": max(1, m.integer("expert_group_count", 1)),
        "topk_group": max(1, m.integer("expert_group_used_count", 1)),
        "norm_topk_prob": m.truth("expert_weights_norm", default=False),
        # Where the key is absent or 0, nothing is scaled.
        "routed_scaling_factor": m.number("expert_weights_scale", 1.0) or 1.0,
    }


def _dots1(m: GgufModel) -> dict[str, Any]:
    _require_gating(m, _SIGMOID)
    return _usual(m, "dots1") | _grouped(m)


def _glm4_moe(m: GgufModel) -> dict[str, Any]:
    _require_gating(m, _SIGMOID)
    normed = "blk.0.attn_q_norm.weight" in m.shapes
    return _usual(m, "glm4_moe") | _grouped(m) | {"use_qk_norm": normed}


def _deepseek2(m: GgufModel) -> dict[str, Any]:
    """V3, R1, Kimi-K2 and GLM-4.7-Flash, all one model here; V2 chooses its experts by softmax."""
    # Files older than the key: of V2, or of GLM-4.7-Flash, which has a bias for the choice.
    biased = any(name.endswith(".exp_probs_b.bias") for name in m.shapes)
    gating = m.integer("expert_gating_func", _SIGMOID if biased else _SOFTMAX)
    turning = m.integer("rope.dimension_count")
    key_size = m.integer("attention.key_length_mla", m.integer("attention.key_length"))
    value_size = m.integer("attention.value_length_mla", m.integer("attention.value_length"))
    ranked = m.has("attention.q_lora_rank")
    return (
        _shape(m, "deepseek_v2" if gating == _SOFTMAX else "deepseek_v3")
        | _grouped(m)
        | {
            "num_key_value_heads": m.integer("attention.head_count"),
            "q_lora_rank": m.integer("attention.q_lora_rank") if ranked else None,
            "kv_lora_rank": m.integer("attention.kv_lora_rank"),
            "qk_rope_head_dim": turning,
            "qk_nope_head_dim": key_size - turning,
            "v_head_dim": value_size,
            "rope_parameters": rope_parameters(m, theta=1e4, head_size=turning),
        }
    )


def _require_gating(m: GgufModel, wanted: int) -> None:
    found = m.integer("expert_gating_func", wanted)
    if found != wanted:
        raise UnsupportedModelError(
            f"GGUF: {m.key('expert_gating_func')} is {found}, but a {m.architecture} is "
            f"implemented with {wanted} alone (1 softmax, 2 sigmoid)."
        )


ARCHITECTURES: Mapping[str, Callable[[GgufModel], dict[str, Any]]] = {
    "dbrx": _dbrx,
    "deepseek2": _deepseek2,
    "dots1": _dots1,
    "ernie4_5-moe": _ernie_moe,
    "glm4moe": _glm4_moe,
    "gpt-oss": _gpt_oss,
    "granitemoe": _granite_moe,
    "hunyuan-moe": _hunyuan_moe,
    "llama": _llama,
    "llama4": _llama4,
    "minimax-m2": _minimax_m2,
    "olmoe": _olmoe,
    "phimoe": _phi_moe,
    "qwen": _first_qwen,
    "qwen2": lambda m: _plain(m, "qwen2"),
    "qwen2moe": _qwen2_moe,
    "qwen3moe": _qwen3_moe,
}
