"""A conversation with tools: what was said, called and answered.

Knows:        roles, thinking, tools, calls and their results, as chat templates know them.
Ignorant of:  how a client spelled them, how a model spells them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

Role: TypeAlias = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """One call of a tool.  id: by which its result is known; arguments: a JSON object, read."""

    id: str
    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A function the model may call.  parameters: the JSON schema of its arguments, an object."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(
        default_factory=lambda: {"type": "object", "properties": {}}
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolChoice:
    """Which tools an answer may or must call.

    mode: none of them, as the model likes, or at least one.  name: only this one, with "required".
    parallel: whether it may call several.
    """

    mode: Literal["none", "auto", "required"] = "auto"
    name: str | None = None
    parallel: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn.  thinking: what the assistant thought before it; call_id, name: of a tool's result,
    which call it answers.
    """

    role: Role
    content: str = ""
    thinking: str = ""
    calls: Sequence[ToolCall] = ()
    call_id: str | None = None
    name: str | None = None
