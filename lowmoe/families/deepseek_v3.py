"""DeepSeek-V3 and R1, Kimi-K2, GLM-4.7-Flash: latent attention, sigmoid experts in groups.

Source: arXiv 2412.19437; transformers' DeepseekV3ForCausalLM and Glm4MoeLiteForCausalLM. Most were
published in 8-bit floats, which are read as the tensors named here.
"""

from collections.abc import Sequence

from lowmoe.families.grouped_sigmoid import Unsaid, feed_forwards
from lowmoe.families.names import decoder_names, expert_names
from lowmoe.families.reading import epsilon, read_model, require_plain
from lowmoe.families.rope import magnitude, read_rope, rope_values
from lowmoe.spec import (
    ExpertsFeedForward,
    HfConfig,
    LatentAttention,
    ModelSpec,
    Stored,
    YarnScaling,
)

_ATTENTION = "model.layers.{layer}.self_attn."

NAMES = {
    **decoder_names(),
    **expert_names(shared="shared_experts"),
    "q": Stored(name=_ATTENTION + "q_proj.weight", pairs=True),
    "q_down": _ATTENTION + "q_a_proj.weight",
    "q_latent_norm": _ATTENTION + "q_a_layernorm.weight",
    "q_up": Stored(name=_ATTENTION + "q_b_proj.weight", pairs=True),
    "kv_down": Stored(name=_ATTENTION + "kv_a_proj_with_mqa.weight", pairs=True),
    "kv_latent_norm": _ATTENTION + "kv_a_layernorm.weight",
    "kv_up": _ATTENTION + "kv_b_proj.weight",
}

# Kimi-K2's config names DeepSeek-V3's class.
_DEEPSEEK = Unsaid(renormalize=True, scale=2.5, n_groups=8, n_groups_active=4, n_plain=3)
_GLM_LITE = Unsaid(renormalize=True, scale=1.8, epsilon=1e-5)


def spec(hf: HfConfig) -> ModelSpec:
    """The model that a config.json of this kind describes."""
    hf.require("scoring_func", "sigmoid", None)
    hf.require("topk_method", "noaux_tc", None)
    unsaid = _GLM_LITE if hf.values["model_type"] == "glm4_moe_lite" else _DEEPSEEK
    return with_latents(hf, feed_forwards(hf, unsaid), unsaid_epsilon=unsaid.epsilon)


def with_latents(
    hf: HfConfig, feed_forwards: Sequence[ExpertsFeedForward], *, unsaid_epsilon: float = 1e-6
) -> ModelSpec:
    """A model of latent attention.  unsaid_epsilon: where the config does not say."""
    require_plain(hf)
    hf.require("attention_bias", False, None)
    hf.require("rope_interleave", True, None)
    eps = epsilon(hf, default=unsaid_epsilon)
    return read_model(hf, _attention(hf), feed_forwards, norm_epsilon=eps)


def _attention(hf: HfConfig) -> LatentAttention:
    plain, turning = hf.integer("qk_nope_head_dim"), hf.integer("qk_rope_head_dim")
    rope = read_rope(hf, head_size=turning, theta=1e4)
    return LatentAttention(
        n_heads=hf.integer("num_attention_heads"),
        q_rank=hf.optional_integer("q_lora_rank"),
        kv_rank=hf.integer("kv_lora_rank"),
        plain_size=plain,
        rope_size=turning,
        value_size=hf.integer("v_head_dim"),
        rope=rope,
        score_scale=(plain + turning) ** -0.5 * _longer(hf, rope.scaling) ** 2,
        norm_epsilon=1e-6,
    )


def _longer(hf: HfConfig, scaling: object) -> float:
    """How much longer YaRN makes queries and keys, of which only a part turns."""
    share = rope_values(hf).get("mscale_all_dim")
    if not isinstance(scaling, YarnScaling) or not share:
        return 1.0
    share = HfConfig(rope_values(hf)).number("mscale_all_dim")
    return magnitude(scaling.factor, share)
