"""Mixtral: grouped-query attention, softmax top-k over SwiGLU experts.

Source: arXiv 2401.04088; transformers' MixtralForCausalLM, to which tests hold it.
"""

from lowmoe.errors import CheckpointError
from lowmoe.spec import (
    ExpertsFeedForward,
    GroupedQueryAttention,
    HfConfig,
    LayerSpec,
    ModelSpec,
    Rope,
    SoftmaxRouter,
)

MODEL_TYPE = "mixtral"

NAMES = {
    "embedding": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "head": "lm_head.weight",
    "attention_norm": "model.layers.{layer}.input_layernorm.weight",
    "q": "model.layers.{layer}.self_attn.q_proj.weight",
    "k": "model.layers.{layer}.self_attn.k_proj.weight",
    "v": "model.layers.{layer}.self_attn.v_proj.weight",
    "attention_out": "model.layers.{layer}.self_attn.o_proj.weight",
    "experts_norm": "model.layers.{layer}.post_attention_layernorm.weight",
    "router": "model.layers.{layer}.block_sparse_moe.gate.weight",
    "gate": "model.layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight",
    "up": "model.layers.{layer}.block_sparse_moe.experts.{expert}.w3.weight",
    "down": "model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight",
}


def spec(hf: HfConfig) -> ModelSpec:
    """The model that a Mixtral's config.json describes."""
    hf.require("hidden_act", "silu", None)
    hf.require("quantization_config", None)
    n_hidden = hf.integer("hidden_size")
    n_heads = hf.integer("num_attention_heads")
    layer = LayerSpec(attention=_attention(hf, n_hidden, n_heads), feed_forward=_experts(hf))
    return ModelSpec(
        model_type=MODEL_TYPE,
        n_vocab=hf.integer("vocab_size"),
        n_hidden=n_hidden,
        context_length=hf.integer("max_position_embeddings"),
        norm_epsilon=hf.number("rms_norm_eps", default=1e-5),
        tied_head=hf.boolean("tie_word_embeddings", default=False),
        layers=(layer,) * hf.integer("num_hidden_layers", maximum=10_000),
        end_ids=hf.end_ids(),
    )


def _attention(hf: HfConfig, n_hidden: int, n_heads: int) -> GroupedQueryAttention:
    n_kv_heads = hf.integer("num_key_value_heads", default=n_heads)
    head_size = hf.integer("head_dim", default=max(1, n_hidden // n_heads))
    if n_heads % n_kv_heads or head_size % 2:
        raise CheckpointError(
            f"config.json: {n_heads} heads of {head_size} over {n_kv_heads} key-value heads, but "
            "the heads must divide evenly and their size be even. The file is damaged."
        )
    return GroupedQueryAttention(
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_size=head_size,
        rope=Rope(theta=hf.rope_theta(default=1e6)),
        window=hf.optional_integer("sliding_window"),
    )


def _experts(hf: HfConfig) -> ExpertsFeedForward:
    n_experts = hf.integer("num_local_experts")
    return ExpertsFeedForward(
        n_experts=n_experts,
        n_inner=hf.integer("intermediate_size"),
        router=SoftmaxRouter(
            n_active=hf.integer("num_experts_per_tok", maximum=n_experts), renormalize=True
        ),
    )
