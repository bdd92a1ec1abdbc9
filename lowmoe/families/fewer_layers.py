"""A model's shape with fewer layers, to be measured where the whole does not fit the disk.

Knows:        by which keys configs count layers, list them and pick some by number.
Ignorant of:  what is in a layer.
"""

from collections.abc import Mapping
from typing import Any

from lowmoe.errors import CheckpointError, UsageError

_COUNTS = ("num_hidden_layers", "n_layers", "n_layer", "num_layers")
# Layers by their numbers, while other lists have an entry for each layer.
_PICKS = ("mlp_only_layers", "moe_layers", "full_attn_idxs")
_LASTS = ("moe_layer_end_index",)  # -1 is the last of all
_HOW_MANY = ("first_k_dense_replace",)


def with_layers(config: Mapping[str, Any], n_layers: int) -> dict[str, Any]:
    """The config.json of a model that ends after its first n_layers layers.

    Raises UsageError where it has fewer, CheckpointError where it does not say how many.
    """
    if isinstance(text := config.get("text_config"), Mapping):
        return {**config, "text_config": with_layers(text, n_layers)}
    key = next((key for key in _COUNTS if isinstance(config.get(key), int)), None)
    if key is None:
        raise CheckpointError(
            f"config.json: none of {', '.join(_COUNTS)} says how many layers there are. Is this a "
            "model's config.json?"
        )
    if not 1 <= n_layers <= config[key]:
        raise UsageError(
            f"--layers is {n_layers}, but must be 1 to {config[key]}, as many as the model has."
        )
    return {name: _cut(name, value, config[key], n_layers) for name, value in config.items()} | {
        key: n_layers
    }


def _cut(name: str, value: object, n_all: int, n_layers: int) -> object:
    if name in _LASTS and isinstance(value, int):
        return value if value < n_layers - 1 else -1
    if name in _HOW_MANY and isinstance(value, int):
        return min(value, n_layers)
    if not isinstance(value, list):
        return value
    if name in _PICKS:
        return [i for i in value if not isinstance(i, int) or i < n_layers]
    return value[:n_layers] if len(value) == n_all else value
