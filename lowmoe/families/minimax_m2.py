"""MiniMax-M2: sigmoid experts chosen with a bias, norms over all heads, half of each head turns.

Source: transformers' MiniMaxM2ForCausalLM.
"""

from lowmoe.families.names import decoder_names, numbered_names
from lowmoe.families.reading import epsilon, read_attention, read_model, require_plain
from lowmoe.spec import ExpertsFeedForward, HeadNorm, HfConfig, ModelSpec, SigmoidRouter

NAMES = {**decoder_names(), **numbered_names()}


def spec(hf: HfConfig) -> ModelSpec:
    """The model that a MiniMax-M2's config.json describes."""
    require_plain(hf)
    hf.require("use_qk_norm", True, None)
    hf.require("use_routing_bias", True, None)
    hf.require("scoring_func", "sigmoid", None)
    hf.require("shared_intermediate_size", 0, None)
    eps, n_experts = epsilon(hf, default=1e-6), hf.integer("num_local_experts")
    head_size = hf.integer("head_dim", default=128)
    rotated = hf.integer("rotary_dim", default=head_size, maximum=head_size) / head_size
    attention = read_attention(
        hf,
        theta=5e6,
        head_size=head_size,
        rotated=rotated,
        norm=HeadNorm(over="all", epsilon=eps),
    )
    experts = ExpertsFeedForward(
        n_experts=n_experts,
        n_inner=hf.integer("intermediate_size"),
        router=SigmoidRouter(
            n_active=hf.integer("num_experts_per_tok", maximum=n_experts),
            renormalize=True,
            choice_bias=True,
        ),
    )
    return read_model(hf, attention, experts, norm_epsilon=eps)
