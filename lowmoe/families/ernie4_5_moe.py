"""ERNIE 4.5 MoE: softmax experts chosen with a bias, plain layers at either end, rope in pairs.

Source: transformers' Ernie4_5_MoeForCausalLM.
"""

from lowmoe.families.names import decoder_names, expert_names, paired_names
from lowmoe.families.reading import (
    epsilon,
    n_layers,
    read_attention,
    read_model,
    require_plain,
    without_experts,
)
from lowmoe.spec import (
    ExpertsFeedForward,
    HfConfig,
    ModelSpec,
    SharedExpert,
    SoftmaxRouter,
    Stored,
)

NAMES = {
    **decoder_names(),
    **expert_names(shared="shared_experts"),
    **paired_names(),
    "choice_bias": Stored(
        name="model.layers.{layer}.mlp.moe_statics.e_score_correction_bias", leading_one=True
    ),
}


def spec(hf: HfConfig) -> ModelSpec:
    """The model that an ERNIE 4.5 MoE's config.json describes."""
    require_plain(hf)
    hf.require("use_bias", False, None)
    attention = read_attention(hf, theta=500_000.0)
    return read_model(
        hf, attention, _feed_forwards(hf), norm_epsilon=epsilon(hf, default=1e-5), tied=True
    )


def _feed_forwards(hf: HfConfig) -> list[ExpertsFeedForward]:
    n_experts, n_inner = hf.integer("moe_num_experts"), hf.integer("moe_intermediate_size")
    shared = None
    if hf.values.get("moe_num_shared_experts") != 0:
        shared = SharedExpert(n_inner=n_inner * hf.integer("moe_num_shared_experts", default=2))
    experts = ExpertsFeedForward(
        n_experts=n_experts,
        n_inner=n_inner,
        router=SoftmaxRouter(
            n_active=hf.integer("moe_k", default=6, maximum=n_experts),
            renormalize=True,
            choice_bias=True,
        ),
        shared=shared,
    )
    plain = without_experts(experts, hf.integer("intermediate_size"))
    count, step = n_layers(hf), hf.integer("moe_layer_interval", default=1)
    first = 0
    if hf.values.get("moe_layer_start_index") != 0:
        first = hf.integer("moe_layer_start_index", default=1)
    last = count - 1
    if hf.values.get("moe_layer_end_index") not in (-1, None):
        last = hf.integer("moe_layer_end_index")
    chosen = [i for i in range(count) if first <= i <= last and (i + 1) % step == 0]
    return [experts if i in chosen else plain for i in range(count)]
