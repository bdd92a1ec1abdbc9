"""Phi-3.5-MoE: a sparse mixer of two experts, layer norms, biases of attention and head.

Source: arXiv 2404.14219, 2409.12136; transformers' PhimoeForCausalLM, which is right as long as a
text is no longer than the model was first trained on: beyond it keeps the short factors.
"""

from dataclasses import replace

from lowmoe.families.names import decoder_names, numbered_names
from lowmoe.families.reading import epsilon, read_attention, read_model, require_plain
from lowmoe.spec import ExpertsFeedForward, HfConfig, ModelSpec, SparseMixerRouter

NAMES = {**decoder_names(), **numbered_names()}


def spec(hf: HfConfig) -> ModelSpec:
    """The model that a Phi MoE's config.json describes."""
    require_plain(hf)
    hf.require("num_experts_per_tok", 2, None)
    bias = hf.boolean("attention_bias", default=False)
    window = hf.optional_integer("sliding_window")
    if window is not None and window >= hf.integer("max_position_embeddings"):
        window = None
    attention = read_attention(hf, theta=1e6, qkv_bias=bias, out_bias=bias, window=window)
    experts = ExpertsFeedForward(
        n_experts=hf.integer("num_local_experts"),
        n_inner=hf.integer("intermediate_size"),
        router=SparseMixerRouter(jitter=hf.number("router_jitter_noise", default=0.01)),
    )
    return replace(
        read_model(hf, attention, experts, norm_epsilon=epsilon(hf, default=1e-5)),
        norm="layer",
        norm_bias=True,
        head_bias=hf.boolean("lm_head_bias", default=False),
    )
