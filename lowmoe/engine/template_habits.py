"""What a chat template makes of tools, calls, results and a system message: found out by trying.

Knows:        what templates differ in.
Ignorant of:  how a conversation is put for one that lacks something.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from lowmoe.engine.messages import Tool
from lowmoe.engine.tool_calls.definitions import definition
from lowmoe.errors import TextError

# What a template writes of (messages, tools).
Writes: TypeAlias = Callable[[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]] | None], str]

_NAME, _OTHER_NAME = "probe_tool", "probe_other_tool"
_TEXT, _RESULT = "probe of a text", "probe of a result"
_VALUE_TEXT = "probe of a value"
_VALUE = [_VALUE_TEXT, None]
_VALUE_JSON = f'["{_VALUE_TEXT}", null]'
_TOOL = definition(Tool(name="probe_defined", description="probe of a definition"))
_SHORT_ID, _LONG_ID = "probe1234", "probe-of-an-id"
_USER = {"role": "user", "content": _TEXT + "?"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Habits:
    """takes_system: a system message; takes_tools: it writes their definitions; takes_results: it
    knows the role of a tool's result.

    calls: whether it writes those of earlier answers, with arguments given as a mapping or as JSON.
    A template that makes something of its own of a mapping's values gets one.
    one_call: only one in each answer; text: that of an answer with calls is written beside them, or
    may be written as an answer of its own before, or has no place; short_ids: they must have nine
    letters or digits.
    """

    takes_system: bool
    takes_tools: bool
    takes_results: bool
    calls: Literal["mapping", "json"] | None
    one_call: bool
    text: Literal["beside", "before", "lost"]
    short_ids: bool

    @staticmethod
    def of(writes: Writes, *, with_tools: bool) -> "Habits":
        """Find them out.  writes: raises TextError for what it refuses.

        with_tools: of conversations with tools; Hunyuan's template knows calls only in such.
        """
        takes_tools = _TOOL["function"]["name"] in _written(writes, tools=[_TOOL])
        if with_tools and takes_tools:
            writes = _with_tools(writes)
        system = {"role": "system", "content": _TEXT}
        calls = _calls(writes)
        one = _call(_NAME, json=calls == "json")
        other = _call(_OTHER_NAME, json=calls == "json")
        both = _written(writes, _answer(one, other))
        result = {"role": "tool", "content": _RESULT, "name": _NAME, "tool_call_id": _SHORT_ID}
        with_result = [_answer(one) if calls else {"role": "assistant", "content": _TEXT}, result]
        return Habits(
            takes_system=_TEXT in _written(writes, before=[system]).replace(_TEXT + "?", ""),
            takes_tools=takes_tools,
            # Many a template writes any role down, of which its model has never heard.
            takes_results=(takes_tools or calls is not None)
            and _RESULT in _written(writes, *with_result),
            calls=calls,
            one_call=_NAME not in both or _OTHER_NAME not in both,
            text=_text(writes, one, result),
            short_ids=not _written(writes, _answer({**one, "id": _LONG_ID})),
        )


def _with_tools(writes: Writes) -> Writes:
    return lambda messages, tools: writes(messages, tools or [_TOOL])


def _calls(writes: Writes) -> Literal["mapping", "json"] | None:
    of_mapping, of_json = (_written(writes, _answer(_call(_NAME, json=j))) for j in (False, True))
    if _has(of_mapping, _NAME, _VALUE_JSON):
        return "mapping"
    if _has(of_json, _NAME, _VALUE_JSON):
        return "json"
    return "mapping" if _has(of_mapping, _NAME, _VALUE_TEXT) else None


def _text(
    writes: Writes, call: Mapping[str, Any], result: Mapping[str, Any]
) -> Literal["beside", "before", "lost"]:
    if _has(_written(writes, _answer(call, text=_RESULT)), _NAME, _RESULT):
        return "beside"
    text = {"role": "assistant", "content": _TEXT}
    return "before" if _written(writes, text, _answer(call), result, text, _USER) else "lost"


def _written(
    writes: Writes,
    *after: Mapping[str, Any],
    before: Sequence[Mapping[str, Any]] = (),
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> str:
    """Nothing, if it refuses."""
    try:
        return writes([*before, _USER, *after], tools)
    except TextError:
        return ""


def _answer(*calls: Mapping[str, Any], text: str = "") -> Mapping[str, Any]:
    return {"role": "assistant", "content": text, "tool_calls": list(calls)}


def _call(name: str, *, json: bool) -> dict[str, Any]:
    arguments = f'{{"probe": {_VALUE_JSON}}}' if json else {"probe": _VALUE}
    return {
        "id": _SHORT_ID,
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def _has(text: str, *words: str) -> bool:
    return all(word in text for word in words)
