"""The first Qwen: dense, queries, keys and values in one matrix with a bias.

Its config.json counts the rows of gate and up together.
Source: arXiv 2309.16609 and QwenLM/Qwen; transformers' Qwen2ForCausalLM, of other names, is the
same model.
"""

from lowmoe.errors import UnsupportedModelError
from lowmoe.families.reading import read_attention, read_model
from lowmoe.spec import EveryToken, ExpertsFeedForward, HfConfig, ModelSpec, Stored

_LAYER = "transformer.h.{layer}."
_QKV = Stored(name=_LAYER + "attn.c_attn.weight", holds=("q", "k", "v"))
_QKV_BIAS = Stored(name=_LAYER + "attn.c_attn.bias", holds=("q_bias", "k_bias", "v_bias"))

NAMES = {
    "embedding": "transformer.wte.weight",
    "final_norm": "transformer.ln_f.weight",
    "head": "lm_head.weight",
    "attention_norm": _LAYER + "ln_1.weight",
    "experts_norm": _LAYER + "ln_2.weight",
    **dict.fromkeys(_QKV.holds, _QKV),
    **dict.fromkeys(_QKV_BIAS.holds, _QKV_BIAS),
    "attention_out": _LAYER + "attn.c_proj.weight",
    "gate": _LAYER + "mlp.w2.weight",
    "up": _LAYER + "mlp.w1.weight",
    "down": _LAYER + "mlp.c_proj.weight",
}


def spec(hf: HfConfig) -> ModelSpec:
    """The model that a first Qwen's config.json describes."""
    hf.require("no_bias", True, None)
    hf.require("rotary_pct", 1.0, None)
    # Both change nothing within the length a model was trained on, beyond which it is not run.
    for key in ("use_dynamic_ntk", "use_logn_attn"):
        hf.boolean(key, default=False)
    n_inner = hf.integer("intermediate_size")
    if n_inner % 2:
        raise UnsupportedModelError(
            f"config.json: intermediate_size is {n_inner}, but must be even, gate and up together."
        )
    attention = read_attention(hf, theta=hf.number("rotary_emb_base", default=1e4), qkv_bias=True)
    experts = ExpertsFeedForward(n_experts=1, n_inner=n_inner // 2, router=EveryToken(n_active=1))
    trained = hf.integer("seq_length", default=8192)
    return read_model(
        HfConfig({**hf.values, "max_position_embeddings": trained}),
        attention,
        experts,
        norm_epsilon=hf.number("layer_norm_epsilon", default=1e-6),
    )
