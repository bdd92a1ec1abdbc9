"""Qwen3-Next, and the text of Qwen3.5 and 3.6 MoE: gated delta nets, every fourth layer attention
with a gate; a shared expert that weighs itself.

Source: transformers' Qwen3NextForCausalLM and Qwen3_5MoeForCausalLM. Norms keep their weights less
1, but for that within a delta net.
"""

from collections.abc import Mapping
from dataclasses import replace

from lowmoe.errors import CheckpointError
from lowmoe.families import qwen_moe
from lowmoe.families.names import decoder_names, expert_names
from lowmoe.families.reading import (
    epsilon,
    layer_list,
    n_layers,
    read_attention,
    read_model,
    require_plain,
)
from lowmoe.spec import (
    Attention,
    ExpertsFeedForward,
    GatedDeltaNet,
    HeadNorm,
    HfConfig,
    ModelSpec,
    SharedExpert,
    SoftmaxRouter,
    Stored,
)

_LAYER = "model.layers.{layer}."
_DELTA = _LAYER + "linear_attn."
_NORMS = ("attention_norm", "experts_norm", "final_norm", "q_norm", "k_norm")
_QUERIES = Stored(
    name=_LAYER + "self_attn.q_proj.weight", holds=("q", "attention_gate"), in_heads=True
)
# What the two generations keep alike.
_COMMON: Mapping[str, str | Stored] = {
    **decoder_names(),
    **expert_names(shared="shared_expert"),
    **{role: Stored(name=decoder_names()[role], less_one=True) for role in _NORMS},
    **dict.fromkeys(_QUERIES.holds, _QUERIES),
    "shared_router": _LAYER + "mlp.shared_expert_gate.weight",
    "delta_taps": Stored(name=_DELTA + "conv1d.weight", middle_one=True),
    "delta_decay_bias": _DELTA + "dt_bias",
    "delta_log_decay": _DELTA + "A_log",
    "delta_norm": _DELTA + "norm.weight",
    "delta_out": _DELTA + "out_proj.weight",
}
_IN = Stored(
    name=_DELTA + "in_proj_qkvz.weight",
    holds=("delta_q", "delta_k", "delta_v", "delta_gate"),
    in_heads=True,
)
_RATES = Stored(
    name=_DELTA + "in_proj_ba.weight", holds=("delta_correction", "delta_decay"), in_heads=True
)
NAMES = {**_COMMON, **dict.fromkeys(_IN.holds, _IN), **dict.fromkeys(_RATES.holds, _RATES)}

_MIXED = Stored(name=_DELTA + "in_proj_qkv.weight", holds=("delta_q", "delta_k", "delta_v"))
NAMES_OF_3_5 = {
    **_COMMON,
    **dict.fromkeys(_MIXED.holds, _MIXED),
    "delta_gate": _DELTA + "in_proj_z.weight",
    "delta_correction": _DELTA + "in_proj_b.weight",
    "delta_decay": _DELTA + "in_proj_a.weight",
}


def spec(hf: HfConfig) -> ModelSpec:
    """The model that a Qwen3-Next's config.json describes."""
    shared = SharedExpert(n_inner=hf.integer("shared_expert_intermediate_size"), weighed=True)
    return _model(hf, qwen_moe.feed_forwards(hf, shared, renormalize=True))


def spec_of_3_5(hf: HfConfig) -> ModelSpec:
    """The model that the text config of a Qwen3.5 or 3.6 MoE describes."""
    n_experts = hf.integer("num_experts")
    experts = ExpertsFeedForward(
        n_experts=n_experts,
        n_inner=hf.integer("moe_intermediate_size"),
        router=SoftmaxRouter(
            n_active=hf.integer("num_experts_per_tok", maximum=n_experts), renormalize=True
        ),
        shared=SharedExpert(n_inner=hf.integer("shared_expert_intermediate_size"), weighed=True),
    )
    return _model(hf, [experts] * n_layers(hf))


def _model(hf: HfConfig, feed_forwards: list[ExpertsFeedForward]) -> ModelSpec:
    require_plain(hf)
    hf.require("attention_bias", False, None)
    hf.require("attn_output_gate", True, None)
    eps = epsilon(hf, default=1e-6)
    return read_model(hf, _attentions(hf, eps), feed_forwards, norm_epsilon=eps)


def _attentions(hf: HfConfig, eps: float) -> list[Attention]:
    norm = HeadNorm(over="head", epsilon=eps)
    whole = read_attention(hf, theta=1e4, head_size=256, rotated=0.25, norm=norm)
    by_kind: dict[str, Attention] = {
        "full_attention": replace(whole, gated=True),
        "linear_attention": _delta(hf, eps),
    }
    kinds = layer_list(hf, "layer_types", tuple(by_kind))
    if kinds is None:
        every = hf.integer("full_attention_interval", default=4)
        names = ("linear_attention", "full_attention")
        kinds = [names[(i + 1) % every == 0] for i in range(n_layers(hf))]
    return [by_kind[kind] for kind in kinds]


def _delta(hf: HfConfig, eps: float) -> GatedDeltaNet:
    n_keys = hf.integer("linear_num_key_heads", default=16)
    n_values = hf.integer("linear_num_value_heads", default=32)
    if n_values % n_keys:
        raise CheckpointError(
            f"config.json: {n_values} heads of values over {n_keys} heads of keys, but they must "
            "divide evenly. The file is damaged."
        )
    return GatedDeltaNet(
        n_key_heads=n_keys,
        n_heads=n_values,
        key_size=hf.integer("linear_key_head_dim", default=128),
        value_size=hf.integer("linear_value_head_dim", default=128),
        n_taps=hf.integer("linear_conv_kernel_dim", default=4),
        norm_epsilon=eps,
    )
