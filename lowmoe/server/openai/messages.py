"""A chat's messages: from OpenAI's roles and parts to turns in nobody's dialect.

Knows:        what a message of which role holds, what clients send back of earlier answers.
Ignorant of:  sampling, tools' descriptions, chat templates.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from lowmoe.engine.messages import Message
from lowmoe.server.errors import FieldError
from lowmoe.server.fields import (
    MAX_MESSAGES,
    MAX_TOOLS,
    Fields,
    Identity,
    Ignored,
    Refused,
    Text,
)
from lowmoe.server.openai.parts import parts
from lowmoe.server.openai.tools import CallFields


class MessageFields(Fields):
    """One turn.  What an assistant's message holds besides, answers of this server held too.

    reasoning: as reasoning_content, which others call so; parsed: the content again, left there by
    OpenAI's client; name: chat templates know that of a tool alone, others are not told.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[Text | None, parts("text", "refusal")] = None
    reasoning_content: Text | None = None
    reasoning: Text | None = None
    refusal: Text | None = None
    tool_calls: Annotated[list[CallFields], Field(max_length=MAX_TOOLS)] | None = None
    tool_call_id: Identity | None = None
    name: Identity | None = None
    function_call: Refused = None
    audio: Refused = None
    annotations: Ignored = None
    parsed: Ignored = None


MessagesField: TypeAlias = Annotated[
    list[MessageFields], Field(min_length=1, max_length=MAX_MESSAGES)
]


def read_messages(fields: Sequence[MessageFields]) -> tuple[Message, ...]:
    """The turns.  Raises FieldError for what does not belong together, by the message's number."""
    called: dict[str, str] = {}
    turns = []
    for number, one in enumerate(fields):
        place = f"messages.{number}"
        if one.role == "assistant":
            turns.append(_assistant(one, place))
            called |= {call.id: call.name for call in turns[-1].calls}
        elif one.tool_calls:
            raise FieldError(f"{place}.tool_calls", f"a {one.role} calls no tools. Leave it out.")
        elif one.content is None:
            raise FieldError(f"{place}.content", "is missing. Give a text.")
        elif one.role == "tool":
            turns.append(_result(one.content, one, called, place))
        else:
            role: Literal["user", "system"] = "user" if one.role == "user" else "system"
            turns.append(Message(role=role, content=one.content))
    return with_one_system(turns)


def _assistant(fields: MessageFields, place: str) -> Message:
    content = fields.content if fields.content is not None else fields.refusal
    thinking = fields.reasoning_content or fields.reasoning or ""
    calls = tuple(call.call() for call in fields.tool_calls or ())
    if content is None and not calls and not thinking:
        raise FieldError(f"{place}.content", "is missing. Give a text, or tool_calls.")
    return Message(role="assistant", content=content or "", thinking=thinking, calls=calls)


def _result(content: str, fields: MessageFields, called: dict[str, str], place: str) -> Message:
    identity = fields.tool_call_id
    if identity is None:
        raise FieldError(f"{place}.tool_call_id", "is missing. Say which call this answers.")
    return result(identity, content, fields.name, called, f"{place}.tool_call_id")


def result(
    identity: str, content: str, name: str | None, called: dict[str, str], field: str
) -> Message:
    """What a tool gave back.  called: names of the calls so far, by their ids.

    Raises FieldError for one that nobody asked for.
    """
    name = called.get(identity, name)
    if name is None:
        raise FieldError(
            field, f"no earlier message calls a tool as {identity[:100]}. Send it too."
        )
    return Message(role="tool", content=content, call_id=identity, name=name)


def with_one_system(turns: Iterable[Message]) -> tuple[Message, ...]:
    """The same with one system message where several begin it: chat templates know only one."""
    turns = tuple(turns)
    begin = list(itertools.takewhile(lambda turn: turn.role == "system", turns))
    if len(begin) < 2:
        return turns
    content = "\n\n".join(turn.content for turn in begin)
    return (replace(begin[0], content=content), *turns[len(begin) :])


def thinks(effort: str | None, kwargs: "TemplateFields | None") -> bool | None:
    """Whether to think first: as the chat template is told, else by effort, else None."""
    told = None if kwargs is None else kwargs.told
    if told is not None:
        return told
    return None if effort is None else effort != "none"


Effort: TypeAlias = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class TemplateFields(Fields):
    """What vLLM and llama.cpp let a request tell the chat template; no more than this."""

    enable_thinking: bool | None = None
    thinking: bool | None = None  # as DeepSeek's and Granite's templates call it

    @property
    def told(self) -> bool | None:
        """Whether to think first."""
        return self.thinking if self.enable_thinking is None else self.enable_thinking
