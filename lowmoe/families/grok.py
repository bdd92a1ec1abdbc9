"""Grok-1: norms before and after, capped scores, experts of GELU, embeddings and logits scaled.

Source: xai-org/grok-1, model.py and run.py, for the maths; names and keys are those of its port to
torch, hpcai-tech/grok-1. That port's GELU is the exact one, xai-org's the one by tanh.
"""

from dataclasses import replace

from lowmoe.families.reading import epsilon, read_attention, read_model
from lowmoe.spec import GELU_TANH, ExpertsFeedForward, HfConfig, ModelSpec, SoftmaxRouter

_LAYER = "model.layers.{layer}."
_EXPERT = _LAYER + "moe_block.experts.{expert}."

NAMES = {
    "embedding": "model.embed_tokens.weight",
    "final_norm": "model.norm.scale",
    "head": "lm_head.weight",
    "attention_norm": _LAYER + "pre_attn_norm.scale",
    "attention_out_norm": _LAYER + "post_attn_norm.scale",
    "experts_norm": _LAYER + "pre_moe_norm.scale",
    "experts_out_norm": _LAYER + "post_moe_norm.scale",
    **{role: f"{_LAYER}attn.{role}_proj.weight" for role in "qkv"},
    "attention_out": _LAYER + "attn.o_proj.weight",
    "router": _LAYER + "moe_block.gate.weight",
    "gate": _EXPERT + "linear.weight",
    "up": _EXPERT + "linear_v.weight",
    "down": _EXPERT + "linear_1.weight",
}


def spec(hf: HfConfig) -> ModelSpec:
    """The model that a Grok-1's config.json describes; keys it leaves out are as in run.py."""
    hf.require("hidden_act", "gelu", "gelu_new", "gelu_pytorch_tanh", None)
    attention = replace(
        read_attention(
            hf, theta=1e4, score_scale=hf.number("attn_output_multiplier", default=128**-0.5)
        ),
        score_cap=hf.number("max_attn_value", default=30.0),
    )
    n_experts = hf.integer("num_experts", default=8)
    experts = ExpertsFeedForward(
        n_experts=n_experts,
        n_inner=hf.integer("intermediate_size"),
        router=SoftmaxRouter(
            n_active=hf.integer("num_experts_per_tok", default=2, maximum=n_experts),
            renormalize=False,
        ),
        activation=GELU_TANH,
    )
    return replace(
        read_model(hf, attention, experts, norm_epsilon=epsilon(hf, default=1e-5), tied=True),
        norm_after=True,
        embedding_scale=hf.number("embedding_multiplier_scale", default=78.38367176906169),
        logit_scale=hf.number("output_multiplier_scale", default=3**-0.5),
    )
