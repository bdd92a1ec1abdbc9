"""A conversation's turns: from Anthropic's blocks to messages in nobody's dialect.

Knows:        what a turn of which role holds.
Ignorant of:  sampling, tools' descriptions, chat templates.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
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


def joined(texts: Iterable[TextBlock]) -> str:
    """All of them as one."""
    return BETWEEN.join(block.text for block in texts)


def read_turns(system: Sequence[TextBlock], turns: Sequence[TurnFields]) -> tuple[Message, ...]:
    """The conversation, consecutive turns of one role as one, as Anthropic's API takes them.

    Raises FieldError for blocks where they do not belong.
    """
    messages = [Message(role="system", content=joined(system))] if system else []
    called: dict[str, str] = {}
    for number, turn in enumerate(turns):
        for message in _messages(turn, called, f"messages.{number}.content"):
            called |= {call.id: call.name for call in message.calls}
            if messages and messages[-1].role == message.role != "tool":
                message = _both(messages.pop(), message)
            messages.append(message)
    if messages[-1].role == "assistant":
        raise FieldError(
            "messages", "the last is the assistant's, which is not gone on with. End with a user's."
        )
    return tuple(messages)


def _both(first: Message, second: Message) -> Message:
    return replace(
        first,
        content=BETWEEN.join(filter(None, (first.content, second.content))),
        thinking=BETWEEN.join(filter(None, (first.thinking, second.thinking))),
        calls=(*first.calls, *second.calls),
    )


def _messages(turn: TurnFields, called: Mapping[str, str], place: str) -> Iterator[Message]:
    """One for each block.  called: names of the calls so far, by their ids."""
    for number, block in enumerate(turn.content):
        match turn.role, block:
            case _, TextBlock():
                yield Message(role=turn.role, content=block.text)
            case "assistant", ThinkingBlock():
                yield Message(role="assistant", thinking=block.thinking)
            case "assistant", ToolUseBlock():
                call = ToolCall(id=block.id, name=block.name, arguments=block.input)
                yield Message(role="assistant", calls=(call,))
            case "user", ToolResultBlock():
                yield _result(block, called, f"{place}.{number}")
            case _:
                found = f"a {block.type} block does not belong in a turn of the {turn.role}."
                raise FieldError(f"{place}.{number}", f"{found} Leave it out.")


def _result(block: ToolResultBlock, called: Mapping[str, str], place: str) -> Message:
    name = called.get(block.tool_use_id)
    if name is None:
        raise FieldError(
            f"{place}.tool_use_id",
            f"no earlier turn calls a tool as {block.tool_use_id[:100]}. Send it too.",
        )
    text = joined(block.content)
    # Chat templates know of results, not of failures; nor would a model see a flag.
    content = f"Error: {text}" if block.is_error else text
    return Message(role="tool", content=content, call_id=block.tool_use_id, name=name)
