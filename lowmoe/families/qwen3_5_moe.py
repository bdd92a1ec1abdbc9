"""Qwen3.5 and 3.6 MoE as published: their text within a model that sees too, of which only text is
read. Every token has one position there, not three.
"""

from collections.abc import Mapping
from dataclasses import replace

from lowmoe.errors import CheckpointError
from lowmoe.families import qwen3_5_moe_text
from lowmoe.spec import HfConfig, ModelSpec, Stored


def _inside(names: Mapping[str, str | Stored]) -> Mapping[str, str | Stored]:
    def moved(name: str) -> str:
        inside = name.startswith("model.")
        return name.replace("model.", "model.language_model.", 1) if inside else name

    return {
        role: moved(entry) if isinstance(entry, str) else replace(entry, name=moved(entry.name))
        for role, entry in names.items()
    }


NAMES = _inside(qwen3_5_moe_text.NAMES)
OTHER_NAMES = _inside(qwen3_5_moe_text.OTHER_NAMES)


def spec(hf: HfConfig) -> ModelSpec:
    """The model that the text part of a config.json of this kind describes."""
    text = hf.values.get("text_config")
    if not isinstance(text, dict):
        raise CheckpointError(f"config.json: text_config is {text!r}, but must be a table.")
    HfConfig(text).require("quantization_config", None)  # it is the whole model's
    of_all = {
        key: hf.values[key] for key in ("model_type", "tie_word_embeddings") if key in hf.values
    }
    return qwen3_5_moe_text.spec(HfConfig({**text, **of_all}))
