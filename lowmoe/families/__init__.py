"""Every model family, a line each; the only room that knows Hugging Face's names.

Knows:        which model_type is which family, what each calls its tensors.
Ignorant of:  what any of the tensors is for at run time.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from lowmoe.errors import CheckpointError, UnsupportedModelError
from lowmoe.families import mixtral
from lowmoe.spec import HfConfig, ModelSpec, Role

FAMILIES: Mapping[str, ModuleType] = {mixtral.MODEL_TYPE: mixtral}

# Keys by which a config asks for code of its own to be run, or reaches into transformers' loader.
_DANGEROUS = ("auto_map", "trust_remote_code", "_attn_implementation_internal")


@dataclass(frozen=True, slots=True)
class Family:
    """A model's spec, and the names its checkpoint gives to every role."""

    spec: ModelSpec
    templates: Mapping[str, str]

    def tensor_name(self, role: Role) -> str:
        """The checkpoint's name for a role."""
        return self.templates[role.name].format(layer=role.layer_id, expert=role.expert_id)


def read_config(config: Mapping[str, Any]) -> Family:
    """The family of a config.json.  Raises UnsupportedModelError for what nobody implemented."""
    dangerous = [key for key in _DANGEROUS if key in config]
    if dangerous:
        raise UnsupportedModelError(
            f"config.json has {', '.join(dangerous)}: it wants code of its own to run, and lowmoe "
            "never runs a checkpoint's code. Look for a conversion of the model without it."
        )
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError(
            f"config.json: model_type is {model_type!r}, but must name a model family. "
            "Is this a model's config.json?"
        )
    if model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"config.json: model_type is {model_type!r}, but implemented are "
            f"{', '.join(sorted(FAMILIES))}."
        )
    module = FAMILIES[model_type]
    return Family(module.spec(HfConfig(config)), module.NAMES)
