"""Short names of models, and the shapes by which they are benchmarked without a download.

Knows:        which hub repository an alias stands for, and that repository's config.json.
Ignorant of:  whether the model has been pulled.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lowmoe.families.hub_models import HUB_MODELS
from lowmoe.families.licences import LICENCES

DEMO = "demo"

# Models that were not made to answer; the first Qwen and DeepSeek-V3.2, whose makers write prompts
# in code; GPT-2's tokenizer never had one.
_WITHOUT_TEMPLATE = frozenset(
    (
        "Qwen/Qwen-72B-Chat",
        "Skywork/Skywork-MoE-Base",
        "Skywork/Skywork-MoE-Base-FP8",
        "deepseek-ai/DeepSeek-V3.2",
        "hpcai-tech/grok-1",
        "mistralai/Mixtral-8x22B-v0.1",
        "mistralai/Mixtral-8x7B-v0.1",
        "openai-community/gpt2",
        "openai-community/gpt2-large",
        "openai-community/gpt2-medium",
        "openai-community/gpt2-xl",
    )
)


@dataclass(frozen=True, slots=True)
class Alias:
    """A hub repository, what its config.json says that decides shapes, and its licence's name.

    licence: None where its page names none; chats: whether its files have a chat template, which a
    pull keeps from wherever it is among them.
    """

    repository: str
    config: Mapping[str, Any]
    licence: str | None
    chats: bool


ALIASES: Mapping[str, Alias] = {
    name: Alias(repository, config, LICENCES.get(repository), repository not in _WITHOUT_TEMPLATE)
    for name, (repository, config) in HUB_MODELS.items()
}


def near_names(name: str) -> list[str]:
    """Aliases that look like `name`, nearest first."""
    return difflib.get_close_matches(name.lower(), [DEMO, *ALIASES], n=3, cutoff=0.5)


def hint_of(name: str) -> str:
    """What to say of aliases to whoever gave none: the nearest, or how to see all."""
    near = near_names(name)
    meant = f"Did you mean {' or '.join(near)}? " if near else ""
    return f"{meant}`lowmoe list --aliases` shows all aliases."
