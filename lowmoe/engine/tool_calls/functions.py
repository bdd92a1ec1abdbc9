"""`<tool_call><function=name><parameter=key>value</parameter>...`: Qwen3-Coder, Qwen3.5.

Knows:        these tags.
Ignorant of:  other styles.

Source: https://huggingface.co/Qwen/Qwen3-Coder-30B-A3B-Instruct/blob/main/chat_template.jinja
"""

from collections.abc import Sequence

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

OPEN, CLOSE = "<tool_call>", "</tool_call>"
FUNCTION = "<function="
PARAMETERS = ParameterTags(
    open="<parameter=", named=">", close="</parameter>", end="</function>", broken_lines=True
)


class Functions(Style):
    tags = (OPEN, CLOSE)

    def read(self, reader: Reader, tools: Tools) -> Reading[None]:
        def call(tag: str) -> Reading[bool]:
            if tag == OPEN:
                yield from reader.blanks()
                if not (yield from reader.expect(FUNCTION)):
                    return False
            named = yield from reader.until(">", most=MAX_HEAD)
            tool = tools.get(named[0].strip()) if named else None
            if tool is None or not (yield from read_parameters(reader, tool, PARAMETERS)):
                return False
            yield from reader.blanks()
            yield from reader.expect(CLOSE)
            return True

        # These models leave the outer tag out at times, after some text of their own.
        yield from reader.calls(OPEN, FUNCTION, read=call)

    def write(self, calls: Sequence[ToolCall]) -> str:
        heads = [(f"{OPEN}\n{FUNCTION}{call.name}>\n", call) for call in calls]
        return "\n".join(
            f"{head}{write_parameters(call, PARAMETERS)}\n{CLOSE}" for head, call in heads
        )

    def lark(self, grammar: GrammarWriter, tools: Sequence[Tool], *, many: bool) -> str:
        calls = [
            f"{literal(f'{FUNCTION}{tool.name}>' + chr(10))} "
            f"{lark_parameters(grammar, tool, PARAMETERS)}"
            for tool in tools
        ]
        one = grammar.rule(f'{grammar.tag(OPEN)} "\\n" {any_of(calls)} "\\n" {grammar.tag(CLOSE)}')
        return one_or_more(one, literal("\n")) if many else one
