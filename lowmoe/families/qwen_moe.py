"""Qwen1.5-MoE, Qwen2-MoE and Qwen3-MoE: softmax top-k experts, a plain feed-forward in some layers.

Up to the second generation with a shared expert that weighs itself and biases of queries, keys and
values; the third has norms of heads instead.
Source: transformers' Qwen2MoeForCausalLM and Qwen3MoeForCausalLM.
"""

from lowmoe.errors import CheckpointError
from lowmoe.families.names import decoder_names, expert_names
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
    HeadNorm,
    HfConfig,
    ModelSpec,
    SharedExpert,
    SoftmaxRouter,
)

NAMES = {
    **decoder_names(),
    **expert_names(shared="shared_expert"),
    "shared_router": "model.layers.{layer}.mlp.shared_expert_gate.weight",
}


def spec(hf: HfConfig) -> ModelSpec:
    """The model that a config.json of any generation describes."""
    require_plain(hf)
    third = hf.values["model_type"] == "qwen3_moe"
    eps = epsilon(hf, default=1e-6)
    if third:
        bias = hf.boolean("attention_bias", default=False)
        window = None
        if hf.boolean("use_sliding_window", default=False):
            window = hf.optional_integer("sliding_window", absent=4096)
        norm = HeadNorm(over="head", epsilon=eps)
        attention = read_attention(
            hf, theta=1e4, norm=norm, window=window, qkv_bias=bias, out_bias=bias
        )
    else:
        hf.require("use_sliding_window", False, None)
        attention = read_attention(hf, theta=1e4, qkv_bias=hf.boolean("qkv_bias", default=True))
    shared = None
    if not third:
        n_inner = hf.integer("shared_expert_intermediate_size")
        shared = SharedExpert(n_inner=n_inner, weighed=True)
    return read_model(hf, attention, feed_forwards(hf, shared, renormalize=False), norm_epsilon=eps)


def feed_forwards(
    hf: HfConfig, shared: SharedExpert | None, *, renormalize: bool
) -> list[ExpertsFeedForward]:
    """Of each layer.  renormalize: where the config does not say."""
    n_experts = hf.integer("num_experts", default=hf.optional_integer("num_local_experts"))
    experts = ExpertsFeedForward(
        n_experts=n_experts,
        n_inner=hf.integer("moe_intermediate_size"),
        router=SoftmaxRouter(
            n_active=hf.integer("num_experts_per_tok", maximum=n_experts),
            renormalize=hf.boolean("norm_topk_prob", default=renormalize),
        ),
        shared=shared,
    )
    plain = without_experts(experts, hf.integer("intermediate_size"))
    step, dense = hf.integer("decoder_sparse_step", default=1), hf.values.get("mlp_only_layers")
    if not isinstance(dense, list | None):
        raise CheckpointError(f"config.json: mlp_only_layers is {dense!r}, but must be a list.")
    return [plain if i in (dense or []) or (i + 1) % step else experts for i in range(n_layers(hf))]
