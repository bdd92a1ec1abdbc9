"""Chat messages to the one text, or the token ids, that a model was trained to answer.

Knows:        which of a model's files holds its chat template, what messages may be.
Ignorant of:  how a template is run, what it is given for tools and calls, what the model answers.
"""

import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from lowmoe.engine.control_tokens import ControlTokens, Unmarked
from lowmoe.engine.messages import Message, Role, Tool
from lowmoe.engine.template_habits import Habits
from lowmoe.engine.template_program import TemplateProgram
from lowmoe.engine.template_turns import Marks, Turns
from lowmoe.engine.text import Tokenizer, require_unicode
from lowmoe.engine.tool_calls.definitions import require_calls, require_tools
from lowmoe.engine.tool_calls.style import Style
from lowmoe.engine.tool_calls.styles import style_of
from lowmoe.errors import PromptError, TextError, UsageError

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

    bos_token, eos_token: how the model spells them; None if it has none.

    Raises TextError if source is not a template.
    """

    def __init__(
        self, source: str, *, bos_token: str | None = None, eos_token: str | None = None
    ) -> None:
        self.source = source
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

        chat_template.jinja goes before tokenizer_config.json's "chat_template", which is a
        template or a list of named ones, of which "default" is taken.

        Raises TextError if there is no template, or none that can be used.
        """
        config = _json_object(tokenizer_config_json)
        if chat_template_jinja is not None:
            source = _utf8(chat_template_jinja)
        else:
            source = _template_in(config)
        for name in ("bos_token", "eos_token"):
            if tokenizer_config_json is None and re.search(rf"\b{name}\b", source):
                raise TextError(
                    f"the chat template writes {name}, but there is no tokenizer_config.json that "
                    "spells it; download that file beside chat_template.jinja"
                )
        return ChatTemplate(
            source,
            bos_token=_token_in(config, "bos_token"),
            eos_token=_token_in(config, "eos_token"),
        )

    @functools.cached_property
    def style(self) -> Style:
        """How the model writes calls of tools."""
        return style_of(self.source)

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
        return self._render(messages, tools, Unmarked(), think, add_generation_prompt)

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
        control = ControlTokens(tokenizer, template=self.source)
        return control.encode(self._render(messages, tools, control, think, add_generation_prompt))

    def _render(
        self,
        messages: Sequence[Message | Mapping[str, str]],
        tools: Sequence[Tool],
        marks: Marks,
        think: bool | None,
        add_generation_prompt: bool,
    ) -> str:
        require_messages(messages)
        require_tools(tools)
        turns = Turns(
            messages,
            tools,
            habits=self._habits,
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
    def _habits(self) -> Habits:
        return Habits.of(
            lambda messages, tools: self._run(messages, tools, {"add_generation_prompt": False})
        )

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


def _json_object(data: bytes | None) -> dict[str, object]:
    if data is None:
        return {}
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise TextError(
            f"tokenizer_config.json is not JSON ({error}); download the file again"
        ) from error
    if not isinstance(fields, dict):
        raise TextError(
            f"tokenizer_config.json holds a {type(fields).__name__}, but must hold an object; "
            "download the file again"
        )
    return fields


def _utf8(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise TextError(
            f"chat_template.jinja is not UTF-8 ({error}); download the file again"
        ) from error


def _template_in(config: dict[str, object]) -> str:
    found = config.get("chat_template")
    if isinstance(found, list):
        entries = [entry for entry in found if isinstance(entry, dict)]
        names = [entry.get("name") for entry in entries]
        if "default" not in names:
            raise TextError(
                f"tokenizer_config.json names the chat templates {names}, but none of them "
                '"default"; put the right one into chat_template.jinja'
            )
        found = entries[names.index("default")].get("template")
    if found is None:
        raise TextError(
            "this model brings no chat template, which chat messages need; complete a plain text "
            "instead, or put a template into chat_template.jinja in its folder"
        )
    if not isinstance(found, str):
        raise TextError(
            f"tokenizer_config.json: chat_template is of type {type(found).__name__}, but must be "
            "a string or a list of named strings; download the file again"
        )
    return found


def _token_in(config: dict[str, object], key: str) -> str | None:
    found = config.get(key)
    # Older files write the token with its matching rules.
    token = found.get("content") if isinstance(found, dict) else found
    if token is not None and not isinstance(token, str):
        raise TextError(
            f"tokenizer_config.json: {key} is {found!r}, but must be a string or null; "
            "download the file again"
        )
    return token
