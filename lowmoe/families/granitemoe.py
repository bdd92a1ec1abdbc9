"""Granite 3 MoE: small experts, everything multiplied by constants that were chosen for training.

Source: transformers' GraniteMoeForCausalLM.
"""

from dataclasses import replace

from lowmoe.families.names import decoder_names
from lowmoe.families.reading import epsilon, read_attention, read_model, require_plain
from lowmoe.spec import ExpertsFeedForward, HfConfig, ModelSpec, SoftmaxRouter, Stored

_BLOCK = "model.layers.{layer}.block_sparse_moe."
_IN = Stored(name=_BLOCK + "input_linear.weight", holds=("gate", "up"), experts="axis")

NAMES = {
    **decoder_names(),
    "router": _BLOCK + "router.layer.weight",
    "gate": _IN,
    "up": _IN,
    "down": Stored(name=_BLOCK + "output_linear.weight", experts="axis"),
}


def spec(hf: HfConfig) -> ModelSpec:
    """The model that a Granite MoE's config.json describes."""
    require_plain(hf)
    n_experts = hf.integer("num_local_experts")
    bias = hf.boolean("attention_bias", default=False)
    attention = read_attention(
        hf,
        theta=1e4,
        qkv_bias=bias,
        out_bias=bias,
        score_scale=hf.number("attention_multiplier", default=1.0),
    )
    experts = ExpertsFeedForward(
        n_experts=n_experts,
        n_inner=hf.integer("intermediate_size"),
        # A softmax over the highest scores is that over all, made to add up to 1.
        router=SoftmaxRouter(
            n_active=hf.integer("num_experts_per_tok", maximum=n_experts), renormalize=True
        ),
    )
    return replace(
        read_model(hf, attention, experts, norm_epsilon=epsilon(hf, default=1e-6)),
        embedding_scale=hf.number("embedding_multiplier", default=1.0),
        residual_scale=hf.number("residual_multiplier", default=1.0),
        logit_scale=1 / hf.number("logits_scaling", default=1.0),
    )
