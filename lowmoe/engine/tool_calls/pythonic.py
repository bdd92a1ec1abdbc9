"""Calls as a list of Python's, [name(key="value", ...), ...]: Llama 4 with vLLM's template.

Knows:        that they are the whole answer, or stand after `<|python_start|>`.
Ignorant of:  other styles, how a value is written.

Source: https://www.llama.com/docs/model-cards-and-prompt-formats/llama4/
"""

import re
from collections.abc import Mapping, Sequence

from lowmoe.engine.messages import Tool, ToolCall
from lowmoe.engine.tool_calls.definitions import to_json
from lowmoe.engine.tool_calls.grammar import GrammarWriter, any_of, literal, one_or_more
from lowmoe.engine.tool_calls.python_value import PythonValue
from lowmoe.engine.tool_calls.reader import Reader, Reading
from lowmoe.engine.tool_calls.style import Style, Tools
from lowmoe.engine.tool_calls.values import types_of, value_json

OPEN, CLOSE = "<|python_start|>", "<|python_end|>"

_NAME = re.compile(r"\s*([A-Za-z0-9_.-]{1,128})\s*\(")
_KEY = re.compile(r"\s*([^\s=,()\"']{1,128})\s*=")


class Pythonic(Style):
    """Only a call of a tool that is offered is one: an answer may begin with a bracket."""

    tags = (OPEN, CLOSE)

    def read(self, reader: Reader, tools: Tools) -> Reading[None]:
        def calls(tag: str) -> Reading[bool]:
            yield from reader.blanks()
            follows = yield from reader.expect("[")
            while follows and follows != "]":
                named = yield from reader.match(_NAME)
                tool = tools.get(named[1]) if named else None
                if tool is None or not (yield from _read_arguments(reader, tool)):
                    return False
                yield from reader.blanks()
                follows = yield from reader.expect(",", "]")
            if follows:
                yield from reader.blanks()
                yield from reader.expect(CLOSE)
            return bool(follows)

        yield from reader.at_start("[", read=calls)
        yield from reader.calls(OPEN, read=calls)

    def write(self, calls: Sequence[ToolCall]) -> str:
        return f"[{', '.join(map(_write_call, calls))}]"

    def lark(self, grammar: GrammarWriter, tools: Sequence[Tool], *, many: bool) -> str:
        calls = [f"{literal(f'{tool.name}(')} {_lark_arguments(grammar, tool)}" for tool in tools]
        one = grammar.rule(any_of(calls))
        return f'"[" {one_or_more(one, literal(", ")) if many else one} "]"'


def _read_arguments(reader: Reader, tool: Tool) -> Reading[bool]:
    reader.commit()
    yield ("call", tool.name)
    before = "{"
    yield from reader.blanks()
    follows = yield from reader.expect(")")
    while follows != ")":
        key = yield from reader.match(_KEY)
        value = PythonValue()
        if key is None or not (yield from reader.value(value)):
            return False
        reader.commit()
        types = types_of(tool, key[1])
        yield ("arguments", f"{before}{to_json(key[1])}: {_typed(value, types)}")
        before = ", "
        follows = yield from reader.expect(",", ")")
    reader.commit()
    yield ("arguments", "{}" if before == "{" else "}")
    return True


def _typed(value: PythonValue, types: frozenset[str]) -> str:
    """The value as JSON.  Llama 4's template puts every value in quotes, whatever its type."""
    read = value.read()
    if read is None:
        return value_json(value.text, types)
    if isinstance(read[0], str) and types and "string" not in types:
        unquoted = PythonValue()
        unquoted.push(f"{read[0]},")
        if unquoted.text == read[0].strip():
            read = unquoted.read() or read
    return to_json(read[0])


def _write_call(call: ToolCall) -> str:
    arguments = (f"{key}={_write_value(value)}" for key, value in call.arguments.items())
    return f"{call.name}({', '.join(arguments)})"


def _write_value(value: object) -> str:
    return to_json(value) if isinstance(value, str) else repr(value)


def _lark_arguments(grammar: GrammarWriter, tool: Tool) -> str:
    """Its parameters in their order, those that it does not require maybe left out."""
    properties = tool.parameters.get("properties")
    required = tool.parameters.get("required")
    first = after = '")"'  # what may be written before any parameter, and after one
    named = list(properties.items()) if isinstance(properties, Mapping) else []
    for name, schema in reversed(named):
        one = grammar.rule(f"{literal(f'{name}=')} {grammar.parameter(tool, schema)}")
        is_required = isinstance(required, list | tuple) and name in required
        choices = [f"{one} {after}"] + ([] if is_required else [first])
        first = grammar.rule(any_of(choices))
        after = grammar.rule(f'(", " {one}){"" if is_required else "?"} {after}')
    return first
