"""Calls as messages to a tool: gpt-oss's Harmony.

Knows:        what engine/thinking.py tells of the heads of such messages, and how they are written.
Ignorant of:  other styles.

Source: https://developers.openai.com/cookbook/articles/openai-harmony, "Receiving tool calls"
"""

import re
from collections.abc import Sequence

from lowmoe.engine.messages import Tool, ToolCall
from lowmoe.engine.thinking import TO_TOOL
from lowmoe.engine.tool_calls.definitions import to_json
from lowmoe.engine.tool_calls.grammar import ANY_TEXT, GrammarWriter, any_of, literal
from lowmoe.engine.tool_calls.objects import read_arguments
from lowmoe.engine.tool_calls.reader import Reader, Reading
from lowmoe.engine.tool_calls.style import Style, Tools

START, CHANNEL, MESSAGE, END = "<|start|>", "<|channel|>", "<|message|>", "<|end|>"
CONSTRAIN, CALL = "<|constrain|>", "<|call|>"

_NAME = re.compile(r"([A-Za-z0-9_.-]{1,128})\n(?=.)", re.DOTALL)


class Harmony(Style):
    """A message to a tool ends the answer, so there is one call in each."""

    from_start = True  # a call is told by the head of its message
    tags = (CALL, START, CHANNEL, MESSAGE, END, CONSTRAIN)

    def read(self, reader: Reader, tools: Tools) -> Reading[None]:
        def call(tag: str) -> Reading[bool]:
            name = yield from reader.match(_NAME)
            if name is None or not (yield from read_arguments(reader, name[1], tools)):
                return False
            yield from reader.blanks()
            yield from reader.expect(CALL)
            return True

        yield from reader.calls(TO_TOOL, read=call)

    def write(self, calls: Sequence[ToolCall]) -> str:
        return "".join(
            f"{START}assistant to=functions.{call.name}{CHANNEL}commentary json{MESSAGE}"
            f"{to_json(call.arguments)}{CALL}"
            for call in calls
        )

    def lark(self, grammar: GrammarWriter, tools: Sequence[Tool], *, many: bool) -> str:
        tag = grammar.tag
        calls = []
        for tool in tools:
            to = literal(f" to=functions.{tool.name}")
            # The name stands before the channel or after it; models do both.
            head = f'{to} {tag(CHANNEL)} "commentary" | {tag(CHANNEL)} "commentary" {to}'
            body = f'(" "? {tag(CONSTRAIN)} "json" | " json")? {tag(MESSAGE)}'
            calls.append(f"({head}) {body} {grammar.arguments(tool)}")
        thought = f'{tag(CHANNEL)} "analysis" {tag(MESSAGE)} {ANY_TEXT} {tag(END)}'
        start = f'{tag(START)} "assistant"'
        return f"({thought})? ({start})? {any_of(calls)}"
