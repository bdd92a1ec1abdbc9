"""The experts that DeepSeek-V3 began with: a sigmoid of each, a bias for the choice, groups.

Of other attention: GLM-4.5 to 4.7, dots.llm1.
Source: arXiv 2412.19437; transformers' Glm4MoeForCausalLM and Dots1ForCausalLM.
"""

from dataclasses import dataclass, replace

from lowmoe.errors import CheckpointError
from lowmoe.families.names import decoder_names, expert_names
from lowmoe.families.reading import (
    deep_windows,
    epsilon,
    layer_list,
    n_layers,
    read_attention,
    read_model,
    require_plain,
    windows,
    without_experts,
)
from lowmoe.spec import (
    ExpertsFeedForward,
    HeadNorm,
    HfConfig,
    ModelSpec,
    SharedExpert,
    SigmoidRouter,
    SoftmaxRouter,
)

NAMES = {**decoder_names(), **expert_names(shared="shared_experts")}


_WINDOW = 4096  # of dots.llm1's class in transformers


@dataclass(frozen=True, slots=True, kw_only=True)
class Unsaid:
    """What a family's experts are where the config does not say: its class in transformers.

    epsilon: of norms where attention is latent.
    """

    renormalize: bool
    scale: float = 1.0
    n_groups: int = 1
    n_groups_active: int = 1
    n_plain: int = 1
    epsilon: float = 1e-6


def spec(hf: HfConfig) -> ModelSpec:
    """The model that a GLM-4.5's or a dots.llm1's config.json describes."""
    require_plain(hf)
    return _with_half_rope(hf) if hf.values["model_type"] == "glm4_moe" else _with_windows(hf)


def _with_half_rope(hf: HfConfig) -> ModelSpec:
    eps = epsilon(hf, default=1e-5)
    normed = hf.boolean("use_qk_norm", default=False)
    attention = read_attention(
        hf,
        theta=1e4,
        head_size=128,
        rotated=0.5,
        norm=HeadNorm(over="head", epsilon=eps) if normed else None,
        qkv_bias=hf.boolean("attention_bias", default=False),
    )
    return read_model(hf, attention, feed_forwards(hf, Unsaid(renormalize=True)), norm_epsilon=eps)


def _with_windows(hf: HfConfig) -> ModelSpec:
    eps = epsilon(hf, default=1e-6)
    bias = hf.boolean("attention_bias", default=False)
    norm = HeadNorm(over="head", epsilon=eps)
    attention = read_attention(hf, theta=1e4, norm=norm, qkv_bias=bias, out_bias=bias)
    window = hf.optional_integer("sliding_window", absent=_WINDOW)
    sizes = windows(hf, deep_windows(hf, window, first=62), size=_WINDOW)
    layers = [replace(attention, window=size) for size in sizes]
    experts = feed_forwards(hf, Unsaid(renormalize=False, n_plain=0))
    return read_model(hf, layers, experts, norm_epsilon=eps)


def feed_forwards(hf: HfConfig, unsaid: Unsaid) -> list[ExpertsFeedForward]:
    """A few plain ones first, then experts beside shared ones."""
    n_experts = routed(hf)
    n_groups, n_groups_active = groups(hf, unsaid.n_groups, unsaid.n_groups_active)
    router = SigmoidRouter(
        n_active=hf.integer("num_experts_per_tok", maximum=n_experts),
        renormalize=hf.boolean("norm_topk_prob", default=unsaid.renormalize),
        choice_bias=True,
        n_groups=n_groups,
        n_groups_active=n_groups_active,
        scale=hf.number("routed_scaling_factor", default=unsaid.scale),
    )
    return beside_shared(hf, router, n_plain=unsaid.n_plain)


def routed(hf: HfConfig) -> int:
    """How many experts there are to choose from."""
    return hf.integer("n_routed_experts", default=hf.optional_integer("num_experts"))


def groups(hf: HfConfig, count: int = 1, active: int = 1) -> tuple[int, int]:
    """Into how many groups experts are divided, and among how many of them the choice is.

    count, active: where the config does not say.
    """
    n_experts, n_active = routed(hf), hf.integer("num_experts_per_tok")
    n_groups = hf.integer("n_group", default=count, maximum=n_experts)
    n_groups_active = hf.integer("topk_group", default=min(active, n_groups), maximum=n_groups)
    if n_experts % n_groups or n_active > n_experts // n_groups * n_groups_active:
        raise CheckpointError(
            f"config.json: {n_active} of {n_experts} experts in {n_groups_active} of {n_groups} "
            "groups, but groups must be alike and hold as many. The file is damaged."
        )
    return n_groups, n_groups_active


def beside_shared(
    hf: HfConfig, router: SoftmaxRouter | SigmoidRouter, *, n_plain: int, n_shared: int = 1
) -> list[ExpertsFeedForward]:
    """A few plain ones first, then experts that a router chooses beside shared ones.

    n_plain, n_shared: where the config does not say.
    """
    n_inner = hf.integer("moe_intermediate_size")
    experts = ExpertsFeedForward(
        n_experts=routed(hf),
        n_inner=n_inner,
        router=router,
        shared=SharedExpert(n_inner=n_inner * hf.integer("n_shared_experts", default=n_shared)),
    )
    plain = without_experts(experts, hf.integer("intermediate_size"))
    count = n_layers(hf)
    kinds = layer_list(hf, "mlp_layer_types", ("dense", "sparse"))
    if kinds is not None:
        return [plain if kind == "dense" else experts for kind in kinds]
    said = hf.values.get("first_k_dense_replace")
    if said is None:
        n_plain = min(n_plain, count)
    else:
        n_plain = hf.integer("first_k_dense_replace", maximum=count) if said != 0 else 0
    return [plain] * n_plain + [experts] * (count - n_plain)
