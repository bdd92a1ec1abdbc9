"""Llama 1, 2 and 3: dense, grouped-query attention, from 3.1 on with scaled wavelengths.

Source: arXiv 2302.13971, 2307.09288, 2407.21783; transformers' LlamaForCausalLM.
"""

from lowmoe.families.names import decoder_names, dense_names
from lowmoe.families.reading import (
    epsilon,
    one_expert,
    read_attention,
    read_model,
    require_plain,
)
from lowmoe.spec import HfConfig, ModelSpec

NAMES = {**decoder_names(), **dense_names()}


def spec(hf: HfConfig) -> ModelSpec:
    """The model that a Llama's config.json describes."""
    require_plain(hf)
    hf.require("mlp_bias", False, None)
    bias = hf.boolean("attention_bias", default=False)
    attention = read_attention(hf, theta=1e4, qkv_bias=bias, out_bias=bias)
    return read_model(
        hf, attention, one_expert(hf), norm_epsilon=epsilon(hf, default=1e-6), context=2048
    )
