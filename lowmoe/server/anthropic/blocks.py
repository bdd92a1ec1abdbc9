"""A conversation's turns: from Anthropic's blocks to messages in nobody's dialect.

Knows:        what a turn of which role holds.
Ignorant of:  sampling, tools' descriptions, chat templates.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, Field

from lowmoe.engine.messages import Message, ToolCall
from lowmoe.server.errors import FieldError
from lowmoe.server.fields import (
    MAX_MESSAGES,
    MAX_PARTS,
    Fields,
    FunctionName,
    Identity,
    Ignored,
    Text,
    fault,
    only,
)

# Between blocks of one turn, which Anthropic's API keeps apart and chat templates do not.
BETWEEN = "\n\n"
_UNREAD = ("image", "document", "redacted_thinking", "search_result")


def _as_list(value: object) -> object:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


def _readable(value: object) -> object:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind in _UNREAD:
        raise fault("is of type {kind}, which no model here can read. Give text", kind=kind)
    return value


class TextBlock(Fields):
    """A text.  cache_control: a hint; every prefix is cached here."""

    type: Literal["text"]
    text: Text
    cache_control: Ignored = None
    citations: Annotated[Any, only([])] = None


class ThinkingBlock(Fields):
    """What the assistant thought; signature: by Anthropic, of its own models."""

    type: Literal["thinking"]
    thinking: Text
    signature: Ignored = None
    cache_control: Ignored = None


class ToolUseBlock(Fields):
    """A call of a tool."""

    type: Literal["tool_use"]
    id: Identity
    name: FunctionName
    input: dict[str, Any]
    cache_control: Ignored = None
    caller: Annotated[Any, only({"type": "direct"})] = None
    toolset_name: Annotated[Any, only()] = None


Texts: TypeAlias = Annotated[
    list[Annotated[TextBlock, BeforeValidator(_readable)]],
    Field(max_length=MAX_PARTS),
    BeforeValidator(_as_list, json_schema_input_type=str | list[TextBlock]),
]


class ToolResultBlock(Fields):
    """What a call gave back."""

    type: Literal["tool_result"]
    tool_use_id: Identity
    content: Texts = Field(default_factory=list)
    is_error: bool | None = None
    cache_control: Ignored = None
    toolset_name: Annotated[Any, only()] = None


_Block: TypeAlias = Annotated[
    TextBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock, Field(discriminator="type")
]
_Blocks: TypeAlias = Annotated[
    list[Annotated[_Block, BeforeValidator(_readable)]],
    Field(max_length=MAX_PARTS),
    BeforeValidator(_as_list, json_schema_input_type=str | list[_Block]),
]


class TurnFields(Fields):
    """One turn."""

    role: Literal["user", "assistant", "system"]
    content: Annotated[_Blocks, Field(min_length=1)]


TurnsField: TypeAlias = Annotated[list[TurnFields], Field(min_length=1, max_length=MAX_MESSAGES)]


@dataclass(slots=True)
class _Turn:
    """A turn while its blocks are read; joined once, as a client may send a hundred thousand."""

    role: Literal["user", "assistant", "system"]
    texts: list[str] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)

    def message(self) -> Message:
        """The turn as one message."""
        return Message(
            role=self.role,
            content=BETWEEN.join(filter(None, self.texts)),
            thinking=BETWEEN.join(filter(None, self.thoughts)),
            calls=tuple(self.calls),
        )

    def take(self, block: TextBlock | ThinkingBlock | ToolUseBlock) -> None:
        """Add the next block."""
        match block:
            case TextBlock():
                self.texts.append(block.text)
            case ThinkingBlock():
                self.thoughts.append(block.thinking)
            case ToolUseBlock():
                call = ToolCall(id=block.id, name=block.name, arguments=block.input)
                self.calls.append(call)


def read_turns(system: Sequence[TextBlock], turns: Sequence[TurnFields]) -> tuple[Message, ...]:
    """The conversation, consecutive turns of one role as one, as Anthropic's API takes them.

    Raises FieldError for blocks where they do not belong.
    """
    read: list[_Turn | Message] = []
    if system:
        read.append(_Turn("system", [block.text for block in system]))
    called: dict[str, str] = {}  # names of the calls so far, by their ids
    for number, turn in enumerate(turns):
        for index, block in enumerate(turn.content):
            place = f"messages.{number}.content.{index}"
            _require_place(turn.role, block, place)
            if isinstance(block, ToolResultBlock):
                read.append(_result(block, called, place))
                continue
            last = read[-1] if read else None
            if not isinstance(last, _Turn) or last.role != turn.role:
                last = _Turn(turn.role)
                read.append(last)
            last.take(block)
            if isinstance(block, ToolUseBlock):
                called[block.id] = block.name
    if isinstance(read[-1], _Turn) and read[-1].role == "assistant":
        raise FieldError(
            "messages", "the last is the assistant's, which is not gone on with. End with a user's."
        )
    return tuple(one.message() if isinstance(one, _Turn) else one for one in read)


def _require_place(role: str, block: _Block, place: str) -> None:
    """Return if such a block may be in a turn of this role.  Raises FieldError."""
    owner = {"tool_result": "user", "tool_use": "assistant", "thinking": "assistant"}
    if owner.get(block.type, role) != role:
        raise FieldError(
            place,
            f"a {block.type} block does not belong in a turn of the {role}. Leave it out.",
        )


def _result(block: ToolResultBlock, called: Mapping[str, str], place: str) -> Message:
    name = called.get(block.tool_use_id)
    if name is None:
        raise FieldError(
            f"{place}.tool_use_id",
            f"no earlier turn calls a tool as {block.tool_use_id[:100]}. Send it too.",
        )
    text = BETWEEN.join(part.text for part in block.content)
    # Chat templates know of results, not of failures; nor would a model see a flag.
    content = f"Error: {text}" if block.is_error else text
    return Message(role="tool", content=content, call_id=block.tool_use_id, name=name)
