"""Names that many families' checkpoints share."""

from collections.abc import Mapping

from lowmoe.spec import Stored

_ATTENTION = "model.layers.{layer}.self_attn."
_MLP = "model.layers.{layer}.mlp."


def decoder_names() -> Mapping[str, str]:
    """Everything but the feed-forwards, as most write it since the first of them."""
    return {
        "embedding": "model.embed_tokens.weight",
        "final_norm": "model.norm.weight",
        "final_norm_bias": "model.norm.bias",
        "head": "lm_head.weight",
        "head_bias": "lm_head.bias",
        "attention_norm": "model.layers.{layer}.input_layernorm.weight",
        "attention_norm_bias": "model.layers.{layer}.input_layernorm.bias",
        "experts_norm": "model.layers.{layer}.post_attention_layernorm.weight",
        "experts_norm_bias": "model.layers.{layer}.post_attention_layernorm.bias",
        "attention_out": _ATTENTION + "o_proj.weight",
        "attention_out_bias": _ATTENTION + "o_proj.bias",
        "q_norm": _ATTENTION + "q_norm.weight",
        "k_norm": _ATTENTION + "k_norm.weight",
        "sinks": _ATTENTION + "sinks",
        **{role: f"{_ATTENTION}{role}_proj.weight" for role in "qkv"},
        **{f"{role}_bias": f"{_ATTENTION}{role}_proj.bias" for role in "qkv"},
    }


def paired_names() -> Mapping[str, Stored]:
    """Queries and keys whose channels that turn against each other stand side by side."""
    return {
        **{r: Stored(name=f"{_ATTENTION}{r}_proj.weight", pairs=True) for r in "qk"},
        **{f"{r}_bias": Stored(name=f"{_ATTENTION}{r}_proj.bias", pairs=True) for r in "qk"},
    }


def dense_names(prefix: str = "", *, place: str = _MLP) -> Mapping[str, str]:
    """A plain feed-forward.  prefix: of the roles, "" where it is the layer's one expert."""
    return {f"{prefix}{m}": f"{place}{m}_proj.weight" for m in ("gate", "up", "down")}


def expert_names(*, shared: str | None = None) -> Mapping[str, str]:
    """Experts, one tensor a matrix, among layers without.  shared: what that one is called."""
    names = {
        "router": _MLP + "gate.weight",
        "choice_bias": _MLP + "gate.e_score_correction_bias",
        **dense_names("only_"),
        **dense_names(place=_MLP + "experts.{expert}."),
    }
    if shared is not None:
        names |= dense_names("shared_", place=f"{_MLP}{shared}.")
    return names


def numbered_names() -> Mapping[str, str]:
    """Experts whose matrices are called w1, w2 and w3."""
    block = "model.layers.{layer}.block_sparse_moe."
    return {
        "router": block + "gate.weight",
        "choice_bias": block + "e_score_correction_bias",
        "gate": block + "experts.{expert}.w1.weight",
        "up": block + "experts.{expert}.w3.weight",
        "down": block + "experts.{expert}.w2.weight",
    }
