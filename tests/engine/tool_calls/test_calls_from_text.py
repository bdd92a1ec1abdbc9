"""Calls come out of an answer as they went in, however it is cut; what is none stays text."""

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.cli.serving.utils import _RESPONSE_TEMPLATE_FALLBACKS
from transformers.utils.chat_parsing import parse_response

from lowmoe.engine.messages import Tool, ToolCall
from lowmoe.engine.thinking import TO_TOOL
from lowmoe.engine.tool_calls.harmony import CALL, Harmony
from tests.engine.tool_calls.styled import (
    ANYTHING,
    AT_START,
    NOTHING,
    OF_JSON,
    OF_PYTHON,
    OF_TEXT,
    STYLES,
    WITHOUT_HARMONY,
    call,
    calls_in,
    split,
    text_in,
)

# What stands between tags must not hold the tags; and lone surrogates have no UTF-8.
PLAIN = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<｜"), max_size=20)
HOSTILE = st.sampled_from(["</tool_call>", "<tool_call>", '"}', "{", "[TOOL_CALLS]", "\\", "```"])
SCALARS = st.none() | st.booleans() | st.integers(-(10**9), 10**9) | PLAIN
VALUES = st.recursive(
    SCALARS, lambda v: st.lists(v, max_size=2) | st.dictionaries(PLAIN, v, max_size=2)
)


def arguments(strings: st.SearchStrategy[str]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {},
        optional={
            "text": strings,
            "count": st.integers(-(10**9), 10**9),
            "ratio": st.floats(allow_nan=False, allow_infinity=False),
            "flag": st.booleans(),
            "nothing": st.none(),
            "maybe": st.none() | strings.filter(lambda text: text.strip() not in ("null", "None")),
            "items": st.lists(VALUES, max_size=3),
            "map": st.dictionaries(PLAIN, VALUES, max_size=2),
        },
    )


def calls(strings: st.SearchStrategy[str]) -> st.SearchStrategy[list[ToolCall]]:
    anything = arguments(strings).map(lambda found: call(**found))
    return st.lists(anything | st.just(call(NOTHING.name)), min_size=1, max_size=3)


def cut(text: str, data: st.DataObject) -> list[str]:
    at = [0, *sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=4))), len(text)]
    return [text[start:end] for start, end in pairwise(at)]


def check_round_trip(name: str, made: list[ToolCall], before: str, data: st.DataObject) -> None:
    style = WITHOUT_HARMONY[name]
    before = "" if name in AT_START else before
    text = before + style.write(made)
    whole = split(style, [text])
    assert calls_in(whole) == [(one.name, one.arguments) for one in made]
    assert text_in(whole) == before.rstrip()
    assert split(style, cut(text, data)) == whole
    assert split(style, list(text)) == whole


@pytest.mark.parametrize("name", [*OF_JSON, *OF_PYTHON])
@settings(max_examples=40, deadline=None)
@given(made=calls(PLAIN | HOSTILE), before=st.sampled_from(["", "Let me see.\n\n"]), data=st.data())
def test_calls_with_json_come_out_as_they_went_in(
    name: str, made: list[ToolCall], before: str, data: st.DataObject
) -> None:
    check_round_trip(name, made, before, data)


@pytest.mark.parametrize("name", OF_TEXT)
@settings(max_examples=40, deadline=None)
@given(made=calls(PLAIN), before=st.sampled_from(["", "Let me see.\n\n"]), data=st.data())
def test_calls_with_text_come_out_as_they_went_in(
    name: str, made: list[ToolCall], before: str, data: st.DataObject
) -> None:
    check_round_trip(name, made, before, data)


