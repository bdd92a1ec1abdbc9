"""DBRX: layer norms without bias, clamped queries, keys and values, experts stacked by rows.

Source: databricks/dbrx; transformers' DbrxForCausalLM, which does not read rope_theta where the
published files have it.
"""

from dataclasses import replace
from typing import Any

from lowmoe.errors import CheckpointError
from lowmoe.families.reading import read_attention, read_model
from lowmoe.families.rope import rope_values
from lowmoe.spec import ExpertsFeedForward, HfConfig, ModelSpec, SoftmaxRouter, Stored

_BLOCK = "transformer.blocks.{layer}."
_ATTENTION = _BLOCK + "norm_attn_norm."
_EXPERTS = _BLOCK + "ffn.experts.mlp."
_QKV = Stored(name=_ATTENTION + "attn.Wqkv.weight", holds=("q", "k", "v"))

_POWER = "moe_normalize_expert_weights"

NAMES = {
    "embedding": "transformer.wte.weight",
    "final_norm": "transformer.norm_f.weight",
    "head": "lm_head.weight",
    "attention_norm": _ATTENTION + "norm_1.weight",
    **dict.fromkeys(_QKV.holds, _QKV),
    "attention_out": _ATTENTION + "attn.out_proj.weight",
    "experts_norm": _ATTENTION + "norm_2.weight",
    "router": _BLOCK + "ffn.router.layer.weight",
    "gate": Stored(name=_EXPERTS + "w1", experts="rows"),
    "up": Stored(name=_EXPERTS + "v1", experts="rows"),
    "down": Stored(name=_EXPERTS + "w2", experts="rows", transposed=True),
}


def spec(hf: HfConfig) -> ModelSpec:
    """The model that a DBRX's config.json describes."""
    attn, ffn = _table(hf, "attn_config"), _table(hf, "ffn_config")
    HfConfig({"act": ffn.values.get("ffn_act_fn")}).require("act", {"name": "silu"}, None)
    power = ffn.values.get(_POWER, 1)  # which sum of the weights is made 1
    HfConfig({_POWER: power}).require(_POWER, 1, 1.0)
    # The keys that everybody else uses, for those that this family has of its own.
    usual: dict[str, Any] = {
        **hf.values,
        "hidden_size": hf.integer("d_model"),
        "num_attention_heads": hf.integer("n_heads"),
        "num_hidden_layers": hf.integer("n_layers"),
        "num_key_value_heads": attn.integer("kv_n_heads"),
        "max_position_embeddings": hf.integer("max_seq_len"),
    }
    clamp = None if attn.values.get("clip_qkv") is None else attn.number("clip_qkv")
    if "rope_theta" in attn.values:
        HfConfig(rope_values(hf)).require("rope_type", "default", None)
        usual |= {"rope_theta": attn.number("rope_theta"), "rope_parameters": None}
    attention = read_attention(HfConfig(usual), theta=1e4, clamp=clamp)
    n_experts = ffn.integer("moe_num_experts")
    experts = ExpertsFeedForward(
        n_experts=n_experts,
        n_inner=ffn.integer("ffn_hidden_size"),
        router=SoftmaxRouter(
            n_active=ffn.integer("moe_top_k", maximum=n_experts), renormalize=True
        ),
    )
    model = read_model(HfConfig(usual), attention, experts, norm_epsilon=1e-5)
    return replace(model, norm="layer")


def _table(hf: HfConfig, key: str) -> HfConfig:
    values = hf.values.get(key)
    if not isinstance(values, dict):
        raise CheckpointError(f"config.json: {key} is {values!r}, but must be a table.")
    return HfConfig(values)
