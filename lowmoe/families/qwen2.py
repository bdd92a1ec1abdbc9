"""Qwen1.5, Qwen2 and Qwen2.5: dense, biases of queries, keys and values.

Source: arXiv 2309.16609, 2407.10671; transformers' Qwen2ForCausalLM.
"""

from dataclasses import replace

from lowmoe.families.names import decoder_names, dense_names
from lowmoe.families.reading import (
    deep_windows,
    epsilon,
    one_expert,
    read_attention,
    read_model,
    require_plain,
    windows,
)
from lowmoe.spec import HfConfig, ModelSpec

_WINDOW = 4096  # where the config does not say
NAMES = {**decoder_names(), **dense_names()}


def spec(hf: HfConfig) -> ModelSpec:
    """The model that a Qwen2's config.json describes."""
    require_plain(hf)
    attention = read_attention(hf, theta=1e4, qkv_bias=True)
    layers = [replace(attention, window=window) for window in _windows(hf)]
    return read_model(hf, layers, one_expert(hf), norm_epsilon=epsilon(hf, default=1e-6))


def _windows(hf: HfConfig) -> list[int | None]:
    """The layers from max_window_layers on slide, where the config says that any do."""
    if not hf.boolean("use_sliding_window", default=False):
        return deep_windows(hf, None, first=28)
    window = hf.integer("sliding_window", default=_WINDOW)
    return windows(hf, deep_windows(hf, window, first=28), size=_WINDOW)
