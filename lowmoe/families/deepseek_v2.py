"""DeepSeek-V2, V2-Lite and V2.5: latent attention, softmax experts, the large ones in groups.

Source: arXiv 2405.04434; transformers' DeepseekV2ForCausalLM.
"""

from lowmoe.families import deepseek_v3
from lowmoe.families.grouped_sigmoid import beside_shared, groups, routed
from lowmoe.spec import HfConfig, ModelSpec, SoftmaxRouter

NAMES = deepseek_v3.NAMES


def spec(hf: HfConfig) -> ModelSpec:
    """The model that a DeepSeek-V2's config.json describes."""
    hf.require("scoring_func", "softmax", None)
    hf.require("topk_method", "greedy", "group_limited_greedy", None)
    hf.require("norm_topk_prob", False, None)
    hf.require("moe_layer_freq", 1, None)
    hf.require("mlp_bias", False, None)
    n_experts = routed(hf)
    grouped = hf.values.get("topk_method") == "group_limited_greedy"
    n_groups, n_groups_active = groups(hf) if grouped else (1, 1)
    router = SoftmaxRouter(
        n_active=hf.integer("num_experts_per_tok", maximum=n_experts),
        renormalize=False,
        n_groups=n_groups,
        n_groups_active=n_groups_active,
        scale=hf.number("routed_scaling_factor", default=1.0),
    )
    return deepseek_v3.with_latents(hf, beside_shared(hf, router, n_plain=0, n_shared=2))