def fragments(name: str) -> st.SearchStrategy[list[str]]:
    style = STYLES[name]
    whole = style.write([call(text="a", count=1)])
    thirds = [whole[: len(whole) // 3], whole[len(whole) // 3 :], whole[: -len(whole) // 3]]
    others = [
        ANYTHING.name,
        '{"name": "',
        '"arguments": {',
        "}",
        "]",
        "[",
        "\n",
        " ",
        "<",
        "a",
        ";",
    ]
    if name == "harmony":
        others += [f"{TO_TOOL}{ANYTHING.name}\n", '{"a": 1}']
    return st.lists(st.sampled_from([*style.tags, *thirds, whole, *others]), max_size=8)


@pytest.mark.parametrize("name", STYLES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_cut_changes_what_a_text_is(name: str, data: st.DataObject) -> None:
    pieces = data.draw(fragments(name))
    text = "".join(pieces)
    if name == "harmony":  # a head is never cut
        assert split(STYLES[name], pieces) == split(STYLES[name], [p for p in pieces if p])
        return
    whole = split(STYLES[name], [text])
    assert split(STYLES[name], pieces) == whole
    assert split(STYLES[name], list(text)) == whole


@pytest.mark.parametrize("name", STYLES)
@settings(max_examples=60, deadline=None)
@given(data=st.data(), tokens=st.booleans())
def test_without_tools_every_character_is_text(
    name: str, data: st.DataObject, tokens: bool
) -> None:
    pieces = data.draw(fragments(name))
    expected = [("answer", "".join(pieces))] if any(pieces) else []
    assert split(STYLES[name], pieces, {}, tokens=tokens) == expected


@pytest.mark.parametrize("name", WITHOUT_HARMONY)
def test_arguments_come_piece_by_piece_and_are_json_from_the_first_on(name: str) -> None:
    style = WITHOUT_HARMONY[name]
    made = call(text="one two three", items=[1, 2, {"a": None}], flag=True)
    text = style.write([made])
    assert calls_in(split(style, [text])) == [(made.name, made.arguments)]
    for end in range(len(text)):
        found = calls_in(split(style, [text[:end]]))
        # Half a call is none, or one whose arguments no client takes for whole ones.
        assert [one for _, one in found] in ([], [None], [made.arguments])


@pytest.mark.parametrize("name", WITHOUT_HARMONY)
def test_a_tag_that_is_a_token_counts_only_as_a_token(name: str) -> None:
    style = WITHOUT_HARMONY[name]
    text = style.write([call(count=1)])
    quoted = split(style, [text], tokens=True)
    # The one style reads calls without their outer tag too, and the others have no tag.
    if name != "functions" and name not in AT_START:
        assert text_in(quoted) == text
    tags = sorted(style.tags, key=len, reverse=True)
    pieces, rest = [], text
    while rest:
        tag = next((tag for tag in tags if rest.startswith(tag)), rest[0])
        pieces.append(tag)
        rest = rest[len(tag) :]
    assert calls_in(split(style, pieces, tokens=True)) == [(ANYTHING.name, {"count": 1})]


HERMES_FAULTS = [
    '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>',
    '<tool_call>{"name": "nothing", "arguments": 3}</tool_call>',
    '<tool_call>{"name": ["nothing"], "arguments": {}}</tool_call>',
    "<tool_call>nothing</tool_call>",
    '<tool_call>{"arguments": {}}</tool_call> and <tool_call>',
    "I would write <tool_call> and </tool_call>, say.",
    "<tool_call>" + '{"a":' * 100,
    "<tool_call>" * 50,
]


@pytest.mark.parametrize("text", HERMES_FAULTS)
def test_what_only_looks_like_a_call_is_text(text: str) -> None:
    assert split(STYLES["hermes"], list(text)) == [("answer", text)]


def test_a_call_that_breaks_off_stays_half_and_the_rest_is_text() -> None:
    text = '<tool_call>{"name": "nothing", "arguments": {"a": 1,, "b": 2}}</tool_call>'
    assert split(STYLES["hermes"], [text]) == [
        ("call", "nothing"),
        ("arguments", '{"a": 1,'),
        ("answer", ', "b": 2}}</tool_call>'),
    ]


A = {"a": 1}


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        # The arguments first; in a string; none; an id; tags left out.
        ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "nothing"}', A),
        ("hermes", '<tool_call>{"name": "nothing", "arguments": "{\\"a\\": 1}"}', A),
        ("hermes", '<tool_call>{"name": "nothing"}</tool_call>', {}),
        (
            "bracketed list",
            '[TOOL_CALLS] [{"name": "nothing", "arguments": {"a": 1}, "id": ""}]',
            A,
        ),
        ("bracketed", '[TOOL_CALLS]nothing[CALL_ID]123[ARGS]{"a": 1}', A),
        ("bracketed", '[TOOL_CALLS]nothing{"a": 1}', A),
        ("bare object", '<|python_tag|>{"name": "nothing", "parameters": {"a": 1}}', A),
        ("bare object", '{"type": "function", "name": "nothing", "parameters": {"a": 1}}', A),
        ("bare object", 'Yes.<|python_end|>{"name": "nothing", "parameters": {"a": 1}}', A),
        ("pythonic", "<|python_start|>[nothing(a=1)]<|python_end|>", A),
        ("pythonic", "[ nothing ( a = 1 ) ]", A),
        ("pythonic", "[nothing(a=Paris)]", {"a": "Paris"}),
        (
            "pythonic",
            "[nothing(a='it\\'s \\u00e9', b=[true, None])]",
            {"a": "it's é", "b": [True, None]},
        ),
        ("pythonic", '[nothing(a="say "you" loud\\ly")]', {"a": 'say "you" loud\\ly'}),
        ("functions", "<function=nothing>\n<parameter=a>\n1\n</parameter>\n</function>", A),
        ("arg keys", "<tool_call>nothing\n</tool_call>", {}),
        (
            "call sections",
            "<|tool_calls_section_begin|><|tool_call_begin|>nothing<|tool_call_argument_begin|>{}",
            {},
        ),
    ],
)
def test_what_models_write_beside_their_templates_is_a_call_too(
    name: str, text: str, expected: dict[str, Any]
) -> None:
    assert calls_in(split(STYLES[name], list(text))) == [("nothing", expected)]


