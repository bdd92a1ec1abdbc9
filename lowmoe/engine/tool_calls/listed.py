"""`<|tool_call|>[{"name": ..., "arguments": {...}}]`: Granite 3, Phi-4.

Knows:        this tag, and that Phi closes it.
Ignorant of:  other styles.

Source: https://huggingface.co/ibm-granite/granite-3.3-8b-instruct,
https://huggingface.co/microsoft/Phi-4-mini-instruct
"""

from collections.abc import Sequence
from dataclasses import dataclass

from lowmoe.engine.messages import Tool, ToolCall
from lowmoe.engine.tool_calls.grammar import GrammarWriter
from lowmoe.engine.tool_calls.objects import read_list, write_list
from lowmoe.engine.tool_calls.reader import Reader, Reading
from lowmoe.engine.tool_calls.style import Style, Tools

OPEN, CLOSE = "<|tool_call|>", "<|/tool_call|>"


@dataclass(frozen=True, slots=True)
class Listed(Style):
    """is_closed: whether a tag ends the list."""

    is_closed: bool = False

    @property
    def tags(self) -> Sequence[str]:
        return (OPEN, CLOSE)

    def read(self, reader: Reader, tools: Tools) -> Reading[None]:
        def calls(tag: str) -> Reading[bool]:
            if not (yield from read_list(reader, tools)):
                return False
            yield from reader.expect(CLOSE)
            return True

        yield from reader.calls(OPEN, read=calls)

    def write(self, calls: Sequence[ToolCall]) -> str:
        return f"{OPEN}{write_list(calls)}{CLOSE if self.is_closed else ''}"

    def lark(self, grammar: GrammarWriter, tools: Sequence[Tool], *, many: bool) -> str:
        calls = f"{grammar.tag(OPEN)} {grammar.call_list(tools, many=many)}"
        return f"{calls} {grammar.tag(CLOSE)}" if self.is_closed else calls
