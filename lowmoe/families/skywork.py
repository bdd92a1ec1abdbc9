"""Skywork-MoE: a Mixtral whose router's scores are brought to a spread before the softmax.

Source: arXiv 2406.06563; SkyworkAI/vllm, skywork_moe.py, for the maths and the names.
"""

from lowmoe.errors import UnsupportedModelError
from lowmoe.families.names import decoder_names, numbered_names
from lowmoe.families.reading import epsilon, read_attention, read_model, require_plain, uniform
from lowmoe.spec import ExpertsFeedForward, HfConfig, ModelSpec, SoftmaxRouter

NAMES = {**decoder_names(), **numbered_names()}

N_ACTIVE = 2  # which no key says


def spec(hf: HfConfig) -> ModelSpec:
    """The model that a Skywork-MoE's config.json describes."""
    require_plain(hf)
    hf.require("moe_use_skywork_gating", False, None)
    hf.require("moe_use_mixtral_gating", False, None)
    hf.require("moe_2layer_gate", False)
    hf.require("moe_feature_no_mul_topk", True)
    hf.require("moe_expert_interval", 1, None)
    hf.require("rotary_percent", 1.0, None)
    n_experts = uniform(hf, "num_experts")
    if n_experts < N_ACTIVE:
        raise UnsupportedModelError(
            f"config.json: num_experts is {n_experts}, but every token goes to {N_ACTIVE}. This "
            "model cannot run here yet."
        )
    spread = hf.number("moe_gate_norm_std", default=1.0)
    experts = ExpertsFeedForward(
        n_experts=n_experts,
        n_inner=hf.integer("intermediate_size"),
        router=SoftmaxRouter(
            n_active=N_ACTIVE,
            renormalize=True,
            spread=spread if hf.boolean("moe_use_logits_norm", default=False) else None,
        ),
    )
    attention = read_attention(hf, theta=1e4)
    return read_model(hf, attention, experts, norm_epsilon=epsilon(hf, default=1e-6))
