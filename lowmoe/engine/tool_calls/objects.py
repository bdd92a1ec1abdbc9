"""Calls that are JSON objects: {"name": ..., "arguments": {...}}, as most models write them.

Knows:        the keys that models use, that some add an id or put the arguments first.
Ignorant of:  what stands around such an object.
"""

import re
from collections.abc import Container, Sequence
from typing import Any

from lowmoe.engine.messages import ToolCall
from lowmoe.engine.tool_calls.definitions import from_json, to_json
from lowmoe.engine.tool_calls.json_object import JsonObject
from lowmoe.engine.tool_calls.reader import Reader, Reading

_ARGUMENTS = ("arguments", "parameters")

# Up to the brace of the arguments, which is looked at and not read.
_HEAD = re.compile(
    r'\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*"([A-Za-z0-9_.-]{1,128})"\s*,'
    r'\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)

_BEFORE_BRACE = re.compile(r"\s*(?=\{)")


def read_object(reader: Reader, names: Container[str]) -> Reading[bool]:
    """Read a call of one of the tools by these names; whether it came to its end."""
    start = reader.at
    head = yield from reader.match(_HEAD)
    if head is None or head[1] not in names:
        reader.rewind(start)
        return (yield from _read_whole(reader, names))
    reader.commit()
    yield ("call", head[1])
    if not (yield from reader.value(JsonObject(), kind="arguments")):
        return False
    # What else stands in the object, an id for one, is read and left out.
    outer = JsonObject()
    outer.push('{"": 0')
    return (yield from reader.value(outer))


def _read_whole(reader: Reader, names: Container[str]) -> Reading[bool]:
    """A call that has its keys in another order, or its arguments in a string."""
    start = reader.at
    if not (yield from reader.value(JsonObject())):
        return False
    try:
        call = from_json(reader.since(start))
    except ValueError:
        return False
    name, arguments = call.get("name"), _arguments_in(call)
    if not isinstance(name, str) or name not in names or arguments is None:
        return False
    reader.commit()
    yield ("call", name)
    yield ("arguments", to_json(arguments))
    return True


def _arguments_in(call: dict[str, Any]) -> dict[str, Any] | None:
    found: Any = next((call[key] for key in _ARGUMENTS if key in call), {})
    if isinstance(found, str):
        try:
            found = from_json(found)
        except (ValueError, RecursionError):
            return None
    return found if isinstance(found, dict) else None


def read_arguments(reader: Reader, name: str, names: Container[str]) -> Reading[bool]:
    """Read the arguments of a call whose name came before them."""
    if name not in names or (yield from reader.match(_BEFORE_BRACE)) is None:
        return False
    reader.commit()
    yield ("call", name)
    return (yield from reader.value(JsonObject(), kind="arguments"))


def read_list(reader: Reader, names: Container[str]) -> Reading[bool]:
    """Read a JSON list of calls."""
    yield from reader.blanks()
    follows = yield from reader.expect("[")
    while follows and follows != "]":
        yield from reader.blanks()
        if not (yield from read_object(reader, names)):
            return False
        yield from reader.blanks()
        follows = yield from reader.expect(",", "]")
    return follows == "]"


def write_list(calls: Sequence[ToolCall]) -> str:
    """As templates write one."""
    return f"[{', '.join(write_object(call) for call in calls)}]"


def write_object(call: ToolCall, *, key: str = "arguments") -> str:
    """As templates write one."""
    return f'{{"name": "{call.name}", "{key}": {to_json(call.arguments)}}}'
