"""What form an answer must have.

Knows:        the kinds of forms that can be asked for.
Ignorant of:  how a form is kept to, how a client asked for it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias


@dataclass(frozen=True, slots=True)
class JsonSchema:
    """JSON that this schema accepts; {"type": "object"} for any object."""

    schema: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Regex:
    """A text that this regular expression matches from its first to its last character."""

    pattern: str


@dataclass(frozen=True, slots=True)
class Grammar:
    """A text that this context-free grammar, in Lark's notation, derives.

    from_start: the text is all that the model writes, its thinking and what stands around that too.
    """

    lark: str
    from_start: bool = False


Constraint: TypeAlias = JsonSchema | Regex | Grammar
