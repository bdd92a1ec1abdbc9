"""Runs a chat template: an untrusted program out of a model's folder, with a limit.

Knows:        Jinja as transformers sets it up, what a template may call, when it took too long.
Ignorant of:  messages and roles, where templates are kept.
"""

import functools
import json
import re
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

import minijinja

from lowmoe.errors import TextError

# The longest templates in use have 30,000 characters.
MAX_TEMPLATE_CHARS = 1 << 20

# Ten times the text that a context of a million tokens holds.
MAX_RENDERED_CHARS = 1 << 26

# A unit is one step of the template's program; ten million take 0.2 s.
FUEL = 100_000

# transformers marks what the assistant said by these tags, for training; they print nothing.
_GENERATION_TAG = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")

# Kimi's templates count their calls in a list. minijinja's lists do not change, Python's do.
_EMPTY_LIST = re.compile(r"(?<![=!<>])=\s*\[\s*\](?=\s*[,)%-])")


class TemplateProgram:
    """A template that was read.  Raises TextError if source is not one."""

    def __init__(self, source: str) -> None:
        if len(source) > MAX_TEMPLATE_CHARS:
            raise TextError(
                f"the chat template has {len(source)} characters, but at most "
                f"{MAX_TEMPLATE_CHARS} are read; download it again"
            )
        if ".append(" in source:
            source = _EMPTY_LIST.sub("=new_list()", source)
        self._source = _GENERATION_TAG.sub(_as_condition, source)
        _environment(self._source, fuel=FUEL)

    @functools.cached_property
    def variables(self) -> frozenset[str]:
        """What it asks to be told, among them functions and what it sets itself on some ways."""
        environment = _environment(self._source, fuel=FUEL)
        return frozenset(environment.undeclared_variables_in_template("chat_template"))

    def run(self, variables: Mapping[str, Any], *, fuel: int) -> str:
        """The text it makes.  fuel: units beside `FUEL`.

        Raises TextError if it refuses what it is told, fails, or does not come to an end.
        """
        environment = _environment(self._source, fuel=FUEL + fuel)
        try:
            text = environment.render_template("chat_template", **variables)
        except minijinja.TemplateError as error:
            raise _template_fault(error) from error
        except (TypeError, ValueError) as error:
            # The template called one of the functions below with what it cannot take.
            raise _fault(str(error)) from error
        if len(text) > MAX_RENDERED_CHARS:
            raise TextError(
                f"the chat template made {len(text)} characters, but at most "
                f"{MAX_RENDERED_CHARS} are allowed; shorten the messages or replace the template"
            )
        return str(text)


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
        globals={
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
            "new_list": list,
        },
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
