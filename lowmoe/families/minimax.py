"""MiniMax-Text-01 and M1: lightning attention, every eighth layer attention over keys and values;
layers add to their norms.

Source: arXiv 2501.08313; transformers' MiniMaxForCausalLM, which turns the whole of a head where
the published files say half (rotary_dim); vllm's minimax_text_01.py, which does as they say.
"""

from dataclasses import replace

from lowmoe.families.names import decoder_names, numbered_names
from lowmoe.families.reading import (
    epsilon,
    layer_list,
    n_layers,
    read_attention,
    read_model,
    require_plain,
)
from lowmoe.spec import (
    ExpertsFeedForward,
    GroupedQueryAttention,
    HfConfig,
    LayerSpec,
    LightningAttention,
    ModelSpec,
    NormedResidual,
    SoftmaxRouter,
    Stored,
)

_ATTENTION = "model.layers.{layer}.self_attn."
_QKV = Stored(
    name=_ATTENTION + "qkv_proj.weight",
    holds=("lightning_q", "lightning_k", "lightning_v"),
    in_heads=True,
)

NAMES = {
    **decoder_names(),
    **numbered_names(),
    **dict.fromkeys(_QKV.holds, _QKV),
    "lightning_gate": _ATTENTION + "output_gate.weight",
    "lightning_norm": _ATTENTION + "norm.weight",
    "lightning_out": _ATTENTION + "out_proj.weight",
}
MAX_HEADS = 512  # eight times as many as any model has; each gets a number of its own
_OWN_TYPES = ("minimax_text_01", "minimax_m1")  # before transformers had a class


def spec(hf: HfConfig) -> ModelSpec:
    """The model that a MiniMax-Text-01's config.json describes, in either spelling."""
    require_plain(hf)
    hf.require("sliding_window", None)
    hf.require("shared_intermediate_size", 0, None)
    own = hf.values["model_type"] in _OWN_TYPES
    hf.require("postnorm", True, *([] if own else [None]))
    n_experts = hf.integer("num_local_experts")
    experts = ExpertsFeedForward(
        n_experts=n_experts,
        n_inner=hf.integer("intermediate_size"),
        router=SoftmaxRouter(
            n_active=hf.integer("num_experts_per_tok", maximum=n_experts), renormalize=True
        ),
    )
    whole = _whole_attention(hf)
    kinds = _are_lightning(hf)
    attentions = [_lightning(hf, i, whole) if kind else whole for i, kind in enumerate(kinds)]
    model = read_model(hf, attentions, experts, norm_epsilon=epsilon(hf, default=1e-5))
    return replace(model, layers=tuple(_with_residuals(hf, layer) for layer in model.layers))


def _whole_attention(hf: HfConfig) -> GroupedQueryAttention:
    n_heads = hf.integer("num_attention_heads", maximum=MAX_HEADS)
    size = hf.integer("head_dim", default=max(1, hf.integer("hidden_size") // n_heads))
    rotated = hf.integer("rotary_dim", default=size, maximum=size) / size
    return read_attention(hf, theta=1e6, head_size=size, rotated=rotated)


def _are_lightning(hf: HfConfig) -> list[bool]:
    """Of each layer."""
    kinds = layer_list(hf, "attn_type_list", (0, 1))
    if kinds is not None:
        return [kind == 0 for kind in kinds]
    kinds = layer_list(hf, "layer_types", ("full_attention", "linear_attention"))
    if kinds is not None:
        return [kind == "linear_attention" for kind in kinds]
    return [i % 2 == 1 for i in range(n_layers(hf))]


def _lightning(hf: HfConfig, layer_id: int, like: GroupedQueryAttention) -> LightningAttention:
    """Later layers forget less.  Source: arXiv 2401.04658, section 3.2."""
    n = like.n_heads
    share = 1 - layer_id / (n_layers(hf) - 1 + 1e-5) + 1e-5
    return LightningAttention(
        head_size=like.head_size,
        slopes=tuple(share * 2 ** (-8 * (head + 1) / n) for head in range(n)),
        norm_epsilon=1e-6,
    )


def _with_residuals(hf: HfConfig, layer: LayerSpec) -> LayerSpec:
    lightning = isinstance(layer.attention, LightningAttention)
    kind, own = (
        ("linear_attn", "linear_attention") if lightning else ("full_attn", "full_attention")
    )
    return replace(
        layer,
        attention_residual=_residual(hf, kind, own),
        feed_forward_residual=_residual(hf, "mlp", "mlp"),
    )


def _residual(hf: HfConfig, kind: str, own: str) -> NormedResidual:
    """In transformers' spelling, or in its makers' own."""

    def factor(name: str) -> float:
        default = hf.number(f"layernorm_{own}_{name}", default=1.0)
        return hf.number(f"{kind}_{name}_factor", default=default)

    return NormedResidual(kept=factor("alpha"), added=factor("beta"))
