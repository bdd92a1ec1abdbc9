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


@dataclass(frozen=True, slots=True)
class Alias:
    """A hub repository, what its config.json says that decides shapes, and its licence's name.

    licence: None where its page names none.
    """

    repository: str
    config: Mapping[str, Any]
    licence: str | None


ALIASES: Mapping[str, Alias] = {
    name: Alias(repository, config, LICENCES.get(repository))
    for name, (repository, config) in HUB_MODELS.items()
}


def near_names(name: str) -> list[str]:
    """Aliases that look like `name`, nearest first."""
    return difflib.get_close_matches(name.lower(), [DEMO, *ALIASES], n=3, cutoff=0.5)
