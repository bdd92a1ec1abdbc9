"""Mixtral: grouped-query attention, softmax top-k over SwiGLU experts.

Source: arXiv 2401.04088; transformers' MixtralForCausalLM, to which tests hold it.
"""

from lowmoe.families.names import decoder_names, expert_names, numbered_names
from lowmoe.families.reading import epsilon, read_attention, read_model, require_plain
from lowmoe.spec import ExpertsFeedForward, HfConfig, ModelSpec, SoftmaxRouter

NAMES = {**decoder_names(), **numbered_names()}
# As gptqmodel from version 7 on calls them, after the modules of transformers 5 in memory.
OTHER_NAMES = {role: expert_names()[role] for role in ("router", "gate", "up", "down")}


def spec(hf: HfConfig) -> ModelSpec:
    """The model that a Mixtral's config.json describes."""
    require_plain(hf)
    n_experts = hf.integer("num_local_experts")
    experts = ExpertsFeedForward(
        n_experts=n_experts,
        n_inner=hf.integer("intermediate_size"),
        router=SoftmaxRouter(
            n_active=hf.integer("num_experts_per_tok", maximum=n_experts), renormalize=True
        ),
    )
    attention = read_attention(hf, theta=1e6, window=hf.optional_integer("sliding_window"))
    return read_model(hf, attention, experts, norm_epsilon=epsilon(hf, default=1e-5))
