"""Llama 4, its text: one expert a token, chunks with rope, every fourth layer whole without.

Source: transformers' Llama4ForCausalLM. Weights multiply what experts are given.
"""

from collections.abc import Mapping
from dataclasses import replace

from lowmoe.errors import CheckpointError
from lowmoe.families.names import decoder_names, dense_names, paired_names
from lowmoe.families.reading import (
    epsilon,
    layer_list,
    n_layers,
    read_attention,
    read_model,
    require_plain,
    without_experts,
)
from lowmoe.spec import (
    ExpertsFeedForward,
    GroupedQueryAttention,
    HeadNorm,
    HfConfig,
    ModelSpec,
    QueryTemperature,
    SharedExpert,
    SigmoidRouter,
    Stored,
)

_LAYER = "model.layers.{layer}."
_FEED = _LAYER + "feed_forward."
_GATE_UP = Stored(
    name=_FEED + "experts.gate_up_proj", holds=("gate", "up"), experts="axis", transposed=True
)


NAMES: Mapping[str, str | Stored] = {
    **decoder_names(),
    **paired_names(),
    "router": _FEED + "router.weight",
    **dense_names("only_", place=_FEED),
    **dense_names("shared_", place=_FEED + "shared_expert."),
    **dict.fromkeys(_GATE_UP.holds, _GATE_UP),
    "down": Stored(name=_FEED + "experts.down_proj", experts="axis", transposed=True),
}


def spec(hf: HfConfig) -> ModelSpec:
    """The model that a Llama 4's text config describes."""
    require_plain(hf)
    eps = epsilon(hf, default=1e-5)
    return read_model(hf, _attentions(hf, eps), _feed_forwards(hf), norm_epsilon=eps)


def _attentions(hf: HfConfig, eps: float) -> list[GroupedQueryAttention]:
    normed = hf.boolean("use_qk_norm", default=True)
    bias = hf.boolean("attention_bias", default=False)
    chunked = replace(
        read_attention(hf, theta=500_000.0, head_size=128, qkv_bias=bias, out_bias=bias),
        norm=HeadNorm(over="head", epsilon=eps, after_rope=True, weighted=False)
        if normed
        else None,
        chunk=hf.optional_integer("attention_chunk_size", absent=8192),
    )
    whole = replace(chunked, rope=None, norm=None, chunk=None)
    if _is_tuned(hf):
        step, scale = hf.integer("floor_scale", default=8192), hf.number("attn_scale", default=0.1)
        whole = replace(whole, temperature=QueryTemperature(step=step, scale=scale))
    every = hf.integer("no_rope_layer_interval", default=4)
    turns = layer_list(hf, "no_rope_layers", (0, 1)) if hf.values.get("no_rope_layers") else None
    if turns is None:
        turns = [int((i + 1) % every != 0) for i in range(n_layers(hf))]
    return [chunked if turn else whole for turn in turns]


def _is_tuned(hf: HfConfig) -> bool:
    key = "attn_temperature_tuning"
    # transformers 4.51 saved a whole number, and takes any but 0 for true.
    number = hf.values.get(key)
    return number != 0 if type(number) is int else hf.boolean(key, default=True)


def _feed_forwards(hf: HfConfig) -> list[ExpertsFeedForward]:
    n_inner, n_experts = hf.integer("intermediate_size"), hf.integer("num_local_experts")
    experts = ExpertsFeedForward(
        n_experts=n_experts,
        n_inner=n_inner,
        # The sigmoids of the highest scores are the highest sigmoids.
        router=SigmoidRouter(
            n_active=hf.integer("num_experts_per_tok", default=1, maximum=n_experts),
            renormalize=False,
        ),
        shared=SharedExpert(n_inner=n_inner),
        weigh_input=True,
    )
    plain = without_experts(experts, hf.integer("intermediate_size_mlp", default=16384))
    count, step = n_layers(hf), hf.integer("interleave_moe_layer_step", default=1)
    chosen = hf.values.get("moe_layers")
    if chosen is None:
        chosen = list(range(step - 1, count, step))
    if not isinstance(chosen, list):
        raise CheckpointError(f"config.json: moe_layers is {chosen!r}, but must be a list.")
    return [experts if i in chosen else plain for i in range(count)]
