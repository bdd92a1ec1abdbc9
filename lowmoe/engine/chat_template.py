"""Chat messages to the one text, or the token ids, that a model was trained to answer.

Knows:        what messages may be, which switches of thinking templates have.
Ignorant of:  how a template is run, what it is given for tools and calls, what the model answers.
"""

import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from lowmoe.engine.control_tokens import ControlTokens, Unmarked
from lowmoe.engine.messages import Message, Role, Tool
from lowmoe.engine.template_files import template_in_files
from lowmoe.engine.template_habits import Habits
from lowmoe.engine.template_program import TemplateProgram
from lowmoe.engine.template_turns import Marks, Turns
from lowmoe.engine.text import Tokenizer, require_unicode
from lowmoe.engine.tool_calls.definitions import require_calls, require_tools
from lowmoe.engine.tool_calls.style import Style
from lowmoe.engine.tool_calls.styles import style_of
from lowmoe.errors import PromptError, UsageError

ROLES = get_args(Role)

# Templates in use need some 50 units a message, a few hundred where they compare every message
# with every other, and 5 a character of a tool's definition.
FUEL_PER_MESSAGE = 10_000
FUEL_PER_CHARACTER = 20

# Switches of thinking, and what templates call on and off.
_SWITCHES = ("enable_thinking", "thinking")
_EFFORT = "reasoning_effort"
_KNOWS_NO_EFFORT = re.compile(r"""reasoning_effort[^%}]*['"]none['"]""")


