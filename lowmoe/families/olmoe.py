"""OLMoE: softmax top-k experts, queries and keys normed over all heads together.

Source: arXiv 2409.02060; transformers' OlmoeForCausalLM.
"""

from lowmoe.families.names import decoder_names, expert_names
from lowmoe.families.reading import epsilon, read_attention, read_model, require_plain
from lowmoe.spec import ExpertsFeedForward, HeadNorm, HfConfig, ModelSpec, SoftmaxRouter

NAMES = {**decoder_names(), **expert_names()}


def spec(hf: HfConfig) -> ModelSpec:
    """The model that an OLMoE's config.json describes."""
    require_plain(hf)
    eps, n_experts = epsilon(hf, default=1e-5), hf.integer("num_experts")
    bias = hf.boolean("attention_bias", default=False)
    clamp = None if hf.values.get("clip_qkv") is None else hf.number("clip_qkv")
    norm = HeadNorm(over="all", epsilon=eps)
    attention = read_attention(hf, theta=1e4, norm=norm, clamp=clamp, qkv_bias=bias, out_bias=bias)
    experts = ExpertsFeedForward(
        n_experts=n_experts,
        n_inner=hf.integer("intermediate_size"),
        router=SoftmaxRouter(
            n_active=hf.integer("num_experts_per_tok", maximum=n_experts),
            renormalize=hf.boolean("norm_topk_prob", default=False),
        ),
    )
    return read_model(hf, attention, experts, norm_epsilon=eps)
