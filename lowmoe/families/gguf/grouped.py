"""GGUF files of models whose experts a sigmoid chooses, in groups: DeepSeek-V3 and those after it.

Knows:        llama.cpp's keys of them.
Ignorant of:  where tensors lie.
"""

from typing import Any

from lowmoe.families.gguf.model import GgufModel
from lowmoe.families.gguf.rope import rope_parameters
from lowmoe.families.gguf.usual import (
    SIGMOID,
    SOFTMAX,
    experts,
    of_own_size,
    require_gating,
    shape,
    usual,
)

# Groups, and those of them that are chosen among, of what is known by its count of experts: V2, and
# V3 with R1. Files older than the key leave them out.
_GROUPS_OF_OLDER = {("deepseek_v2", 160): (8, 3), ("deepseek_v3", 256): (8, 4)}


def _grouped(m: GgufModel) -> dict[str, Any]:
    found = experts(m, "n_routed_experts") | of_own_size(m)
    return found | {
        "n_shared_experts": m.integer("expert_shared_count"),
        "first_k_dense_replace": m.integer("leading_dense_block_count", 0),
        "n_group": max(1, m.integer("expert_group_count", 1)),
        "topk_group": max(1, m.integer("expert_group_used_count", 1)),
        "norm_topk_prob": m.truth("expert_weights_norm", default=False),
        # Where the key is absent or 0, nothing is scaled.
        "routed_scaling_factor": m.number("expert_weights_scale", 1.0) or 1.0,
    }


def dots1(m: GgufModel) -> dict[str, Any]:
    require_gating(m, SIGMOID)
    return usual(m, "dots1") | _grouped(m)


def glm4_moe(m: GgufModel) -> dict[str, Any]:
    require_gating(m, SIGMOID)
    normed = "blk.0.attn_q_norm.weight" in m.shapes
    return usual(m, "glm4_moe") | _grouped(m) | {"use_qk_norm": normed}


def deepseek2(m: GgufModel) -> dict[str, Any]:
    """V3, R1, Kimi-K2 and GLM-4.7-Flash, all one model here, and V2, which chooses by softmax."""
    # Files older than the key: of V2, or of GLM-4.7-Flash, which has a bias for the choice.
    biased = any(name.endswith(".exp_probs_b.bias") for name in m.shapes)
    gating = m.integer("expert_gating_func", 0) or (SIGMOID if biased else SOFTMAX)
    if gating not in (SOFTMAX, SIGMOID):
        require_gating(m, SOFTMAX, SIGMOID)
    found = _latent(m, "deepseek_v2" if gating == SOFTMAX else "deepseek_v3")
    groups = _GROUPS_OF_OLDER.get((found["model_type"], found["n_routed_experts"]))
    if groups and not m.has("expert_group_count"):
        found |= {"n_group": groups[0], "topk_group": groups[1]}
    if gating != SOFTMAX:
        return found
    return found | {"topk_method": ("greedy", "group_limited_greedy")[found["n_group"] > 1]}


def deepseek32(m: GgufModel) -> dict[str, Any]:
    require_gating(m, SIGMOID)
    return _latent(m, "deepseek_v32") | {"index_topk": m.integer("attention.indexer.top_k")}


def _latent(m: GgufModel, model_type: str) -> dict[str, Any]:
    turning = m.integer("rope.dimension_count")
    key_size = m.integer("attention.key_length_mla", m.integer("attention.key_length"))
    value_size = m.integer("attention.value_length_mla", m.integer("attention.value_length"))
    ranked = m.has("attention.q_lora_rank")
    return (
        shape(m, model_type)
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
