"""`<|tool_call|>[{"name": ..., "arguments": {...}}]`: Granite 3, Phi-4, Hunyuan.

Knows:        that a tag begins such a list, Hunyuan's `<tool_calls>`, and another may end it.
Ignorant of:  other styles.

Source: https://huggingface.co/ibm-granite/granite-3.3-8b-instruct,
https://huggingface.co/microsoft/Phi-4-mini-instruct,
https://huggingface.co/tencent/Hunyuan-A13B-Instruct
"""

from collections.abc import Sequence
from dataclasses import dataclass

from lowmoe.engine.messages import Tool, ToolCall
from lowmoe.engine.tool_calls.grammar import GrammarWriter
from lowmoe.engine.tool_calls.objects import read_list, write_list
from lowmoe.engine.tool_calls.reader import Reader, Reading
from lowmoe.engine.tool_calls.style import Style, Tools


@dataclass(frozen=True, slots=True)
class Listed(Style):
    """close: "" where no tag ends the list."""

    open: str = "<|tool_call|>"
    close: str = ""

    @property
    def tags(self) -> Sequence[str]:
        return (self.open, self.close) if self.close else (self.open,)

    def read(self, reader: Reader, tools: Tools) -> Reading[None]:
        def calls(tag: str) -> Reading[bool]:
            if not (yield from read_list(reader, tools)):
                return False
            yield from reader.blanks()
            yield from reader.expect(self.close)
            return True

        yield from reader.calls(self.open, read=calls)

    def write(self, calls: Sequence[ToolCall]) -> str:
        return f"{self.open}{write_list(calls)}{self.close}"

    def lark(self, grammar: GrammarWriter, tools: Sequence[Tool], *, many: bool) -> str:
        calls = f"{grammar.tag(self.open)} {grammar.call_list(tools, many=many)}"
        return f"{calls} {grammar.tag(self.close)}" if self.close else calls
