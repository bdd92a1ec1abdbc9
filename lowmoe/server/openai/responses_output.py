"""The items of a response as they are made: what was thought, said and called.

Knows:        the shape of each kind of item, and by which events it comes into being.
Ignorant of:  requests, the response they are of, sequence numbers.
"""

import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

from lowmoe.server.asking import ChosenToken
from lowmoe.server.openai.answers import chances_of

# The name of an event, without "response.", and its fields.
Happened: TypeAlias = tuple[str, dict[str, Any]]
Status: TypeAlias = Literal["in_progress", "completed", "incomplete"]


class Item(Protocol):
    """One item of a response."""

    @property
    def index(self) -> int:
        """Its place."""

    def item(self, status: Status) -> dict[str, Any]:
        """As it is now."""

    def begin(self) -> Iterator[Happened]:
        """What happens after it was added."""

    def end(self) -> Iterator[Happened]:
        """What happens before it is done."""


def identity(prefix: str) -> str:
    """A new one."""
    return f"{prefix}_{uuid.uuid4().hex}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Words:
    """How one kind of text is called: the item, its only part, their events, the part's list."""

    type: str
    prefix: str  # of the item's id
    part: str
    part_event: str
    text_event: str
    key: Literal["content", "summary"]


_SAID = _Words(
    type="message",
    prefix="msg",
    part="output_text",
    part_event="content_part",
    text_event="output_text",
    key="content",
)
_THOUGHT = _Words(
    type="reasoning",
    prefix="rs",
    part="reasoning_text",
    part_event="content_part",
    text_event="reasoning_text",
    key="content",
)
_SUMMED_UP = _Words(
    type="reasoning",
    prefix="rs",
    part="summary_text",
    part_event="reasoning_summary_part",
    text_event="reasoning_summary_text",
    key="summary",
)


class Writing:
    """An item of one part, which is a text: of the answer, or of the thinking before it."""

    def __init__(self, index: int, words: _Words) -> None:
        self.index, self.words = index, words
        self._id = identity(words.prefix)
        self._pieces: list[str] = []
        self._tokens: list[ChosenToken] = []

    @staticmethod
    def said(index: int) -> "Writing":
        """Of the answer."""
        return Writing(index, _SAID)

    @staticmethod
    def thought(index: int, *, as_summary: bool) -> "Writing":
        """Of the thinking."""
        return Writing(index, _SUMMED_UP if as_summary else _THOUGHT)

    @property
    def of_answer(self) -> bool:
        """Or of the thinking."""
        return self.words is _SAID

    def item(self, status: Status) -> dict[str, Any]:
        """As it is now."""
        part = [] if status == "in_progress" else [self._part()]
        item: dict[str, Any] = {"id": self._id, "type": self.words.type, "status": status}
        if self.of_answer:
            return {**item, "role": "assistant", "content": part}
        return {**item, "summary": [], self.words.key: part}

    def begin(self) -> Iterator[Happened]:
        """Its part is added."""
        yield f"{self.words.part_event}.added", {**self._place(), "part": self._part()}

    def more(self, text: str, tokens: Sequence[ChosenToken]) -> Iterator[Happened]:
        """So much more of it."""
        self._pieces.append(text)
        fields: dict[str, Any] = {"delta": text}
        if self.of_answer:
            self._tokens += tokens
            fields |= {"logprobs": chances_of(tokens)}
        yield f"{self.words.text_event}.delta", {**self._place(), **fields}

    def end(self) -> Iterator[Happened]:
        """Its text and its part are done."""
        text = {key: value for key, value in self._part().items() if key in ("text", "logprobs")}
        yield f"{self.words.text_event}.done", {**self._place(), **text}
        yield f"{self.words.part_event}.done", {**self._place(), "part": self._part()}

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._id, "output_index": self.index, f"{self.words.key}_index": 0}

    def _part(self) -> dict[str, Any]:
        part: dict[str, Any] = {"type": self.words.part, "text": "".join(self._pieces)}
        if self.of_answer:
            part |= {"annotations": [], "logprobs": chances_of(self._tokens)}
        return part


@dataclass(slots=True)
class Calling:
    """A call of a tool.  names: namespaces, and names in them, of those that have one."""

    index: int
    call_id: str
    name: str
    names: Mapping[str, tuple[str, str]]
    arguments: str = ""
    _id: str = field(default_factory=lambda: identity("fc"))

    def item(self, status: Status) -> dict[str, Any]:
        """As it is now."""
        namespace, name = self.names.get(self.name, (None, self.name))
        item = {
            "id": self._id,
            "type": "function_call",
            "status": status,
            "call_id": self.call_id,
            "name": name,
            "arguments": self.arguments,
        }
        return item if namespace is None else {**item, "namespace": namespace}

    def begin(self) -> Iterator[Happened]:
        """Nothing yet."""
        yield from ()

    def more(self, json: str) -> Iterator[Happened]:
        """So much more of its arguments."""
        self.arguments += json
        yield "function_call_arguments.delta", {**self._place(), "delta": json}

    def end(self) -> Iterator[Happened]:
        """Its arguments are done."""
        yield "function_call_arguments.done", {**self._place(), "arguments": self.arguments}

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._id, "output_index": self.index}
