"""`<tool_call>name<arg_key>key</arg_key><arg_value>value</arg_value></tool_call>`: GLM-4.5 on.

Knows:        these tags.
Ignorant of:  other styles.

Source: https://huggingface.co/zai-org/GLM-4.6/blob/main/chat_template.jinja
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from lowmoe.engine.messages import Tool, ToolCall
from lowmoe.engine.tool_calls.grammar import GrammarWriter, any_of, literal, one_or_more
from lowmoe.engine.tool_calls.parameters import (
    ParameterTags,
    lark_parameters,
    read_parameters,
    write_parameters,
)
from lowmoe.engine.tool_calls.reader import Reader, Reading
from lowmoe.engine.tool_calls.style import Style, Tools

OPEN, CLOSE = "<tool_call>", "</tool_call>"

_NAME = re.compile(r"\s*([A-Za-z0-9_.-]{1,128})\s*(?=<)")


@dataclass(frozen=True, slots=True)
class ArgKeys(Style):
    """line: what stands between tags, a line break before GLM-4.7 and nothing since."""

    line: str = "\n"

    @property
    def tags(self) -> Sequence[str]:
        return (OPEN, CLOSE, "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")

    @property
    def _parameters(self) -> ParameterTags:
        return ParameterTags(
            open="<arg_key>",
            named="</arg_key>",
            after_key=self.line,
            begin="<arg_value>",
            close="</arg_value>",
            after_each=self.line,
            end=CLOSE,
        )

    def read(self, reader: Reader, tools: Tools) -> Reading[None]:
        def call(tag: str) -> Reading[bool]:
            named = yield from reader.match(_NAME)
            tool = tools.get(named[1]) if named else None
            return tool is not None and (yield from read_parameters(reader, tool, self._parameters))

        yield from reader.calls(OPEN, read=call)

    def write(self, calls: Sequence[ToolCall]) -> str:
        return self.line.join(
            f"{OPEN}{call.name}{self.line}{write_parameters(call, self._parameters)}"
            for call in calls
        )

    def lark(self, grammar: GrammarWriter, tools: Sequence[Tool], *, many: bool) -> str:
        calls = [
            f"{literal(tool.name + self.line)} {lark_parameters(grammar, tool, self._parameters)}"
            for tool in tools
        ]
        one = grammar.rule(f"{grammar.tag(OPEN)} {any_of(calls)}")
        between = literal(self.line) if self.line else ""
        return one_or_more(one, between) if many else one
