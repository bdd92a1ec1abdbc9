"""DeepSeek's calls between tokens of their own: V3, R1 and V3.1.

Knows:        these tokens; that V3 and R1 write the type before the name and JSON in a fence.
Ignorant of:  other styles; DeepSeek's later ones are in dsml.py.

Source: https://huggingface.co/deepseek-ai/DeepSeek-V3.1, "ToolCall"
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from lowmoe.engine.messages import Tool, ToolCall
from lowmoe.engine.tool_calls.definitions import to_json
from lowmoe.engine.tool_calls.grammar import GrammarWriter, any_of, literal, one_or_more
from lowmoe.engine.tool_calls.objects import read_arguments
from lowmoe.engine.tool_calls.reader import MAX_HEAD, Reader, Reading
from lowmoe.engine.tool_calls.style import Style, Tools

ALL_OPEN, ALL_CLOSE = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
OPEN, CLOSE = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
SEPARATOR = "<｜tool▁sep｜>"
FENCE = "```"

_NAME_IN_LINE = re.compile(r"\s*([A-Za-z0-9_.-]{1,128})\s*(?=`)")


@dataclass(frozen=True, slots=True)
class ToolSep(Style):
    """fenced: as V3 and R1 write calls."""

    fenced: bool

    @property
    def tags(self) -> Sequence[str]:
        return (ALL_OPEN, ALL_CLOSE, OPEN, CLOSE, SEPARATOR)

    def read(self, reader: Reader, tools: Tools) -> Reading[None]:
        def calls(tag: str) -> Reading[bool]:
            yield from reader.blanks()
            follows = yield from reader.expect(OPEN)
            if not follows:
                return False
            while follows == OPEN:
                if not (yield from self._call(reader, tools)):
                    return False
                yield from reader.blanks()
                follows = yield from reader.expect(OPEN, ALL_CLOSE)
            return follows == ALL_CLOSE or reader.is_at_end

        yield from reader.calls(ALL_OPEN, read=calls)

    def _call(self, reader: Reader, tools: Tools) -> Reading[bool]:
        head = yield from reader.until(SEPARATOR, most=MAX_HEAD)
        if head is None:
            return False
        name = head[0].strip()
        if self.fenced:
            line = yield from reader.match(_NAME_IN_LINE)
            if line is None or not (yield from reader.expect(f"{FENCE}json")):
                return False
            name = line[1]
        if not (yield from read_arguments(reader, name, tools)):
            return False
        if self.fenced:
            yield from reader.blanks()
            yield from reader.expect(FENCE)
        yield from reader.blanks()
        yield from reader.expect(CLOSE)
        return True

    def write(self, calls: Sequence[ToolCall]) -> str:
        written = []
        for call in calls:
            kind, before, after = self._around(call.name)
            arguments = to_json(call.arguments)
            written.append(f"{OPEN}{kind}{SEPARATOR}{before}{arguments}{after}{CLOSE}")
        return f"{ALL_OPEN}{self._between.join(written)}{ALL_CLOSE}"

    def lark(self, grammar: GrammarWriter, tools: Sequence[Tool], *, many: bool) -> str:
        calls = []
        for tool in tools:
            kind, before, after = self._around(tool.name)
            parts = [literal(kind), grammar.tag(SEPARATOR), *([literal(before)] if before else [])]
            parts += [grammar.arguments(tool), *([literal(after)] if after else [])]
            calls.append(" ".join(parts))
        one = grammar.rule(f"{grammar.tag(OPEN)} {any_of(calls)} {grammar.tag(CLOSE)}")
        between = literal(self._between) if self._between else ""
        block = one_or_more(one, between) if many else one
        return f"{grammar.tag(ALL_OPEN)} {block} {grammar.tag(ALL_CLOSE)}"

    def _around(self, name: str) -> tuple[str, str, str]:
        """What stands before the separator, between it and the arguments, and after them."""
        if self.fenced:
            return "function", f"{name}\n{FENCE}json\n", f"\n{FENCE}"
        return name, "", ""

    @property
    def _between(self) -> str:
        return "\n" if self.fenced else ""
