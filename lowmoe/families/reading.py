"""What many families' config.json say in the same words.

Knows:        the keys that transformers' decoders share, old and new spellings of them.
Ignorant of:  which family has what.
"""

from collections.abc import Sequence
from typing import Any

from lowmoe.errors import CheckpointError, UnsupportedModelError
from lowmoe.families.rope import read_rope
from lowmoe.spec import (
    Attention,
    EveryToken,
    ExpertsFeedForward,
    GroupedQueryAttention,
    HeadNorm,
    HfConfig,
    LayerSpec,
    ModelSpec,
    SharedExpert,
)

MAX_LAYERS = 10_000


def require_plain(hf: HfConfig) -> None:
    """Refuse other activations."""
    hf.require("hidden_act", "silu", None)


def n_layers(hf: HfConfig) -> int:
    """How many layers there are."""
    return hf.integer("num_hidden_layers", maximum=MAX_LAYERS)


def epsilon(hf: HfConfig, *, default: float) -> float:
    """Of all norms."""
    return hf.number("rms_norm_eps", default=default)


def read_attention(
    hf: HfConfig,
    *,
    theta: float,
    head_size: int | None = None,
    rotated: float = 1.0,
    norm: HeadNorm | None = None,
    qkv_bias: bool = False,
    out_bias: bool = False,
    window: int | None = None,
    clamp: float | None = None,
    score_scale: float | None = None,
) -> GroupedQueryAttention:
    """Attention of the usual keys.  theta, head_size, rotated: where the config does not say."""
    n_hidden, n_heads = hf.integer("hidden_size"), hf.integer("num_attention_heads")
    n_kv_heads = hf.integer("num_key_value_heads", default=n_heads)
    size = hf.integer("head_dim", default=head_size or max(1, n_hidden // n_heads))
    if n_heads % n_kv_heads or size % 2:
        raise CheckpointError(
            f"config.json: {n_heads} heads of {size} over {n_kv_heads} key-value heads, but "
            "the heads must divide evenly and their size be even. The file is damaged."
        )
    return GroupedQueryAttention(
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_size=size,
        rope=read_rope(hf, head_size=size, theta=theta, rotated=rotated),
        window=window,
        qkv_bias=qkv_bias,
        out_bias=out_bias,
        norm=norm,
        clamp=clamp,
        score_scale=score_scale,
    )


def one_expert(hf: HfConfig) -> ExpertsFeedForward:
    """The feed-forward of a layer without a choice: one expert, which every token uses."""
    return ExpertsFeedForward(
        n_experts=1, n_inner=hf.integer("intermediate_size"), router=EveryToken(n_active=1)
    )


def without_experts(like: ExpertsFeedForward, n_inner: int) -> ExpertsFeedForward:
    """A plain feed-forward among layers of experts: the shared expert alone."""
    return ExpertsFeedForward(
        n_experts=0,
        n_inner=like.n_inner,
        router=EveryToken(n_active=0),
        activation=like.activation,
        shared=SharedExpert(n_inner=n_inner),
    )


def read_model(
    hf: HfConfig,
    attention: Attention | Sequence[Attention],
    feed_forward: ExpertsFeedForward | Sequence[ExpertsFeedForward],
    *,
    norm_epsilon: float,
    tied: bool = False,
    context: int | None = None,
) -> ModelSpec:
    """The whole model of the usual keys.

    attention, feed_forward: one for all layers or one for each; tied, context: where the config
    does not say.
    """
    count = n_layers(hf)
    attentions = [attention] * count if not isinstance(attention, Sequence) else attention
    feeds = [feed_forward] * count if not isinstance(feed_forward, Sequence) else feed_forward
    return ModelSpec(
        model_type=str(hf.values["model_type"]),
        n_vocab=hf.integer("vocab_size"),
        n_hidden=hf.integer("hidden_size"),
        context_length=hf.integer("max_position_embeddings", default=context),
        norm_epsilon=norm_epsilon,
        tied_head=hf.boolean("tie_word_embeddings", default=tied),
        layers=tuple(
            LayerSpec(attention=a, feed_forward=f) for a, f in zip(attentions, feeds, strict=True)
        ),
        end_ids=hf.end_ids(),
    )


def layer_list(hf: HfConfig, key: str, allowed: Sequence[object]) -> list[Any] | None:
    """A list with an entry for every layer, each one of `allowed`; None where it is absent."""
    value = hf.values.get(key)
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != n_layers(hf):
        raise CheckpointError(
            f"config.json: {key} is {str(value)[:80]}, but must list {n_layers(hf)} layers."
        )
    for entry in value:
        if entry not in allowed:
            raise UnsupportedModelError(
                f"config.json: {key} has {entry!r}, but only {' or '.join(map(repr, allowed))} is "
                "implemented. This model cannot run here yet."
            )
    return value


def windows(hf: HfConfig, default: Sequence[int | None], *, size: int) -> list[int | None]:
    """Each layer's sliding window, by layer_types where the config has them.

    size: of those that slide, where the config does not say.
    """
    kinds = layer_list(hf, "layer_types", ("full_attention", "sliding_attention"))
    if kinds is None:
        return list(default)
    size = hf.integer("sliding_window", default=size)
    return [size if "sliding" in kind else None for kind in kinds]


def deep_windows(hf: HfConfig, size: int | None, *, first: int) -> list[int | None]:
    """A sliding window of each layer from max_window_layers on, None for those before.

    size: None for no window at all; first: where the config does not say.
    """
    count = n_layers(hf)
    if size is None:
        return [None] * count
    if hf.values.get("max_window_layers") != 0:
        first = min(hf.integer("max_window_layers", default=first), count)
    else:
        first = 0
    return [None] * first + [size] * (count - first)


def uniform(hf: HfConfig, key: str) -> int:
    """A whole number that some configs list for each layer; all must be alike."""
    value = hf.values.get(key)
    if not isinstance(value, list):
        return hf.integer(key)
    if len(set(map(repr, value))) != 1:
        raise UnsupportedModelError(
            f"config.json: {key} is {str(value)[:80]}, but only layers that are alike are "
            "implemented. This model cannot run here yet."
        )
    return HfConfig({key: value[0]}).integer(key)
