"""`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`: Qwen2.5, Qwen3, Hermes, Granite 4.

Knows:        these tags.
Ignorant of:  other styles.

Source: https://huggingface.co/Qwen/Qwen3-30B-A3B/blob/main/tokenizer_config.json
"""

from collections.abc import Sequence

from lowmoe.engine.messages import Tool, ToolCall
from lowmoe.engine.tool_calls.grammar import GrammarWriter, any_of, literal, one_or_more
from lowmoe.engine.tool_calls.objects import read_object, write_object
from lowmoe.engine.tool_calls.reader import Reader, Reading
from lowmoe.engine.tool_calls.style import Style, Tools

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class Hermes(Style):
    """The commonest, so what a model is told to write whose template knows no tools."""

    tags = (OPEN, CLOSE)

    def read(self, reader: Reader, tools: Tools) -> Reading[None]:
        def call(tag: str) -> Reading[bool]:
            yield from reader.blanks()
            if not (yield from read_object(reader, tools)):
                return False
            yield from reader.blanks()
            yield from reader.expect(CLOSE)  # some models end the answer in its place
            return True

        yield from reader.calls(OPEN, read=call)

    def write(self, calls: Sequence[ToolCall]) -> str:
        return "\n".join(f"{OPEN}\n{write_object(call)}\n{CLOSE}" for call in calls)

    def lark(self, grammar: GrammarWriter, tools: Sequence[Tool], *, many: bool) -> str:
        call = any_of([grammar.call_object(tool) for tool in tools])
        whole = grammar.rule(f'{grammar.tag(OPEN)} "\\n" {call} "\\n" {grammar.tag(CLOSE)}')
        return one_or_more(whole, literal("\n")) if many else whole