class ChatTemplate:
    """A model's own way to write a conversation down.

    bos_token, eos_token: how the model spells them; None if it has none.  for_tools: another that
    writes conversations with tools down; None where this one does.

    Raises TextError if source is not a template.
    """

    def __init__(
        self,
        source: str,
        *,
        bos_token: str | None = None,
        eos_token: str | None = None,
        for_tools: "ChatTemplate | None" = None,
    ) -> None:
        self.source, self._for_tools = source, for_tools
        self._program = TemplateProgram(source)
        # An absent token is an undefined variable, which prints as nothing, as in transformers.
        self._tokens = {
            name: token
            for name, token in (("bos_token", bos_token), ("eos_token", eos_token))
            if token is not None
        }

    @staticmethod
    def from_files(
        *, chat_template_jinja: bytes | None, tokenizer_config_json: bytes | None
    ) -> "ChatTemplate":
        """Find the template in a model's files, None for a file that is not there.

        Raises TextError if there is no template, or none that can be used.
        """
        found = template_in_files(chat_template_jinja, tokenizer_config_json)
        bos, eos = found.bos_token, found.eos_token
        for_tools = (
            None
            if found.tool_use is None
            else ChatTemplate(found.tool_use, bos_token=bos, eos_token=eos)
        )
        return ChatTemplate(found.source, bos_token=bos, eos_token=eos, for_tools=for_tools)

    @functools.cached_property
    def style(self) -> Style:
        """How the model writes calls of tools."""
        return style_of(self.source) if self._for_tools is None else self._for_tools.style

    @property
    def has_think_switch(self) -> bool:
        """Whether `think` makes a difference."""
        return bool(self._switches(True))

    def render(
        self,
        messages: Sequence[Message | Mapping[str, str]],
        *,
        tools: Sequence[Tool] = (),
        think: bool | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """Write messages down as one text.

        messages: a mapping has a role and a content; further strings are the template's to use.
        tools: what the model may call; template_turns.py says what is done where the template
        knows none. think: whether it should before it answers, None as it likes; a model whose
        template has no such switch does as it likes. add_generation_prompt: end where the
        assistant's answer begins.

        Raises UsageError if a message or tool is malformed, TextError if the template refuses the
        messages, fails, or does not come to an end.
        """
        chosen = self._chosen(messages, tools)
        return chosen._render(messages, tools, Unmarked(), think, add_generation_prompt)

    def encode(
        self,
        messages: Sequence[Message | Mapping[str, str]],
        tokenizer: Tokenizer,
        *,
        tools: Sequence[Tool] = (),
        think: bool | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Write messages down as token ids; only the template writes control tokens.

        Arguments and errors are render's; control_tokens.py says what control tokens are.
        """
        chosen = self._chosen(messages, tools)
        control = ControlTokens(tokenizer, template=chosen.source)
        text = chosen._render(messages, tools, control, think, add_generation_prompt)
        return control.encode(text)

    def _chosen(
        self, messages: Sequence[Message | Mapping[str, str]], tools: Sequence[Tool]
    ) -> "ChatTemplate":
        require_messages(messages)
        require_tools(tools)
        if self._for_tools is None or not (tools or any(map(_has_tools, messages))):
            return self
        return self._for_tools

    def _render(
        self,
        messages: Sequence[Message | Mapping[str, str]],
        tools: Sequence[Tool],
        marks: Marks,
        think: bool | None,
        add_generation_prompt: bool,
    ) -> str:
        turns = Turns(
            messages,
            tools,
            habits=self._habits_with_tools if tools else self._habits_without_tools,
            style=self.style,
            thinking_key=self._thinking_key,
            marks=marks,
        )
        return self._run(
            turns.messages,
            turns.tools,
            {"add_generation_prompt": add_generation_prompt, **self._switches(think)},
        )

    def _run(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any],
    ) -> str:
        given = {"messages": messages, "tools": tools, "documents": None}
        fuel = FUEL_PER_MESSAGE * len(messages)
        if tools is not None:
            fuel += FUEL_PER_CHARACTER * len(json.dumps(tools))
        return self._program.run({**given, **self._tokens, **variables}, fuel=fuel)

    @functools.cached_property
    def _habits_with_tools(self) -> Habits:
        return Habits.of(self._try, with_tools=True)

    @functools.cached_property
    def _habits_without_tools(self) -> Habits:
        return Habits.of(self._try, with_tools=False)

    def _try(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None
    ) -> str:
        return self._run(messages, tools, {"add_generation_prompt": False})

    @property
    def _thinking_key(self) -> str | None:
        """By which key the template takes an earlier answer's thinking."""
        if "reasoning_content" in self.source:
            return "reasoning_content"
        return "thinking" if "message.thinking" in self.source else None

    def _switches(self, think: bool | None) -> dict[str, Any]:
        if think is None:
            return {}
        asked = self._program.variables
        switches: dict[str, Any] = {name: think for name in _SWITCHES if name in asked}
        if _EFFORT in asked and not switches:
            # gpt-oss always thinks, and medium is what it does unless told otherwise.
            on, off = (
                ("high", "none") if _KNOWS_NO_EFFORT.search(self.source) else ("medium", "low")
            )
            switches[_EFFORT] = on if think else off
        return switches


def _has_tools(message: Message | Mapping[str, str]) -> bool:
    if isinstance(message, Message):
        return message.role == "tool" or bool(message.calls)
    return message["role"] == "tool"


def require_messages(messages: Sequence[Message | Mapping[str, str]]) -> None:
    """Raise UsageError unless messages are what ChatTemplate.render describes."""
    if not messages:
        raise PromptError("the conversation holds 0 messages, but at least 1 is needed")
    for number, message in enumerate(messages, start=1):
        if isinstance(message, Message):
            require_calls(message, f"message {number}")
            fields: Mapping[str, object] = {
                "role": message.role,
                "content": message.content,
                "thinking": message.thinking,
                **({} if message.name is None else {"name": message.name}),
                **({} if message.call_id is None else {"call_id": message.call_id}),
            }
            _require_strings(number, fields)
            for call in message.calls:
                require_unicode(call.id)
        elif isinstance(message, Mapping):
            _require_strings(number, message)
        else:
            raise UsageError(
                f"message {number} is {message!r}, but must be a mapping with role and content"
            )


def _require_strings(number: int, message: Mapping[str, object]) -> None:
    role = message.get("role")
    if role not in ROLES:
        raise UsageError(f"message {number}: role is {role!r}, but must be in {list(ROLES)}")
    if "content" not in message:
        raise UsageError(f"message {number} ({role}) has no content, but must have a string")
    for key, value in message.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise UsageError(
                f"message {number} ({role}): {key} is of type {type(value).__name__}, "
                "but must be a string"
            )
        require_unicode(value)
