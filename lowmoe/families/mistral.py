"""Mistral 7B and its like: dense, grouped-query attention, a sliding window in the first of them.

Source: arXiv 2310.06825; transformers' MistralForCausalLM.
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
    """The model that a Mistral's config.json describes."""
    require_plain(hf)
    hf.require("layer_types", None)
    window = hf.optional_integer("sliding_window", absent=4096)
    attention = read_attention(hf, theta=1e4, window=window)
    return read_model(hf, attention, one_expert(hf), norm_epsilon=epsilon(hf, default=1e-6))
