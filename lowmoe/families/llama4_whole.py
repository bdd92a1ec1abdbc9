"""Llama 4 as published: its text within a model that sees too, of which only text is read."""

from dataclasses import replace

from lowmoe.errors import CheckpointError
from lowmoe.families import llama4
from lowmoe.spec import HfConfig, ModelSpec, Stored


def _inside(entry: str | Stored) -> str | Stored:
    if isinstance(entry, str):
        return f"language_model.{entry}"
    return replace(entry, name=f"language_model.{entry.name}")


NAMES = {role: _inside(entry) for role, entry in llama4.NAMES.items()}


def spec(hf: HfConfig) -> ModelSpec:
    """The model that the text part of a Llama 4's config.json describes."""
    text = hf.values.get("text_config")
    if not isinstance(text, dict):
        raise CheckpointError(f"config.json: text_config is {text!r}, but must be a table.")
    return llama4.spec(HfConfig({**text, "model_type": hf.values["model_type"]}))