@pytest.mark.parametrize("between", ["; ", "\n", ""])
def test_calls_may_follow_each_other_with_little_between_them(between: str) -> None:
    one = '{"name": "nothing", "parameters": {"a": 1}}'
    found = split(STYLES["bare object"], list(one + between + one))
    assert calls_in(found) == [("nothing", A), ("nothing", A)]
    assert text_in(found) == ""


def test_json_that_is_no_call_of_a_tool_is_an_answer() -> None:
    for text in ('{"name": "Ada", "parameters": {}}', '{"a": [1]}', "[1]", '{"name": '):
        assert split(STYLES["bare object"], list(text)) == [("answer", text)]


WEATHER = Tool(
    name="get_weather",
    parameters={
        "type": "object",
        "properties": {"location": {"type": "string"}, "days": {"type": "integer"}},
    },
)
# As the makers' pages write them: the model cards of DeepSeek-V3.1, Kimi-K2 and MiniMax-M2, the
# cookbook's page on Harmony (whose head thinking.py has read) and Meta's on Llama 3.1.
PUBLISHED = [
    (
        "tool sep",
        ["<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>"
        '{"location": "Paris"}<｜tool▁call▁end｜><｜tool▁calls▁end｜>'],
    ),
    (
        "call sections",
        ["<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0"
        '<|tool_call_argument_begin|>{"location": "Paris"}<|tool_call_end|>'
        "<|tool_calls_section_end|>"],
    ),
    (
        "invoke",
        ['<x:tool_call>\n<invoke name="get_weather">\n<parameter name="location">Paris'
        "</parameter>\n</invoke>\n</x:tool_call>"],
    ),
    ("harmony", ["to=functions.get_weather\n", '{"location":"Paris"}', CALL]),
    ("bare object", ['{"name": "get_weather", "parameters": {"location": "Paris"}}']),
]  # fmt: skip


@pytest.mark.parametrize(("name", "pieces"), PUBLISHED)
def test_examples_that_makers_publish_are_read(name: str, pieces: list[str]) -> None:
    found = split(STYLES[name], pieces, {WEATHER.name: WEATHER}, tokens=name == "harmony")
    assert calls_in(found) == [("get_weather", {"location": "Paris"})]
    assert text_in(found) == ""


def test_an_argument_is_read_as_its_schema_says() -> None:
    text = (
        "<tool_call>\n<function=get_weather>\n<parameter=location>\n7\n</parameter>\n"
        "<parameter=days>\n7\n</parameter>\n<parameter=other>\nTrue\n</parameter>\n"
        "<parameter=more>\nno JSON\n</parameter>\n</function>\n</tool_call>"
    )
    [(_, found)] = calls_in(split(STYLES["functions"], [text], {WEATHER.name: WEATHER}))
    assert found == {"location": "7", "days": 7, "other": True, "more": "no JSON"}


def test_a_schema_that_refers_to_itself_is_followed_once() -> None:
    node = {"anyOf": [{"$ref": "#/$defs/n"}, {"$ref": "#/$defs/n"}, {"type": "integer"}]}
    tool = Tool(
        name="t", parameters={"properties": {"a": {"$ref": "#/$defs/n"}}, "$defs": {"n": node}}
    )
    text = "<tool_call>t\n<arg_key>a</arg_key>\n<arg_value>5</arg_value>\n</tool_call>"
    assert calls_in(split(STYLES["arg keys"], [text], {"t": tool})) == [("t", {"a": 5})]


# transformers' server reads the calls of these two styles.
THEIRS = {"hermes": "qwen3", "functions": "qwen3_5"}


@pytest.mark.parametrize("name", THEIRS)
@settings(max_examples=40, deadline=None)
@given(made=calls(PLAIN.map(str.strip).filter(bool)))
def test_calls_are_read_as_transformers_reads_them(name: str, made: list[ToolCall]) -> None:
    text = "Let me see.\n" + STYLES[name].write(made)
    [template] = [t for names, t in _RESPONSE_TEMPLATE_FALLBACKS.items() if THEIRS[name] in names]
    tools = [
        {"type": "function", "function": {"name": t.name, "parameters": t.parameters}}
        for t in (ANYTHING, NOTHING)
    ]
    theirs = parse_response(text, template, prefix="<|im_start|>assistant\n", tools=tools)
    functions = [one["function"] for one in theirs["tool_calls"]]
    expected = [(one["name"], one["arguments"]) for one in functions]
    assert calls_in(split(STYLES[name], [text])) == expected
    assert text_in(split(STYLES[name], [text])) == theirs["content"].strip()


def test_harmony_reads_only_what_is_addressed_to_a_tool() -> None:
    pieces = ["Hello ", "to=functions.nothing\n", json.dumps({"a": 1}), CALL]
    assert split(Harmony(), pieces, tokens=True) == [
        ("answer", "Hello"),
        ("call", "nothing"),
        ("arguments", '{"a": 1}'),
    ]
