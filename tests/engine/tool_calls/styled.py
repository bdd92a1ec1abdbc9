"""Every style of calls, tools to call, and what a splitter makes of a text.

Knows:        one name for each style.
Ignorant of:  what is tested with it.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from lowmoe.engine.messages import Tool, ToolCall
from lowmoe.engine.thinking import TO_TOOL
from lowmoe.engine.tool_calls.arg_keys import ArgKeys
from lowmoe.engine.tool_calls.bare_object import BareObject
from lowmoe.engine.tool_calls.bracketed import Bracketed
from lowmoe.engine.tool_calls.call_sections import CallSections
from lowmoe.engine.tool_calls.dsml import dsml
from lowmoe.engine.tool_calls.functions import Functions
from lowmoe.engine.tool_calls.harmony import Harmony
from lowmoe.engine.tool_calls.hermes import Hermes
from lowmoe.engine.tool_calls.invoke import invoke
from lowmoe.engine.tool_calls.listed import Listed
from lowmoe.engine.tool_calls.object_lines import ObjectLines
from lowmoe.engine.tool_calls.pythonic import Pythonic
from lowmoe.engine.tool_calls.reader import Part
from lowmoe.engine.tool_calls.splitter import CallSplitter
from lowmoe.engine.tool_calls.style import Style
from lowmoe.engine.tool_calls.tool_sep import ToolSep

# Their arguments are JSON as it stands.
OF_JSON: Mapping[str, Style] = {
    "bare object": BareObject(),
    "bracketed": Bracketed(in_list=False),
    "bracketed list": Bracketed(in_list=True),
    "call sections": CallSections(),
    "hermes": Hermes(),
    "listed": Listed(),
    "listed and closed": Listed(open="<tool_calls>", close="</tool_calls>"),
    "object lines": ObjectLines(),
    "tool sep": ToolSep(fenced=False),
    "tool sep, fenced": ToolSep(fenced=True),
}
# Theirs are Python's.
OF_PYTHON: Mapping[str, Style] = {"pythonic": Pythonic()}
# Theirs are text between tags.
OF_TEXT: Mapping[str, Style] = {
    "arg keys": ArgKeys(),
    "arg keys in a line": ArgKeys(line=""),
    "dsml": dsml("function_calls"),
    "functions": Functions(),
    "invoke": invoke("<x:tool_call>"),
}
WITHOUT_HARMONY = {**OF_JSON, **OF_PYTHON, **OF_TEXT}
# They have no tag that a call begins with.
AT_START = ("bare object", "pythonic")
STYLES = {**WITHOUT_HARMONY, "harmony": Harmony()}

ANYTHING = Tool(
    name="any.thing_1-x",
    parameters={
        "type": "object",
        "properties": {
            "text": {"type": "string"},
            "count": {"type": "integer"},
            "ratio": {"type": "number"},
            "flag": {"type": "boolean"},
            "nothing": {"type": "null"},
            "maybe": {"anyOf": [{"$ref": "#/$defs/word"}, {"type": "null"}]},
            "items": {"type": "array"},
            "map": {"type": "object"},
        },
        "$defs": {"word": {"type": "string"}},
    },
)
NOTHING = Tool(name="nothing")
TOOLS = {tool.name: tool for tool in (ANYTHING, NOTHING)}


def joined(parts: Iterable[Part]) -> list[Part]:
    """Runs of text and of arguments as one part each."""
    found: list[Part] = []
    for kind, group in groupby(parts, key=lambda part: part[0]):
        texts = [text for _, text in group]
        found += [(kind, text) for text in texts] if kind == "call" else [(kind, "".join(texts))]
    return found


def split(
    style: Style, pieces: Sequence[str], tools: Mapping[str, Tool] = TOOLS, *, tokens: bool = False
) -> list[Part]:
    """tokens: pieces that are tags are tokens; a head of a message always is, as thinking tells."""
    splitter = CallSplitter(style, tools, {TO_TOOL, *(style.tags if tokens else ())})
    parts: list[Part] = []
    for piece in pieces:
        is_token = piece.startswith(TO_TOOL) or (tokens and piece in style.tags)
        parts += splitter.push(piece, control=is_token)
    return joined([*parts, *splitter.flush()])


def calls_in(parts: Iterable[Part]) -> list[tuple[str, Any]]:
    """Names and arguments; None for arguments that are no JSON."""
    found: list[tuple[str, str]] = []
    for kind, text in parts:
        if kind == "call":
            found.append((text, ""))
        elif kind == "arguments":
            name, so_far = found.pop()
            found.append((name, so_far + text))
    return [(name, _read(text)) for name, text in found]


def text_in(parts: Iterable[Part]) -> str:
    """What is no call."""
    return "".join(text for kind, text in parts if kind == "answer")


def call(name: str = ANYTHING.name, **arguments: Any) -> ToolCall:
    """One of these tools."""
    return ToolCall(id="", name=name, arguments=arguments)


def _read(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None
