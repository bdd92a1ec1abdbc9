"""`<|tool_call_begin|>functions.name:0<|tool_call_argument_begin|>{...}<|tool_call_end|>`: Kimi-K2.

Knows:        these tokens.
Ignorant of:  other styles.

Source: https://huggingface.co/moonshotai/Kimi-K2-Instruct/blob/main/docs/tool_call_guidance.md
"""

import re
from collections.abc import Sequence

from lowmoe.engine.messages import Tool, ToolCall
from lowmoe.engine.tool_calls.definitions import to_json
from lowmoe.engine.tool_calls.grammar import GrammarWriter, any_of, literal, one_or_more
from lowmoe.engine.tool_calls.objects import read_arguments
from lowmoe.engine.tool_calls.reader import MAX_HEAD, Reader, Reading
from lowmoe.engine.tool_calls.style import Style, Tools

ALL_OPEN, ALL_CLOSE = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
OPEN, CLOSE = "<|tool_call_begin|>", "<|tool_call_end|>"
ARGUMENTS = "<|tool_call_argument_begin|>"

_ID = re.compile(r"\s*(?:functions\.)?([A-Za-z0-9_.-]{1,128}?)(?::\d+)?\s*")


class CallSections(Style):
    tags = (ALL_OPEN, ALL_CLOSE, OPEN, CLOSE, ARGUMENTS)

    def read(self, reader: Reader, tools: Tools) -> Reading[None]:
        def calls(tag: str) -> Reading[bool]:
            yield from reader.blanks()
            follows = yield from reader.expect(OPEN)
            if not follows:
                return False
            while follows == OPEN:
                head = yield from reader.until(ARGUMENTS, most=MAX_HEAD)
                name = _ID.fullmatch(head[0]) if head else None
                if name is None or not (yield from read_arguments(reader, name[1], tools)):
                    return False
                yield from reader.blanks()
                yield from reader.expect(CLOSE)
                yield from reader.blanks()
                follows = yield from reader.expect(OPEN, ALL_CLOSE)
            return follows == ALL_CLOSE or reader.is_at_end

        yield from reader.calls(ALL_OPEN, read=calls)

    def write(self, calls: Sequence[ToolCall]) -> str:
        written = "".join(
            f"{OPEN}functions.{call.name}:{number}{ARGUMENTS}{to_json(call.arguments)}{CLOSE}"
            for number, call in enumerate(calls)
        )
        return f"{ALL_OPEN}{written}{ALL_CLOSE}"

    def lark(self, grammar: GrammarWriter, tools: Sequence[Tool], *, many: bool) -> str:
        calls = [
            f"{literal(f'functions.{tool.name}:')} /[0-9]{{1,3}}/ {grammar.tag(ARGUMENTS)} "
            f"{grammar.arguments(tool)}"
            for tool in tools
        ]
        one = grammar.rule(f"{grammar.tag(OPEN)} {any_of(calls)} {grammar.tag(CLOSE)}")
        block = one_or_more(one) if many else one
        return f"{grammar.tag(ALL_OPEN)} {block} {grammar.tag(ALL_CLOSE)}"
