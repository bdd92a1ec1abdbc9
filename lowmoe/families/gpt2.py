"""GPT-2: positions that are learned, layer norms, biases everywhere, MLPs without a gate.

Its matrices lie columns in, rows out. Published files begin their names without `transformer.`.
Source: openai/gpt-2; transformers' GPT2LMHeadModel.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lowmoe.families.reading import read_attention, read_model
from lowmoe.spec import (
    GELU_TANH,
    EveryToken,
    ExpertsFeedForward,
    HfConfig,
    ModelSpec,
    Stored,
)

_LAYER = "transformer.h.{layer}."
_QKV = Stored(name=_LAYER + "attn.c_attn.weight", holds=("q", "k", "v"), transposed=True)
_QKV_BIAS = Stored(name=_LAYER + "attn.c_attn.bias", holds=("q_bias", "k_bias", "v_bias"))

NAMES: Mapping[str, str | Stored] = {
    "embedding": "transformer.wte.weight",
    "positions": "transformer.wpe.weight",
    "final_norm": "transformer.ln_f.weight",
    "final_norm_bias": "transformer.ln_f.bias",
    "head": "lm_head.weight",
    "attention_norm": _LAYER + "ln_1.weight",
    "attention_norm_bias": _LAYER + "ln_1.bias",
    **dict.fromkeys(_QKV.holds, _QKV),
    **dict.fromkeys(_QKV_BIAS.holds, _QKV_BIAS),
    "attention_out": Stored(name=_LAYER + "attn.c_proj.weight", transposed=True),
    "attention_out_bias": _LAYER + "attn.c_proj.bias",
    "experts_norm": _LAYER + "ln_2.weight",
    "experts_norm_bias": _LAYER + "ln_2.bias",
    "up": Stored(name=_LAYER + "mlp.c_fc.weight", transposed=True),
    "up_bias": _LAYER + "mlp.c_fc.bias",
    "down": Stored(name=_LAYER + "mlp.c_proj.weight", transposed=True),
    "down_bias": _LAYER + "mlp.c_proj.bias",
}


def spec(hf: HfConfig) -> ModelSpec:
    """The model that a GPT-2's config.json describes."""
    # Matrices lie columns in here, and packed ones as whoever packed them thought fit.
    hf.require("quantization_config", None)
    hf.require("activation_function", "gelu_new", None)
    hf.require("scale_attn_weights", True, None)
    hf.require("scale_attn_by_inverse_layer_idx", False, None)
    hf.require("add_cross_attention", False, None)
    n_hidden = hf.integer("n_embd", default=768)
    # The keys that everybody else uses, for those that this family has of its own.
    usual: dict[str, Any] = {
        **hf.values,
        "hidden_size": n_hidden,
        "num_attention_heads": hf.integer("n_head", default=12),
        "num_hidden_layers": hf.integer("n_layer", default=12),
        "max_position_embeddings": hf.integer("n_positions", default=1024),
    }
    attention = read_attention(HfConfig(usual), theta=1e4, qkv_bias=True, out_bias=True)
    experts = ExpertsFeedForward(
        n_experts=1,
        n_inner=hf.integer("n_inner", default=4 * n_hidden),
        router=EveryToken(n_active=1),
        activation=GELU_TANH,
        bias=True,
        gated=False,
    )
    epsilon = hf.number("layer_norm_epsilon", default=1e-5)
    return replace(
        read_model(
            HfConfig(usual), replace(attention, rope=None), experts, norm_epsilon=epsilon, tied=True
        ),
        norm="layer",
        norm_bias=True,
        learned_positions=True,
    )
