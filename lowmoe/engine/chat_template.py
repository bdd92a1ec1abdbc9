"""Chat messages to the one text, or the token ids, that a model was trained to answer.

Knows:        chat templates (untrusted programs out of a model's folder), roles.
Ignorant of:  tokens, how many messages fit the context, what the model answers.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime

import minijinja

from lowmoe.engine.control_tokens import ControlTokens
from lowmoe.engine.text import Tokenizer, require_unicode
from lowmoe.errors import PromptError, TextError, UsageError

ROLES = ("system", "user", "assistant", "tool")

# The longest templates in use have 30,000 characters.
MAX_TEMPLATE_CHARS = 1 << 20

# Ten times the text that a context of a million tokens holds.
MAX_RENDERED_CHARS = 1 << 26

# A unit is one step of the template's program; ten million take 0.2 s. Templates in use need some
# 50 units a message, a few hundred where they compare every message with every other.
FUEL = 100_000
FUEL_PER_MESSAGE = 10_000

# transformers marks what the assistant said by these tags, for training; they print nothing.
_GENERATION_TAG = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")


class ChatTemplate:
    """A model's own way to write a conversation down.

    bos_token, eos_token: how the model spells them; None if it has none.

    Raises TextError if source is not a template.
    """

    def __init__(
        self, source: str, *, bos_token: str | None = None, eos_token: str | None = None
    ) -> None:
        if len(source) > MAX_TEMPLATE_CHARS:
            raise TextError(
                f"the chat template has {len(source)} characters, but at most "
                f"{MAX_TEMPLATE_CHARS} are read; download it again"
            )
        self.source = _GENERATION_TAG.sub(_as_condition, source)
        # An absent token is an undefined variable, which prints as nothing, as in transformers.
        self._tokens = {
            name: token
            for name, token in (("bos_token", bos_token), ("eos_token", eos_token))
            if token is not None
        }
        _environment(self.source, fuel=FUEL)

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

    def render(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True
    ) -> str:
        """Write messages down as one text.

        messages: each has a role (system, user, assistant or tool) and a content; further strings
        are the template's to use. add_generation_prompt: end where the assistant's answer begins.

        Raises UsageError if a message is malformed, TextError if the template refuses the
        messages, fails, or does not come to an end.
        """
        require_messages(messages)
        return self._render([dict(message) for message in messages], add_generation_prompt)

    def encode(
        self,
        messages: Sequence[Mapping[str, str]],
        tokenizer: Tokenizer,
        *,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Write messages down as token ids; only the template writes control tokens.

        Arguments and errors are render's; control_tokens.py says what control tokens are.
        """
        require_messages(messages)
        control = ControlTokens(tokenizer, template=self.source)
        marked = [control.mark(message) for message in messages]
        return control.encode(self._render(marked, add_generation_prompt))

    def _render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        environment = _environment(self.source, fuel=FUEL + FUEL_PER_MESSAGE * len(messages))
        try:
            text = environment.render_template(
                "chat_template",
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self._tokens,
            )
        except minijinja.TemplateError as error:
            raise _template_fault(error) from error
        except (TypeError, ValueError) as error:
            # The template called one of the three functions below with what it cannot take.
            raise _fault(str(error)) from error
        if len(text) > MAX_RENDERED_CHARS:
            raise TextError(
                f"the chat template made {len(text)} characters of {len(messages)} messages, but "
                f"at most {MAX_RENDERED_CHARS} are allowed; shorten them or replace the template"
            )
        return text


def require_messages(messages: Sequence[Mapping[str, str]]) -> None:
    """Raise UsageError unless messages are what ChatTemplate.render describes."""
    if not messages:
        raise PromptError("the conversation holds 0 messages, but at least 1 is needed")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping):
            raise UsageError(
                f"message {number} is {message!r}, but must be a mapping with role and content"
            )
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


def _environment(source: str, *, fuel: int) -> minijinja.Environment:
    """Set minijinja up as transformers sets jinja2 up, with a limit. Raises TextError."""
    environment = minijinja.Environment(
        fuel=fuel,
        trim_blocks=True,
        lstrip_blocks=True,
        pycompat=True,
        auto_escape_callback=lambda name: False,
        filters={"tojson": _tojson},
        tests={"iterable": _is_iterable},
        globals={"raise_exception": _raise_exception, "strftime_now": _strftime_now},
    )
    try:
        environment.add_template("chat_template", source)
    except minijinja.TemplateError as error:
        raise _template_fault(error) from error
    except UnicodeEncodeError as error:
        raise _fault(f"character {error.start} is half a surrogate pair") from error
    return environment


def _as_condition(tag: re.Match[str]) -> str:
    before, is_end, after = tag.groups()
    return f"{{%{before} {'endif' if is_end else 'if true'} {after}%}}"


def _raise_exception(message: object) -> None:
    raise TextError(f"the chat template refuses this conversation: {_one_line(str(message))}")


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _is_iterable(value: object) -> bool:
    """Stand in for minijinja's test, to which None is iterable."""
    return isinstance(value, Iterable)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Stand in for minijinja's filter, which writes <, > and & as escapes for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _template_fault(error: minijinja.TemplateError) -> TextError:
    place = "" if error.line is None else f", line {error.line}"
    reason = error.kind if error.detail is None else f"{error.kind}: {error.detail}"
    return _fault(reason + place)


def _fault(reason: str) -> TextError:
    return TextError(
        f"the chat template cannot be used ({_one_line(reason)}); put one that works into "
        "chat_template.jinja, or complete a plain text instead"
    )


def _one_line(text: str) -> str:
    return " ".join(text.split())


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
