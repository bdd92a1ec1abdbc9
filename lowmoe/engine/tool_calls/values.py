"""Arguments that a model writes as text between tags, to JSON.

Knows:        which types a JSON schema allows, how templates print a value that is no string.
Ignorant of:  which tags.
"""

from collections.abc import Mapping
from typing import Any

from lowmoe.engine.messages import Tool
from lowmoe.engine.tool_calls.definitions import from_json, to_json

# What Jinja prints for these, where a template leaves it to Jinja.
_JINJA = {"True": True, "False": False, "None": None}

_TYPES: Mapping[type, tuple[str, ...]] = {
    str: ("string",),
    bool: ("boolean",),
    int: ("integer", "number"),
    float: ("number",),
    type(None): ("null",),
    list: ("array",),
    dict: ("object",),
}


def types_of(tool: Tool, name: str) -> frozenset[str]:
    """Which JSON types the tool's parameter may have; none if its schema does not say."""
    properties = tool.parameters.get("properties")
    schema = properties.get(name) if isinstance(properties, Mapping) else None
    return _types(schema, tool.parameters)


def value_json(text: str, types: frozenset[str]) -> str:
    """The JSON of what was written: a string as it stands, anything else as JSON."""
    if types != {"string"}:
        read = _read(text)
        if read is not None and (not types or types & set(_TYPES[type(read[0])])):
            return to_json(read[0])
    return to_json(text)


def _read(text: str) -> tuple[Any] | None:
    """The value that text is JSON of, or that Jinja prints so."""
    stripped = text.strip()
    if stripped in _JINJA:
        return (_JINJA[stripped],)
    try:
        return (from_json(stripped),)
    except (ValueError, RecursionError):
        return None


def _types(schema: Any, root: Mapping[str, Any]) -> frozenset[str]:
    found: set[str] = set()
    pending, followed = [schema], set()
    while pending:
        schema = pending.pop()
        if not isinstance(schema, Mapping):
            continue
        said = schema.get("type")
        found.update(t for t in ([said] if isinstance(said, str) else _list(said)) if _is_str(t))
        if schema.get("nullable") is True:
            found.add("null")
        values = [*_list(schema.get("enum")), *([schema["const"]] if "const" in schema else [])]
        found.update(name for value in values for name in _TYPES.get(type(value), ()))
        pending += [c for key in ("anyOf", "oneOf", "allOf") for c in _list(schema.get(key))]
        reference = schema.get("$ref")
        if isinstance(reference, str) and reference not in followed:
            followed.add(reference)  # once, for some lead in a circle
            pending.append(_referred(reference, root))
    return frozenset(found)


def _is_str(value: Any) -> bool:
    return isinstance(value, str)


def _referred(reference: str, root: Mapping[str, Any]) -> Any:
    at: Any = root
    for part in reference.removeprefix("#/").split("/"):
        at = at.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(at, Mapping) else None
    return at


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
