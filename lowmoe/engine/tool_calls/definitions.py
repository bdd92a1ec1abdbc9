"""What may be a tool: bounded names, schemas of bounded size and depth.

Knows:        what templates, grammars and the readers of calls can bear.
Ignorant of:  how a model or a client spells a tool.
"""

import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lowmoe.engine.messages import Message, Tool, ToolChoice
from lowmoe.engine.text import require_unicode
from lowmoe.errors import PromptError, UsageError

MAX_TOOLS = 512
MAX_TOOL_CHARS = 1 << 16  # of one, as JSON
MAX_ALL_CHARS = 1 << 20
MAX_DEPTH = 32  # of a schema, or of the arguments of a call

# Every API allows letters, digits, `_` and `-`; programs that bring tools of others write dots.
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")
_NAME_RULE = "1 to 128 letters, digits, underscores, dots and hyphens"


def require_tools(tools: Sequence[Tool]) -> None:
    """Raise UsageError unless every tool can be told to a model and called by it."""
    if len(tools) > MAX_TOOLS:
        raise UsageError(f"{len(tools)} tools are given, but at most {MAX_TOOLS} are taken")
    names = set()
    n_chars = 0
    for number, tool in enumerate(tools, start=1):
        _require_name(f"tool {number}", tool.name)
        if tool.name in names:
            raise UsageError(f"tool {number} is named {tool.name!r} as another is; rename one")
        names.add(tool.name)
        n_chars += _require_definition(f"tool {tool.name}", tool)
    if n_chars > MAX_ALL_CHARS:
        raise UsageError(
            f"the tools have {n_chars} characters as JSON, but at most {MAX_ALL_CHARS} are taken"
        )


def require_choice(choice: ToolChoice, tools: Sequence[Tool]) -> None:
    """Raise UsageError unless there is a tool to choose."""
    if choice.mode == "required" and not tools:
        raise UsageError("a call of a tool is required, but no tools are given")
    names = [tool.name for tool in tools]
    if choice.name is not None and choice.name not in names:
        raise UsageError(f"tool {choice.name[:128]!r} is chosen, but is not among {names[:20]}")


def require_calls(message: Message, where: str) -> None:
    """Raise UsageError unless the calls of an earlier answer can be written down again."""
    if message.calls and message.role != "assistant":
        raise UsageError(f"{where} ({message.role}) makes calls, but only the assistant can")
    for call in message.calls:
        _require_name(f"{where}: a call", call.name)
        _require_json(f"{where}: the arguments of {call.name}", call.arguments, MAX_ALL_CHARS)


def definition(tool: Tool) -> dict[str, Any]:
    """As chat templates expect a tool."""
    function = {
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.parameters,
    }
    return {"type": "function", "function": function}


def to_json(value: object) -> str:
    """As templates spell JSON.  Half a surrogate pair, which is no character, becomes U+FFFD."""
    text = json.dumps(value, ensure_ascii=False)
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def from_json(text: str) -> Any:
    """A value that every reader of JSON can hold; line breaks may be in strings.

    Raises ValueError, RecursionError.
    """
    return json.loads(text, strict=False, parse_constant=_finite, parse_float=_finite)


def _finite(number: str) -> float:
    if not math.isfinite(value := float(number)):
        raise ValueError(f"{number} is no number in JSON")
    return value


def _require_name(what: str, name: object) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UsageError(f"{what} is named {str(name)[:40]!r}, but must have {_NAME_RULE}")


def _require_definition(what: str, tool: Tool) -> int:
    """Its size as JSON."""
    if not isinstance(tool.description, str):
        raise UsageError(f"{what}: its description must be a string")
    _require_text(what, tool.description)
    n_chars = _require_json(f"{what}: its parameters", tool.parameters, MAX_TOOL_CHARS)
    if tool.parameters.get("type", "object") != "object":
        raise UsageError(
            f"{what}: its parameters are of type {str(tool.parameters['type'])[:40]!r}, but must "
            "be a JSON schema of type 'object'"
        )
    if n_chars + len(tool.description) > MAX_TOOL_CHARS:
        raise UsageError(
            f"{what} has {n_chars + len(tool.description)} characters, but at most "
            f"{MAX_TOOL_CHARS} are taken"
        )
    return n_chars + len(tool.description)


def _require_json(what: str, value: object, most_chars: int) -> int:
    """Its size.  Raises UsageError for what is no JSON object of bounded depth and size."""
    if not isinstance(value, Mapping):
        raise UsageError(f"{what} must be an object, but are of type {type(value).__name__}")
    if _depth(value) > MAX_DEPTH:
        raise UsageError(f"{what} are nested more than {MAX_DEPTH} deep")
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{what} are not JSON ({error})") from error
    if len(text) > most_chars:
        raise UsageError(
            f"{what} have {len(text)} characters as JSON, but at most {most_chars} are taken"
        )
    _require_text(what, text)
    return len(text)


def _depth(value: object) -> int:
    """How deep objects and lists lie in each other, counted to one beyond MAX_DEPTH."""
    level, depth = [value], 1
    while depth <= MAX_DEPTH:
        children = (child for item in level for child in _children(item))
        # Each once: what holds itself would have no end.
        level = list({id(child): child for child in children if _children(child)}.values())
        if not level:
            return depth
        depth += 1
    return depth


def _children(value: object) -> Collection[object]:
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, list | tuple) else ()


def _require_text(what: str, text: str) -> None:
    try:
        require_unicode(text)
    except PromptError as error:
        raise UsageError(f"{what}: {error}") from error
