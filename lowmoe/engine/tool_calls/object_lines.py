"""`<tool_calls>` and a JSON object in each line: MiniMax-M1.

Knows:        these tags.
Ignorant of:  other styles.

Source: https://huggingface.co/MiniMaxAI/MiniMax-M1-80k/blob/main/docs/function_call_guide.md
"""

from collections.abc import Sequence

from lowmoe.engine.messages import Tool, ToolCall
from lowmoe.engine.tool_calls.grammar import GrammarWriter, any_of, literal, one_or_more
from lowmoe.engine.tool_calls.objects import read_object, write_object
from lowmoe.engine.tool_calls.reader import Reader, Reading
from lowmoe.engine.tool_calls.style import Style, Tools

OPEN, CLOSE = "<tool_calls>", "</tool_calls>"


class ObjectLines(Style):
    tags = (OPEN, CLOSE)

    def read(self, reader: Reader, tools: Tools) -> Reading[None]:
        def calls(tag: str) -> Reading[bool]:
            yield from reader.blanks()
            is_one = yield from read_object(reader, tools)
            while is_one:
                yield from reader.blanks()
                if (yield from reader.expect(CLOSE)) or reader.is_at_end:
                    return True
                is_one = yield from read_object(reader, tools)
            return False

        yield from reader.calls(OPEN, read=calls)

    def write(self, calls: Sequence[ToolCall]) -> str:
        lines = "".join(f"{write_object(call)}\n" for call in calls)
        return f"{OPEN}\n{lines}{CLOSE}"

    def lark(self, grammar: GrammarWriter, tools: Sequence[Tool], *, many: bool) -> str:
        one = any_of([grammar.call_object(tool) for tool in tools])
        calls = one_or_more(one, literal("\n")) if many else one
        return f'{grammar.tag(OPEN)} "\\n" {calls} "\\n" {grammar.tag(CLOSE)}'
