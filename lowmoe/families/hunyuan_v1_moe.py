"""Hunyuan-A13B: heads normed after rope, a shared expert as wide as the others.

Source: transformers' HunYuanMoEV1ForCausalLM. The published "dynamic" scaling with an alpha is
static: another base.
"""

from collections.abc import Mapping
from typing import Any

from lowmoe.families.names import decoder_names, dense_names, expert_names
from lowmoe.families.reading import (
    epsilon,
    read_attention,
    read_model,
    require_plain,
    uniform,
)
from lowmoe.families.rope import rope_values
from lowmoe.spec import (
    ExpertsFeedForward,
    HeadNorm,
    HfConfig,
    ModelSpec,
    SharedExpert,
    SoftmaxRouter,
)

_LAYER = "model.layers.{layer}."

NAMES = {
    **decoder_names(),
    **expert_names(),
    **dense_names("shared_", place=_LAYER + "mlp.shared_mlp."),
    "q_norm": _LAYER + "self_attn.query_layernorm.weight",
    "k_norm": _LAYER + "self_attn.key_layernorm.weight",
    "router": _LAYER + "mlp.gate.wg.weight",
}


def spec(hf: HfConfig) -> ModelSpec:
    """The model that a Hunyuan-A13B's config.json describes."""
    require_plain(hf)
    for key in ("use_cla", "use_mla"):
        hf.require(key, False, None)
    eps, n_experts, n_inner = (
        epsilon(hf, default=1e-5),
        uniform(hf, "num_experts"),
        hf.integer("intermediate_size"),
    )
    for key, wanted in (("moe_intermediate_size", n_inner), ("num_shared_expert", 1)):
        if hf.values.get(key) is not None:
            HfConfig({key: uniform(hf, key)}).require(key, wanted)
    bias = hf.boolean("attention_bias", default=False)
    attention = read_attention(
        HfConfig(_with_base(hf)),
        theta=1e4,
        norm=HeadNorm(over="head", epsilon=eps, after_rope=True),
        qkv_bias=bias,
        out_bias=bias,
    )
    experts = ExpertsFeedForward(
        n_experts=n_experts,
        n_inner=n_inner,
        router=SoftmaxRouter(n_active=uniform(hf, "moe_topk"), renormalize=True),
        shared=SharedExpert(n_inner=n_inner),
    )
    return read_model(hf, attention, experts, norm_epsilon=eps)


def _with_base(hf: HfConfig) -> Mapping[str, Any]:
    """The config with alpha multiplied into rope's base."""
    values = rope_values(hf)
    if values.get("alpha") is None:
        return hf.values
    rope = HfConfig(values)
    n_heads = hf.integer("num_attention_heads")
    size = hf.integer("head_dim", default=max(1, hf.integer("hidden_size") // n_heads))
    theta = rope.number("rope_theta", default=hf.number("rope_theta", default=1e4))
    base = theta * rope.number("alpha") ** (size / max(1, size - 2))
    return {
        **hf.values,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": base},
    }
