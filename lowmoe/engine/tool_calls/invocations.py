"""Calls as a block of invocations: `<block><invoke name="..."><parameter name="...">...`.

Knows:        what such blocks have in common.
Ignorant of:  whose they are.
"""

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
from lowmoe.engine.tool_calls.reader import MAX_HEAD, Reader, Reading
from lowmoe.engine.tool_calls.style import Style, Tools


@dataclass(frozen=True, slots=True, kw_only=True)
class Invocations(Style):
    """`open`, then `invoke` name `after_name` parameters for each call, then `close`."""

    open: str
    close: str
    invoke: str
    after_name: str
    parameters: ParameterTags

    @property
    def tags(self) -> Sequence[str]:
        return (self.open, self.close)

    def read(self, reader: Reader, tools: Tools) -> Reading[None]:
        def calls(tag: str) -> Reading[bool]:
            yield from reader.blanks()
            follows = yield from reader.expect(self.invoke)
            if not follows:
                return False
            while follows == self.invoke:
                named = yield from reader.until(self.after_name.rstrip(), most=MAX_HEAD)
                tool = tools.get(named[0]) if named else None
                if tool is None or not (yield from read_parameters(reader, tool, self.parameters)):
                    return False
                yield from reader.blanks()
                follows = yield from reader.expect(self.invoke, self.close)
            return follows == self.close or reader.is_at_end

        yield from reader.calls(self.open, read=calls)

    def write(self, calls: Sequence[ToolCall]) -> str:
        invocations = "".join(
            f"{self.invoke}{call.name}{self.after_name}{write_parameters(call, self.parameters)}\n"
            for call in calls
        )
        return f"{self.open}\n{invocations}{self.close}"

    def lark(self, grammar: GrammarWriter, tools: Sequence[Tool], *, many: bool) -> str:
        calls = [
            f"{literal(f'{self.invoke}{tool.name}{self.after_name}')} "
            f"{lark_parameters(grammar, tool, self.parameters)}"
            for tool in tools
        ]
        one = grammar.rule(any_of(calls))
        block = one_or_more(one, literal("\n")) if many else one
        return f'{grammar.tag(self.open)} "\\n" {block} "\\n" {grammar.tag(self.close)}'
