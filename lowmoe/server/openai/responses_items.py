"""The input of /v1/responses: from items to turns in nobody's dialect.

Knows:        which items there are, which of them together are one turn of the assistant.
Ignorant of:  the rest of the request, chat templates.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, Discriminator, Field, Tag

from lowmoe.engine.messages import Message, ToolCall
from lowmoe.server.fields import (
    MAX_MESSAGES,
    MAX_PARTS,
    Fields,
    FunctionName,
    Identity,
    Ignored,
    Refused,
    Text,
    fault,
)
from lowmoe.server.openai.messages import result, with_one_system
from lowmoe.server.openai.parts import parts
from lowmoe.server.openai.tools import Arguments, name_in, read_arguments


class _Item(Fields):
    id: Annotated[str, Field(max_length=512)] | None = None
    status: Ignored = None


class MessageItem(_Item):
    """What somebody said."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Annotated[Text, parts("input_text", "output_text", "refusal")]
    phase: Ignored = None


class CallItem(_Item):
    """What the assistant called.  parsed_arguments: left there by OpenAI's client."""

    type: Literal["function_call"]
    call_id: Identity
    name: FunctionName
    namespace: FunctionName | None = None
    arguments: Arguments
    parsed_arguments: Ignored = None


class ResultItem(_Item):
    """What the tool gave back."""

    type: Literal["function_call_output"]
    call_id: Identity
    output: Annotated[Text, parts("input_text", "output_text")]
    name: FunctionName | None = None


class SummaryPart(Fields):
    """A piece of what was thought."""

    type: Literal["summary_text"]
    text: Text


class ThoughtPart(Fields):
    """A piece of what was thought."""

    type: Literal["reasoning_text"]
    text: Text


class ReasoningItem(_Item):
    """What the assistant thought; told as it was, or as its own summary, never both."""

    type: Literal["reasoning"]
    summary: Annotated[list[SummaryPart], Field(max_length=MAX_PARTS)]
    content: Annotated[list[ThoughtPart], Field(max_length=MAX_PARTS)] | None = None
    encrypted_content: Refused = None  # only who encrypted it can read it

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(part.text for part in self.content or self.summary)


_TYPES = ("message", "function_call", "function_call_output", "reasoning")


def _known(item: object) -> object:
    kind = _type_of(item)
    if isinstance(item, dict) and kind not in _TYPES:
        raise fault(
            "is of type {kind}, which is not supported. Give {known}",
            kind=repr(kind)[:100],
            known=" or ".join(_TYPES),
        )
    return item


def _type_of(item: Any) -> Any:
    if isinstance(item, dict):
        return item.get("type", "message")
    return getattr(item, "type", None)


Item: TypeAlias = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[ResultItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(_type_of),
    BeforeValidator(_known),
]


def _listed(value: object) -> object:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


_Items: TypeAlias = Annotated[list[Item], Field(min_length=1, max_length=MAX_MESSAGES)]
InputField: TypeAlias = Annotated[
    _Items, BeforeValidator(_listed, json_schema_input_type=Text | _Items)
]


def read_items(items: Sequence[Item], instructions: str | None) -> tuple[Message, ...]:
    """The turns.  Raises FieldError for the result of a call that nobody made."""
    said = [] if instructions is None else [Message(role="system", content=instructions)]
    return with_one_system([*said, *_turns(items)])


def _turns(items: Sequence[Item]) -> Iterator[Message]:
    called: dict[str, str] = {}
    for of_assistant, several in groupby(enumerate(items), lambda one: _of_assistant(one[1])):
        if of_assistant:
            turn = _assistant([item for _, item in several])
            called |= {call.id: call.name for call in turn.calls}
            yield turn
            continue
        for number, item in several:
            if isinstance(item, ResultItem):
                place = f"input.{number}.call_id"
                yield result(item.call_id, item.output, item.name, called, place)
            elif isinstance(item, MessageItem):
                yield Message(
                    role="user" if item.role == "user" else "system", content=item.content
                )


def _of_assistant(item: Item) -> bool:
    if isinstance(item, MessageItem):
        return item.role == "assistant"
    return not isinstance(item, ResultItem)


def _assistant(items: Sequence[Item]) -> Message:
    """One turn: chat templates have results follow a turn, and turns of others between two."""
    calls = [
        ToolCall(
            id=item.call_id,
            name=name_in(item.namespace, item.name),
            arguments=read_arguments(item.arguments),
        )
        for item in items
        if isinstance(item, CallItem)
    ]
    return Message(
        role="assistant",
        content="\n\n".join(item.content for item in items if isinstance(item, MessageItem)),
        thinking="\n\n".join(item.text for item in items if isinstance(item, ReasoningItem)),
        calls=tuple(calls),
    )
