"""GGUF files of models most of whose layers keep a state: Qwen3-Next, Qwen3.5 MoE, MiniMax-01.

Knows:        llama.cpp's keys of them.
Ignorant of:  where tensors lie.
"""

from typing import Any

from lowmoe.errors import CheckpointError
from lowmoe.families.gguf.model import GgufModel
from lowmoe.families.gguf.usual import experts, usual


def qwen3_next(m: GgufModel) -> dict[str, Any]:
    """Qwen3-Next and Qwen3-Coder-Next."""
    return _with_delta_nets(m, "qwen3_next") | {"norm_topk_prob": True}


def qwen35_moe(m: GgufModel) -> dict[str, Any]:
    """Qwen3.5 and 3.6 MoE; every token of a text has one position in all three sections."""
    return _with_delta_nets(m, "qwen3_5_moe_text")


def _with_delta_nets(m: GgufModel, model_type: str) -> dict[str, Any]:
    n_heads, n_values = m.integer("ssm.time_step_rank"), m.integer("ssm.inner_size")
    if n_heads == 0 or n_values % n_heads:
        raise CheckpointError(
            f"GGUF: {m.key('ssm.inner_size')} is {n_values}, but must divide into the {n_heads} "
            f"heads of {m.key('ssm.time_step_rank')}. The file is damaged; download it again."
        )
    n_inner = m.columns("ffn_down_exps")
    found = usual(m, model_type) | experts(m, "num_experts")
    return found | {
        "attention_bias": False,  # the first layer's is no attention of that kind
        # Of layers without experts, which no such file has.
        "intermediate_size": m.integer("feed_forward_length", n_inner),
        "moe_intermediate_size": n_inner,
        "shared_expert_intermediate_size": m.columns("ffn_down_shexp"),
        "linear_num_key_heads": m.integer("ssm.group_count"),
        "linear_num_value_heads": n_heads,
        "linear_key_head_dim": m.integer("ssm.state_size"),
        "linear_value_head_dim": n_values // n_heads,
        "linear_conv_kernel_dim": m.integer("ssm.conv_kernel"),
        "layer_types": _layer_types(m, found["num_hidden_layers"], interval=4),
    }


def minimax_01(m: GgufModel) -> dict[str, Any]:
    """MiniMax-Text-01 and M1, of which the file keeps one factor for all sums; the other is 1."""
    found = usual(m, "minimax") | experts(m, "num_local_experts")
    factor = m.number("residual_scale")
    return found | {
        "intermediate_size": m.integer("feed_forward_length"),
        "rotary_dim": m.integer("rope.dimension_count", found["head_dim"]),
        "layer_types": _layer_types(m, found["num_hidden_layers"], interval=8),
        **{f"{kind}_alpha_factor": factor for kind in ("linear_attn", "full_attn", "mlp")},
    }


def _layer_types(m: GgufModel, n_layers: int, *, interval: int) -> list[str]:
    """Which layers keep a state.  interval: of those that do not, where the file does not say."""
    recurrent = m.flags("attention.recurrent_layers")
    if recurrent is None:
        every = m.integer("full_attention_interval", interval)
        recurrent = [not every or (i + 1) % every != 0 for i in range(n_layers)]
    if len(recurrent) < n_layers:
        raise CheckpointError(
            f"GGUF: {m.key('attention.recurrent_layers')} lists {len(recurrent)} layers, but there "
            f"are {n_layers}. The file is damaged; download it again."
        )
    return [("full_attention", "linear_attention")[flag] for flag in recurrent[:n_layers]]
