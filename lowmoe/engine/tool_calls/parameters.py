"""Arguments that stand between tags, one after another.

Knows:        what such tags have in common.
Ignorant of:  whose they are.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lowmoe.engine.messages import Tool, ToolCall
from lowmoe.engine.tool_calls.definitions import to_json
from lowmoe.engine.tool_calls.grammar import GrammarWriter, any_of, literal
from lowmoe.engine.tool_calls.reader import MAX_HEAD, Reader, Reading
from lowmoe.engine.tool_calls.values import types_of, value_json

_STRING = frozenset({"string"})
_NO_STRING = frozenset({"null", "boolean", "integer", "number", "array", "object"})


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterTags:
    """`open` key `named` `begin` value `close`, and `end` after the last one.

    typed: what a model writes in place of `named` after the key of a string and of anything else,
    if it says so; else the tool's schema tells. broken_lines: a line break stands around a value.
    between: what templates write between two of these.
    """

    open: str
    named: str = ""
    typed: tuple[str, str] | None = None
    begin: str = ""
    close: str
    end: str
    broken_lines: bool = False
    after_key: str = ""
    after_each: str = "\n"


def read_parameters(reader: Reader, tool: Tool, tags: ParameterTags) -> Reading[bool]:
    """Read the arguments of a call whose name came before them; whether they came to their end."""
    reader.commit()
    yield ("call", tool.name)
    before = "{"
    while True:
        yield from reader.blanks()
        word = yield from reader.expect(tags.open, tags.end)
        if word == tags.end:
            reader.commit()
            yield ("arguments", "{}" if before == "{" else "}")
            return True
        read = (yield from _read_parameter(reader, tool, tags)) if word else None
        if read is None:
            return False
        reader.commit()
        yield ("arguments", before + read)
        before = ", "


def _read_parameter(reader: Reader, tool: Tool, tags: ParameterTags) -> Reading[str | None]:
    key = yield from reader.until(*(tags.typed or (tags.named,)), most=MAX_HEAD)
    if key is None:
        return None
    name, named = key
    yield from reader.blanks() if tags.begin else ()
    if tags.begin and not (yield from reader.expect(tags.begin)):
        return None
    value = yield from reader.until(tags.close)
    if value is None:
        return None
    text = value[0]
    if tags.broken_lines:
        text = text.removeprefix("\n").removesuffix("\n")
    if tags.typed is None:
        types = types_of(tool, name)
    else:
        types = _STRING if named == tags.typed[0] else _NO_STRING
    return f"{to_json(name)}: {value_json(text, types)}"


def write_parameters(call: ToolCall, tags: ParameterTags) -> str:
    """As templates write them."""
    line = "\n" if tags.broken_lines else ""
    parts = []
    for name, value in call.arguments.items():
        is_text = isinstance(value, str)
        named = tags.typed[not is_text] if tags.typed else tags.named
        text = value if is_text else to_json(value)
        head = f"{tags.open}{name}{named}{tags.after_key}{tags.begin}"
        parts.append(f"{head}{line}{text}{line}{tags.close}{tags.after_each}")
    return "".join(parts) + tags.end


def lark_parameters(grammar: GrammarWriter, tool: Tool, tags: ParameterTags) -> str:
    """Its parameters in their order, those that it does not require maybe left out."""
    properties = tool.parameters.get("properties")
    required = tool.parameters.get("required")
    parts = []
    for name, schema in properties.items() if isinstance(properties, Mapping) else ():
        part = _lark_parameter(grammar, tool, tags, name, schema)
        is_required = isinstance(required, list | tuple) and name in required
        parts.append(part if is_required else f"{part}?")
    return grammar.rule(" ".join([*parts, grammar.tag(tags.end)]))


def _lark_parameter(
    grammar: GrammarWriter, tool: Tool, tags: ParameterTags, name: str, schema: Any
) -> str:
    types = types_of(tool, name)
    # Without a type, and where a string may stand beside others, any text is a value.
    is_text = not types or "string" in types
    named = tags.typed[not is_text] if tags.typed else tags.named
    line = literal("\n") if tags.broken_lines else ""
    if not is_text:
        value = f"{grammar.parameter(tool, schema)} {line} {grammar.tag(tags.close)}"
    elif types == _STRING and (chosen := _chosen(schema)):
        value = f"{any_of([literal(text) for text in chosen])} {line} {grammar.tag(tags.close)}"
    else:
        value = grammar.text_before(tags.close)
    head = [grammar.tag(tags.open), literal(name), grammar.tag(named)]
    head += [literal(tags.after_key)] if tags.after_key else []
    head += [grammar.tag(tags.begin)] if tags.begin else []
    after = [literal(tags.after_each)] if tags.after_each else []
    return grammar.rule(" ".join([*head, line, value, *after]))


def _chosen(schema: Any) -> list[str]:
    """The strings that a schema names, if it names all that it accepts."""
    values = schema.get("enum", [schema["const"]] if "const" in schema else [])
    return values if isinstance(values, list) and all(isinstance(v, str) for v in values) else []
