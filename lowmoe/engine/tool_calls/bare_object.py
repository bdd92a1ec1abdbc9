"""A call that is the whole answer, {"name": ..., "parameters": {...}}: Llama 3.1 to 4.

Knows:        that `<|python_tag|>` may stand before it, or Llama 4's text with `<|python_end|>`.
Ignorant of:  other styles, calls of the tools that Meta built in.

Source: https://github.com/meta-llama/llama-models/blob/main/models/llama3_1/prompt_format.md
"""

from collections.abc import Sequence

from lowmoe.engine.messages import Tool, ToolCall
from lowmoe.engine.tool_calls.grammar import GrammarWriter, any_of, literal, one_or_more
from lowmoe.engine.tool_calls.objects import read_object, write_object
from lowmoe.engine.tool_calls.reader import Reader, Reading
from lowmoe.engine.tool_calls.style import Style, Tools

OPEN, AFTER_TEXT = "<|python_tag|>", "<|python_end|>"


class BareObject(Style):
    """Only a call of a tool that is offered is one: an answer may be JSON without being a call."""

    tags = (OPEN, AFTER_TEXT)

    def read(self, reader: Reader, tools: Tools) -> Reading[None]:
        def calls(tag: str) -> Reading[bool]:
            is_one = yield from self._call(reader, tools)
            while is_one:
                yield from reader.blanks()
                at = reader.at
                follows = yield from reader.expect(";", "{")
                if not follows:
                    return True
                if follows == "{":
                    reader.rewind(at)
                is_one = yield from self._call(reader, tools)
            return False

        yield from reader.at_start("{", read=calls)
        yield from reader.calls(OPEN, AFTER_TEXT, read=calls)

    def _call(self, reader: Reader, tools: Tools) -> Reading[bool]:
        yield from reader.blanks()
        return (yield from read_object(reader, tools))

    def write(self, calls: Sequence[ToolCall]) -> str:
        return "; ".join(write_object(call, key="parameters") for call in calls)

    def lark(self, grammar: GrammarWriter, tools: Sequence[Tool], *, many: bool) -> str:
        one = any_of([grammar.call_object(tool, key="parameters") for tool in tools])
        return one_or_more(one, literal("; ")) if many else one
