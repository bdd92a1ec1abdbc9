"""Models as GGUF files describe them: what a config.json would say, and who is called what.

`model` reads the header's values, `config` puts them in config.json's words, with what many have in
`usual`, kinds of their own in `grouped`, `recurrent` and `rope`; `names` and `names_of_states` say
where roles lie, `tokenizer` and `splits` make a tokenizer.json.

Knows:        llama.cpp's names of families, values and tensors.
Ignorant of:  files.
"""

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import replace
from typing import Any

from lowmoe.errors import CheckpointError
from lowmoe.families import Family, read_config
from lowmoe.families.gguf.config import config_of
from lowmoe.families.gguf.model import ARCHITECTURE, GgufModel
from lowmoe.families.gguf.names import ignored, table
from lowmoe.families.gguf.tokenizer import gguf_small_file

__all__ = ["gguf_config", "gguf_family", "gguf_small_file"]


def gguf_config(
    values: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    vector: Callable[[str], Sequence[float]],
) -> dict[str, Any]:
    """The config.json of the model of a GGUF file.

    values: its header's, by key; shapes: of its tensors, rows first; vector: reads one.
    Raises CheckpointError for values that make no sense, UnsupportedModelError for a model that is
    not implemented.
    """
    return config_of(GgufModel(values=values, shapes=shapes, vector=vector))


def gguf_family(config: Mapping[str, Any], values: Mapping[str, Any], names: Set[str]) -> Family:
    """The family of that config, with the names that the file has.  names: of its tensors.

    Raises CheckpointError, UnsupportedModelError as gguf_config does.
    """
    try:
        family = read_config(config)
    except CheckpointError as e:
        raise type(e)(f"GGUF, in the words of a {e}") from e
    return replace(
        family,
        table=table(str(values[ARCHITECTURE]), names),
        ignored=ignored(len(family.spec.layers), names),
        others={},
    )
