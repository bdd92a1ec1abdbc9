"""Mistral's calls: `[TOOL_CALLS][{"name": ...}]`, since v11 `[TOOL_CALLS]name[ARGS]{...}` for each.

Knows:        these tags; ids that are nine characters long.
Ignorant of:  other styles.

Source: https://github.com/mistralai/mistral-common (tokens/tokenizers/instruct.py)
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from lowmoe.engine.messages import Tool, ToolCall
from lowmoe.engine.tool_calls.definitions import to_json
from lowmoe.engine.tool_calls.grammar import GrammarWriter, any_of, literal, one_or_more
from lowmoe.engine.tool_calls.objects import read_arguments, read_list, write_list
from lowmoe.engine.tool_calls.reader import MAX_HEAD, Reader, Reading
from lowmoe.engine.tool_calls.style import Style, Tools

OPEN, ID, ARGUMENTS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"

_NAME = re.compile(r"\s*([A-Za-z0-9_.-]{1,128})(?=[\s\[{])")


@dataclass(frozen=True, slots=True)
class Bracketed(Style):
    """in_list: all calls in one list, as before v11."""

    in_list: bool

    @property
    def tags(self) -> Sequence[str]:
        return (OPEN, ID, ARGUMENTS)

    def read(self, reader: Reader, tools: Tools) -> Reading[None]:
        def named(tag: str) -> Reading[bool]:
            name = yield from reader.match(_NAME)
            if name is None:
                return False
            if (yield from reader.expect(ID, ARGUMENTS)) == ID:
                yield from reader.until(ARGUMENTS, most=MAX_HEAD)
            return (yield from read_arguments(reader, name[1], tools))

        def listed(tag: str) -> Reading[bool]:
            return (yield from read_list(reader, tools))

        yield from reader.calls(OPEN, read=listed if self.in_list else named)

    def write(self, calls: Sequence[ToolCall]) -> str:
        if self.in_list:
            return f"{OPEN}{write_list(calls)}"
        return "".join(f"{OPEN}{call.name}{ARGUMENTS}{to_json(call.arguments)}" for call in calls)

    def lark(self, grammar: GrammarWriter, tools: Sequence[Tool], *, many: bool) -> str:
        if self.in_list:
            return f"{grammar.tag(OPEN)} {grammar.call_list(tools, many=many)}"
        calls = [
            f"{literal(tool.name)} {grammar.tag(ARGUMENTS)} {grammar.arguments(tool)}"
            for tool in tools
        ]
        one = grammar.rule(f"{grammar.tag(OPEN)} {any_of(calls)}")
        return one_or_more(one) if many else one
