"""Short names of models, and the shapes of those that are worth benchmarking without a download.

Knows:        which hub repository an alias stands for, and that repository's config.json.
Ignorant of:  whether the model has been pulled.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

DEMO = "demo"


@dataclass(frozen=True, slots=True)
class Alias:
    """A hub repository and what its config.json says that decides shapes."""

    repository: str
    config: Mapping[str, Any]


def _mixtral(
    *, layers: int, hidden: int, inner: int, heads: int, experts: int, vocab: int, context: int,
    theta: float,
) -> Mapping[str, Any]:  # fmt: skip
    return {
        "model_type": "mixtral",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "max_position_embeddings": context,
        "num_attention_heads": heads,
        "num_experts_per_tok": 2,
        "num_hidden_layers": layers,
        "num_key_value_heads": 8,
        "num_local_experts": experts,
        "rms_norm_eps": 1e-5,
        "rope_theta": theta,
        "tie_word_embeddings": False,
        "vocab_size": vocab,
    }


_8X7B = _mixtral(
    layers=32, hidden=4096, inner=14336, heads=32, experts=8, vocab=32000, context=32768, theta=1e6
)  # fmt: skip
_8X22B = _mixtral(
    layers=56, hidden=6144, inner=16384, heads=48, experts=8, vocab=32000, context=65536, theta=1e6
)  # fmt: skip
_APUS = _mixtral(
    layers=60, hidden=7168, inner=20480, heads=56, experts=4, vocab=64000, context=32768, theta=1e7
)  # fmt: skip

ALIASES: Mapping[str, Alias] = {
    "apus-xdan-4.0": Alias("xDAN2099/APUS-xDAN-4.0-MoE-v2", _APUS),
    "mixtral-8x22b": Alias(
        "mistralai/Mixtral-8x22B-Instruct-v0.1", {**_8X22B, "vocab_size": 32768}
    ),
    "mixtral-8x22b-base": Alias("mistralai/Mixtral-8x22B-v0.1", _8X22B),
    "mixtral-8x7b": Alias("mistralai/Mixtral-8x7B-Instruct-v0.1", _8X7B),
    "mixtral-8x7b-base": Alias("mistralai/Mixtral-8x7B-v0.1", _8X7B),
}


def near_names(name: str) -> list[str]:
    """Aliases that look like `name`, nearest first."""
    return difflib.get_close_matches(name.lower(), [DEMO, *ALIASES], n=3, cutoff=0.5)
