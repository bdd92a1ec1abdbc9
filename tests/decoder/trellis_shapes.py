"""Shapes of tiny models that are worth a test of native code and of GPU kernels.

Knows:        what configs can ask for, and which of it GPU kernels are able to do.
Ignorant of:  what is done with them.
"""

from dataclasses import dataclass
from typing import Any

from lowmoe.checkpoint.layout import Recipe
from lowmoe.decoder.abilities import lacking
from lowmoe.decoder.gpu_buffers import ABLE
from lowmoe.families import read_config

LAYERS = 3
CONTEXT = 4096
MIXTRAL: dict[str, Any] = {
    "model_type": "mixtral",
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": CONTEXT,
    "rope_theta": 1e4,
    # Large enough to show: embeddings begin with a mean square of 1 / hidden_size.
    "rms_norm_eps": 1e-3,
}


TWO_PLANES = Recipe()


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What sets a model apart.

    config: keys beside or instead of those in MIXTRAL; renormalize: as if the config had said so.
    """

    config: dict[str, Any]
    recipe: Recipe = TWO_PLANES
    renormalize: bool | None = None


def planes(count: int) -> Recipe:
    return Recipe(expert_planes=count)


SMALL_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
LATENTS = {
    "q_lora_rank": 48,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
}
WAVELENGTHS = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONG = {
    "type": "longrope",
    "short_factor": [1.0, 1.1, 1.3, 1.5, 1.7, 2.0, 2.5, 3.0],
    "long_factor": [2.0] * 8,
    "short_mscale": 1.2,
    "original_max_position_embeddings": CONTEXT,
}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16}
SHAPES = {
    "4 heads of 16 over 2": Shape(config={}),
    "hidden 48, inner 40": Shape(
        config={"hidden_size": 48, "intermediate_size": 40, "head_dim": 16}, recipe=planes(3)
    ),
    "2 heads of 128 over 1": Shape(
        config={"head_dim": 128, "num_attention_heads": 2, "num_key_value_heads": 1},
        recipe=planes(1),
    ),
    "3 heads of 64 of their own, hidden 192, inner 200": Shape(
        config={
            "hidden_size": 192,
            "intermediate_size": 200,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "head_dim": 64,
        }
    ),
    "8 heads of 32 over 1, hidden 256, inner 384": Shape(
        config={
            "vocab_size": 300,
            "hidden_size": 256,
            "intermediate_size": 384,
            "num_attention_heads": 8,
            "num_key_value_heads": 1,
        },
        recipe=planes(3),
    ),
    "5 heads of 10, odd sizes": Shape(
        config={
            "hidden_size": 50,
            "intermediate_size": 33,
            "num_attention_heads": 5,
            "num_key_value_heads": 5,
        }
    ),
    "window of 7": Shape(config={"sliding_window": 7}, recipe=planes(3)),
    "top 1": Shape(config={"num_experts_per_tok": 1}, recipe=planes(1)),
    "top 4 of 8": Shape(config={"num_experts_per_tok": 4, "num_local_experts": 8}),
    "top 3 of 9, not renormalized": Shape(
        config={"num_experts_per_tok": 3, "num_local_experts": 9}, renormalize=False
    ),
    "tied head, 2 dense planes": Shape(
        config={"tie_word_embeddings": True}, recipe=Recipe(dense_planes=2, expert_planes=1)
    ),
}
# Those that ask for more than a plain decoder, see lowmoe/decoder/abilities.py, all of which native
# code is able to do.
DEMANDING_SHAPES = {
    "one expert, wavelengths": Shape(config={"model_type": "llama", "rope_scaling": WAVELENGTHS}),
    "one expert, biases everywhere, linear": Shape(
        config={
            "model_type": "llama",
            "attention_bias": True,
            "rope_scaling": {"type": "linear", "factor": 4.0},
        },
        recipe=planes(3),
    ),
    "biases, a window in the last layers, lengthening rope": Shape(
        config={
            "model_type": "qwen2",
            "rope_scaling": YARN,
            "use_sliding_window": True,
            "sliding_window": 7,
            "max_window_layers": 1,
        }
    ),
    "shared experts that weigh themselves, plain layers": Shape(
        config={
            "model_type": "qwen2_moe",
            **SMALL_EXPERTS,
            "shared_expert_intermediate_size": 80,
            "mlp_only_layers": [1],
        },
        recipe=planes(3),
    ),
    "normed heads, plain first and last": Shape(
        config={"model_type": "qwen3_moe", **SMALL_EXPERTS, "mlp_only_layers": [0, 2]}
    ),
    "half of a head turns, sigmoids in groups, biases, shared": Shape(
        config={
            "model_type": "glm4_moe",
            **SMALL_EXPERTS,
            "n_routed_experts": 8,
            "n_shared_experts": 2,
            "n_group": 4,
            "topk_group": 2,
            "use_qk_norm": True,
            "attention_bias": True,
            "first_k_dense_replace": 1,
            "routed_scaling_factor": 1.5,
        }
    ),
    "sigmoids not renormalized, no groups": Shape(
        config={
            "model_type": "dots1",
            **SMALL_EXPERTS,
            "n_routed_experts": 6,
            "norm_topk_prob": False,
            "first_k_dense_replace": 2,
        },
        recipe=planes(1),
    ),
    "all heads normed together, a quarter turns": Shape(
        config={"model_type": "minimax_m2", "head_dim": 16, "rotary_dim": 4}
    ),
    "all heads normed together, clamped": Shape(
        config={"model_type": "olmoe", "num_experts": 6, "clip_qkv": 0.9}
    ),
    "heads normed after rope, shared": Shape(
        config={"model_type": "hunyuan_v1_moe", "num_experts": 6, "moe_topk": 2}
    ),
    "softmax with a bias of the choice": Shape(
        config={
            "model_type": "ernie4_5_moe",
            "moe_num_experts": 6,
            "moe_k": 2,
            "moe_intermediate_size": 48,
            "tie_word_embeddings": False,
        }
    ),
    "sinks, biases everywhere, another activation, odd sizes": Shape(
        config={
            "model_type": "gpt_oss",
            "hidden_size": 50,
            "intermediate_size": 33,
            "head_dim": 16,
            "sliding_window": 7,
            "swiglu_limit": 1.0,
            "rope_scaling": YARN | {"truncate": False},
        },
        recipe=planes(3),
    ),
    "latents, softmax in groups, scaled, shared": Shape(
        config={
            "model_type": "deepseek_v2",
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            **LATENTS,
            "moe_intermediate_size": 48,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "n_shared_experts": 2,
            "first_k_dense_replace": 1,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 4.0,
        }
    ),
    "latents, sigmoids in groups, shared, lengthening rope": Shape(
        config={
            "model_type": "deepseek_v3",
            **SMALL_EXPERTS,
            **LATENTS,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "n_group": 4,
            "topk_group": 2,
            "first_k_dense_replace": 1,
            "rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
        },
        recipe=planes(3),
    ),
    "latents of keys alone, 12 heads, odd sizes": Shape(
        config={
            "model_type": "glm4_moe_lite",
            **SMALL_EXPERTS,
            **LATENTS,
            "num_attention_heads": 12,
            "q_lora_rank": None,
            "kv_lora_rank": 37,
            "qk_nope_head_dim": 21,
            "v_head_dim": 27,
            "n_routed_experts": 6,
            "n_shared_experts": 1,
            "first_k_dense_replace": 0,
        }
    ),
    "layer norms with biases, a sparse mixer, a head with a bias, long rope": Shape(
        config={
            "model_type": "phimoe",
            "num_local_experts": 6,
            "attention_bias": True,
            "lm_head_bias": True,
            "router_jitter_noise": 0.3,
            "rope_scaling": LONG,
        },
        recipe=planes(3),
    ),
    "layer norms without biases, clamped": Shape(
        config={
            "model_type": "dbrx",
            "d_model": 64,
            "n_heads": 4,
            "n_layers": LAYERS,
            "max_seq_len": CONTEXT,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 0.9, "rope_theta": 5e4},
            "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 6, "moe_top_k": 3},
        }
    ),
    "chunks, no rope by turns, temperatures, what experts are given is weighed": Shape(
        config={
            "model_type": "llama4_text",
            "head_dim": 16,
            "num_local_experts": 6,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 80,
            "interleave_moe_layer_step": 2,
            "no_rope_layers": [1, 0, 1],
            "attention_chunk_size": 8,
            "floor_scale": 8,
            "attn_scale": 0.5,
        },
        recipe=planes(3),
    ),
    "what two experts are given is weighed, all layers turn": Shape(
        config={
            "model_type": "llama4_text",
            "head_dim": 16,
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "no_rope_layers": [1, 1, 1],
            "use_qk_norm": False,
            "attention_chunk_size": 13,
        }
    ),
    "a router of a given spread": Shape(
        config={
            "model_type": "skywork",
            "num_experts": [6],
            "moe_2layer_gate": False,
            "moe_feature_no_mul_topk": True,
            "moe_use_logits_norm": True,
            "moe_gate_norm_std": 1.5,
        }
    ),
    "learned positions, experts without a gate, layer norms": Shape(
        config={
            "model_type": "gpt2",
            "n_embd": 64,
            "n_layer": LAYERS,
            "n_head": 4,
            "n_inner": 200,
            "n_positions": CONTEXT,
        },
        recipe=planes(3),
    ),
    "norms behind layers, capped scores": Shape(
        config={
            "model_type": "grok-1",
            "num_experts": 6,
            "embedding_multiplier_scale": 5.0,
            "output_multiplier_scale": 0.7,
            "attn_output_multiplier": 0.4,
            "max_attn_value": 1.0,
            "tie_word_embeddings": False,
        },
        recipe=planes(3),
    ),
    "delta nets on either side, gates behind attention": Shape(
        config={
            "model_type": "qwen3_next",
            **SMALL_EXPERTS,
            "head_dim": 16,
            "shared_expert_intermediate_size": 80,
            "linear_key_head_dim": 16,
            "linear_num_key_heads": 2,
            "linear_value_head_dim": 24,
            "linear_num_value_heads": 6,
            "full_attention_interval": 2,
        }
    ),
    "delta nets of odd sizes behind attention, plain in the middle": Shape(
        config={
            "model_type": "qwen3_next",
            **SMALL_EXPERTS,
            "head_dim": 16,
            "shared_expert_intermediate_size": 33,
            "linear_conv_kernel_dim": 2,
            "linear_key_head_dim": 10,
            "linear_num_key_heads": 3,
            "linear_value_head_dim": 7,
            "linear_num_value_heads": 3,
            "layer_types": ["full_attention", "linear_attention", "linear_attention"],
            "mlp_only_layers": [1],
        },
        recipe=planes(3),
    ),
    "lightning on either side, norms kept": Shape(
        config={
            "model_type": "minimax",
            "head_dim": 16,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "linear_attn_alpha_factor": 1.7,
            "linear_attn_beta_factor": 0.8,
            "full_attn_alpha_factor": 1.4,
            "full_attn_beta_factor": 1.2,
            "mlp_alpha_factor": 1.9,
            "mlp_beta_factor": 0.7,
        }
    ),
    "lightning of 3 heads of 10, odd sizes, only kept once more": Shape(
        config={
            "model_type": "minimax",
            "hidden_size": 50,
            "intermediate_size": 33,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "head_dim": 10,
            "layer_types": ["full_attention", "linear_attention", "linear_attention"],
            "linear_attn_alpha_factor": 3.5,
        },
        recipe=planes(3),
    ),
    "everything scaled": Shape(
        config={
            "model_type": "granitemoe",
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.4,
            "logits_scaling": 0.7,
        }
    ),
}
# Those of them that GPU kernels are able to do.
GPU_SHAPES = {
    name: shape
    for name, shape in DEMANDING_SHAPES.items()
    if not lacking(read_config(MIXTRAL | shape.config).spec, ABLE)
}
