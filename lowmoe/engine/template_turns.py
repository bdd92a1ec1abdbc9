"""A conversation with tools, put as a model's chat template can write it down.

Knows:        what chat templates are given; what is done for one that knows no tools.
Ignorant of:  how a template is run, how control tokens are marked.

A template without tools is helped: their definitions go into the system message, calls into the
text of answers, results into a user's turn, all as most models learned it. One that refuses system
messages gets them at the head of the first user's turn, as its later versions do themselves.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from lowmoe.engine.messages import Message, Tool, ToolCall
from lowmoe.engine.template_habits import Habits
from lowmoe.engine.tool_calls.definitions import definition, to_json
from lowmoe.engine.tool_calls.style import Style

_DEFINITIONS = """\
# Tools

You may call these functions to answer, each given as JSON with the schema of its arguments:
<tools>
{tools}
</tools>

To call a function, write its name and its arguments like this, and end your answer there:
{example}"""
_EXAMPLE = ToolCall(id="", name="function-name", arguments={"argument-name": "value"})
_SHORT_ID = re.compile(r"[A-Za-z0-9]{9}")
_RESULT = "<tool_response>\n{}\n</tool_response>"


class Marks(Protocol):
    """Keeps what people write from becoming control tokens, see control_tokens.py."""

    def text(self, text: str, *, by_assistant: bool = False) -> str: ...

    def value(self, value: Any) -> Any:
        """Every string in a mapping or list."""


class Turns:
    """messages, tools: what the template is given."""

    def __init__(
        self,
        conversation: Sequence[Message | Mapping[str, str]],
        tools: Sequence[Tool],
        *,
        habits: Habits,
        style: Style,
        thinking_key: str | None,
        marks: Marks,
    ) -> None:
        self._habits, self._style, self._marks = habits, style, marks
        self._thinking_key = thinking_key
        definitions = [definition(self._marked(tool)) for tool in tools]
        self.tools = definitions if definitions and habits.takes_tools else None
        self.messages = self._joined(_in_order(conversation, habits))
        if definitions and not habits.takes_tools:
            lines = "\n".join(to_json(one) for one in definitions)
            example = style.write([_EXAMPLE])
            self._add_to_system(_DEFINITIONS.format(tools=lines, example=example))
        if not habits.takes_system:
            self._fold_system()

    def _joined(self, messages: Iterable[Message | Mapping[str, str]]) -> list[dict[str, Any]]:
        """A turn of each message; but of results that become the user's, one with each other and
        with what the user says next, for turns must alternate.
        """
        turns: list[dict[str, Any]] = []
        is_open = False  # for more results
        for message in messages:
            turn = self._turn(message)
            if is_open and turn["role"] == "user":
                turns[-1] = turns[-1] | {"content": f"{turns[-1]['content']}\n{turn['content']}"}
            else:
                turns.append(turn)
            is_open = _role(message) == "tool" and turn["role"] == "user"
        return turns

    def _turn(self, message: Message | Mapping[str, str]) -> dict[str, Any]:
        if not isinstance(message, Message):
            is_assistant = message["role"] == "assistant"
            return {k: self._marks.text(v, by_assistant=is_assistant) for k, v in message.items()}
        if message.role == "tool":
            return self._result(message)
        if message.calls and self._habits.calls is None:
            # Marked apart from each other: the tags are the model's, what they hold is not.
            calls = [replace(c, arguments=self._marks.value(c.arguments)) for c in message.calls]
            turn = self._plain(replace(message, calls=()))
            text = turn["content"]
            return turn | {"content": f"{text}\n" * bool(text) + self._style.write(calls)}
        return self._plain(message)

    def _marked(self, tool: Tool) -> Tool:
        description = self._marks.text(tool.description)
        return replace(tool, description=description, parameters=self._marks.value(tool.parameters))

    def _plain(self, message: Message) -> dict[str, Any]:
        is_assistant = message.role == "assistant"
        text = self._marks.text(message.content, by_assistant=is_assistant)
        turn: dict[str, Any] = {"role": message.role, "content": text}
        if message.name is not None:
            turn["name"] = self._marks.text(message.name)
        if message.thinking and self._thinking_key:
            turn[self._thinking_key] = self._marks.text(message.thinking, by_assistant=is_assistant)
        if message.calls:
            turn["tool_calls"] = [self._call(call) for call in message.calls]
        if message.calls and self._thinking_key == "thinking" and text and message.thinking:
            # gpt-oss's template writes either as thinking, and refuses both.
            turn |= {"content": "", "thinking": f"{turn['thinking']}\n\n{text}"}
        return turn

    def _call(self, call: ToolCall) -> dict[str, Any]:
        arguments = self._marks.value(call.arguments)
        function = {
            "name": call.name,
            "arguments": arguments if self._habits.calls == "mapping" else to_json(arguments),
        }
        return {"id": self._id(call.id), "type": "function", "function": function}

    def _result(self, message: Message) -> dict[str, Any]:
        text = self._marks.text(message.content)
        if not self._habits.takes_results:
            return {"role": "user", "content": _RESULT.format(text)}
        turn = {"role": "tool", "content": text}
        if message.call_id is not None:
            turn["tool_call_id"] = self._id(message.call_id)
        return turn | ({} if message.name is None else {"name": self._marks.text(message.name)})

    def _id(self, call_id: str) -> str:
        if self._habits.short_ids and not _SHORT_ID.fullmatch(call_id):
            return hashlib.sha256(call_id.encode()).hexdigest()[:9]
        return self._marks.text(call_id)

    def _add_to_system(self, text: str) -> None:
        if self.messages[0]["role"] != "system":
            self.messages.insert(0, {"role": "system", "content": text})
        else:
            system = self.messages[0]
            self.messages[0] = system | {"content": f"{system['content']}\n\n{text}"}

    def _fold_system(self) -> None:
        n_system = next((i for i, m in enumerate(self.messages) if m["role"] != "system"), 0)
        texts = [message["content"] for message in self.messages[:n_system]]
        first = self.messages[n_system]
        if texts and first["role"] == "user":
            text = "\n\n".join([*texts, first["content"]])
            self.messages[: n_system + 1] = [first | {"content": text}]


def _role(message: Message | Mapping[str, str]) -> str:
    return message.role if isinstance(message, Message) else message["role"]


def _in_order(
    conversation: Sequence[Message | Mapping[str, str]], habits: Habits
) -> list[Message | Mapping[str, str]]:
    """The conversation with results named by their calls, and answers divided that the template
    would only write in part: text from calls, and calls from each other, each before its result.
    """
    names = {call.id: call.name for m in conversation if isinstance(m, Message) for call in m.calls}
    ordered: list[Message | Mapping[str, str]] = []
    waiting: list[Message] = []  # answers of one call each, whose results are to come
    for message in conversation:
        if isinstance(message, Message) and message.role == "tool":
            if message.name is None and message.call_id in names:
                message = replace(message, name=names[message.call_id])
            mine = [a for a in waiting if a.calls[0].id == message.call_id]
            ordered += [*mine, message]
            waiting = [a for a in waiting if a not in mine]
            continue
        ordered += waiting
        waiting = []
        if not isinstance(message, Message) or not message.calls or habits.calls is None:
            ordered.append(message)
            continue
        if message.content and habits.text == "before":
            ordered.append(replace(message, calls=()))
            message = replace(message, content="", thinking="")
        if len(message.calls) > 1 and habits.one_call:
            first, *others = message.calls
            waiting = [replace(message, calls=(first,))]
            waiting += [replace(message, content="", thinking="", calls=(c,)) for c in others]
        else:
            ordered.append(message)
    return [*ordered, *waiting]
