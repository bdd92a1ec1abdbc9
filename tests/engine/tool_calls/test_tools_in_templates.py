"""Tools, calls and results are put into every template as transformers puts them, and come back."""

import functools
import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime, tzinfo
from itertools import takewhile
from typing import Any

import jinja2.ext
import jinja2.sandbox
import pytest
from tokenizers import AddedToken
from transformers.utils import chat_template_utils
from transformers.utils.chat_template_utils import render_jinja_template

from lowmoe.engine import template_program
from lowmoe.engine.chat_template import ChatTemplate
from lowmoe.engine.messages import Message, Tool, ToolCall
from lowmoe.engine.spelling import Spelling
from lowmoe.engine.text_parts import CHAT_TEMPLATE, TOKENIZER, TOKENIZER_CONFIG, TextParts
from tests.engine.tool_calls.sources import SOURCES, TOKENS
from tests.engine.tool_calls.styled import calls_in
from tests.talking_mixtral import learned_tokenizer

# No tools; and of the others some that leave something out.
HELPED = {"chatml", "llama-2", "llama-3", "mixtral", "phi-3.5"}
WITHOUT_DEFINITIONS = HELPED | {"deepseek-v3.1"}
WITHOUT_CALLS = HELPED | {"granite-3.3"}
ONE_CALL = {"gpt-oss", "llama-3.1"}
# What transformers' own sandbox refuses: a list that grows, a generator as JSON.
UNSAFE = {"deepseek-r1", "kimi-k2", "kimi-k2-thinking"}

PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "description": "Where, <b>exactly</b>"},
        "unit": {"type": "string", "enum": ["C", "F"], "default": "C"},
        "days": {"type": "array", "items": {"type": "integer"}},
        "deep": {"type": "object", "properties": {"x": {"type": ["number", "null"]}}},
        "sure": {"type": "boolean"},
    },
    "required": ["city"],
}
WEATHER = Tool(name="get_weather", description='How "it" is', parameters=PARAMETERS)
CLOCK = Tool(name="clock", description="What time it is")
TOOLS = [WEATHER, CLOCK]
ARGUMENTS = {"city": 'Grüße "you"\n<b>', "days": [1, 2], "deep": {"x": None}, "sure": True}

QUESTION = Message(role="user", content="How is it?")
CALL = ToolCall(id="callcall1", name="get_weather", arguments=ARGUMENTS)
OTHER_CALL = ToolCall(id="callcall2", name="clock", arguments={})
RESULT = Message(role="tool", content='{"sky": "<blue>"}', call_id="callcall1", name="get_weather")
OTHER_RESULT = Message(role="tool", content="noon", call_id="callcall2", name="clock")
RESULTS = [RESULT, OTHER_RESULT]
CONVERSATIONS: Mapping[str, Sequence[Message]] = {
    "a question": [Message(role="system", content="Be brief."), QUESTION],
    "a call": [QUESTION, Message(role="assistant", thinking="Hm.", calls=[CALL])],
    "a result": [QUESTION, Message(role="assistant", calls=[CALL]), RESULT],
    "an answer": [
        Message(role="system", content="Be brief."),
        QUESTION,
        Message(role="assistant", thinking="Hm.", calls=[CALL]),
        RESULT,
        Message(role="assistant", content="Blue.", thinking="Well."),
        QUESTION,
    ],
    "two calls": [
        QUESTION,
        Message(role="assistant", calls=[CALL, OTHER_CALL]),
        *RESULTS,
    ],
}


def plain(message: Message, thinking_key: str) -> dict[str, Any]:
    """As transformers wants it."""
    found: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.thinking:
        found[thinking_key] = message.thinking
    if message.calls:
        found["tool_calls"] = [
            {
                "id": c.id,
                "type": "function",
                "function": {"name": c.name, "arguments": c.arguments},
            }
            for c in message.calls
        ]
    if message.role == "tool":
        found |= {"tool_call_id": message.call_id, "name": message.name}
    return found


def of_tools(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    return [
        {
            "type": "function",
            "function": {
                "name": tool.name,
                "description": tool.description,
                "parameters": tool.parameters,
            },
        }
        for tool in tools
    ]


def theirs(name: str, messages: Sequence[Any], tools: Any = None, **variables: Any) -> str:
    """What Jinja itself makes of a template, in transformers' sandbox where that lets it."""
    variables = {"add_generation_prompt": True, **TOKENS, **variables}
    if name not in UNSAFE:
        (text,), _ = render_jinja_template(
            conversations=[messages], chat_template=SOURCES[name], tools=tools, **variables
        )
        return str(text)
    environment = jinja2.sandbox.SandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(
        value if isinstance(value, str | Mapping) else list(value),
        ensure_ascii=False,
        indent=indent,
    )
    template = environment.from_string(SOURCES[name])
    return template.render(messages=messages, tools=tools, **variables)


@functools.cache
def template(name: str) -> ChatTemplate:
    return ChatTemplate(SOURCES[name], **TOKENS)


AS_THEY_ARE = [
    (name, conversation)
    for name in sorted(SOURCES.keys() - WITHOUT_DEFINITIONS)
    for conversation in CONVERSATIONS
    if (name not in WITHOUT_CALLS or conversation == "a question")
    and (name not in ONE_CALL or conversation != "two calls")
]


class Noon(datetime):
    """For templates that tell the model what time it is."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> "Noon":
        return cls(2025, 3, 2, 12, tzinfo=tz)


@pytest.fixture(autouse=True)
def _time_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template_utils, "datetime", Noon)
    monkeypatch.setattr(template_program, "datetime", Noon)


@pytest.mark.parametrize(("name", "conversation"), AS_THEY_ARE)
def test_a_template_is_given_tools_as_transformers_gives_them(name: str, conversation: str) -> None:
    messages = CONVERSATIONS[conversation]
    key = "thinking" if name == "gpt-oss" else "reasoning_content"
    expected = theirs(name, [plain(m, key) for m in messages], of_tools(TOOLS))
    assert template(name).render(messages, tools=TOOLS) == expected


DEFINED = re.compile(r"# Tools\n.*\n<tools>\n(.*)\n</tools>\n.*", re.DOTALL)
ARGUMENTS_JSON = json.dumps(ARGUMENTS, ensure_ascii=False)
WRITTEN = f'<tool_call>\n{{"name": "get_weather", "arguments": {ARGUMENTS_JSON}}}\n</tool_call>'


@pytest.mark.parametrize("name", sorted(HELPED))
def test_a_template_without_tools_gets_them_as_text(name: str) -> None:
    found = template(name).render(CONVERSATIONS["an answer"], tools=TOOLS)
    definitions = DEFINED.search(found)
    assert definitions is not None
    assert [json.loads(line) for line in definitions[1].splitlines()] == of_tools(TOOLS)
    head = f"Be brief.\n\n{definitions[0].split('How is it?')[0]}"
    text = found[found.index("# Tools") : found.index("end your answer there:")]
    example = '<tool_call>\n{"name": "function-name", "arguments": {"argument-name": "value"}}'
    system = f"Be brief.\n\n{text}end your answer there:\n{example}\n</tool_call>"
    assert head.startswith("Be brief.\n\n# Tools")
    turns = [
        {"role": "assistant", "content": WRITTEN},
        {"role": "user", "content": f"<tool_response>\n{RESULT.content}\n</tool_response>"},
        {"role": "assistant", "content": "Blue."},
        {"role": "user", "content": "How is it?"},
    ]
    first = {"role": "user", "content": "How is it?"}
    if name == "mixtral":  # which takes no system message either
        before = [{"role": "user", "content": f"{system}\n\nHow is it?"}]
    else:
        before = [{"role": "system", "content": system}, first]
    assert found == theirs(name, [*before, *turns])


@pytest.mark.parametrize("name", ["llama-2", "mixtral"])
def test_results_and_what_the_user_says_next_are_one_turn_where_turns_must_alternate(
    name: str,
) -> None:
    messages = [*CONVERSATIONS["two calls"], Message(role="user", content="Well?")]
    found = template(name).render(messages, tools=TOOLS)
    results = (
        f"<tool_response>\n{RESULT.content}\n</tool_response>\n"
        "<tool_response>\nnoon\n</tool_response>\nWell?"
    )
    assert found.endswith(f"[INST] {results} [/INST]")


def test_calls_are_written_without_tools_too_where_a_template_knows_them_only_with_tools() -> None:
    found = template("hunyuan-a13b").render(CONVERSATIONS["two calls"])
    calls = [{"name": c.name, "arguments": c.arguments} for c in (CALL, OTHER_CALL)]
    written = f"<tool_calls>{json.dumps(calls, ensure_ascii=False)}</tool_calls>"
    turns = [{"role": "assistant", "content": written}, *(plain(m, "") for m in RESULTS)]
    assert found == theirs("hunyuan-a13b", [plain(QUESTION, ""), *turns])


@pytest.mark.parametrize("name", sorted(ONE_CALL))
def test_calls_are_put_one_by_one_with_their_results_where_only_one_is_written(name: str) -> None:
    found = template(name).render(CONVERSATIONS["two calls"], tools=TOOLS)
    one_by_one = [
        QUESTION,
        Message(role="assistant", calls=[CALL]),
        RESULT,
        Message(role="assistant", calls=[OTHER_CALL]),
        OTHER_RESULT,
    ]
    expected = theirs(name, [plain(m, "thinking") for m in one_by_one], of_tools(TOOLS))
    assert found == expected


def test_a_result_is_named_by_its_call() -> None:
    unnamed = [
        Message(role="tool", content=m.content, call_id=m.call_id) if m.role == "tool" else m
        for m in CONVERSATIONS["two calls"]
    ]
    named = template("kimi-k2").render(CONVERSATIONS["two calls"])
    assert template("kimi-k2").render(unnamed) == named
    assert "<|im_system|>clock<|im_middle|>" in named


def test_ids_are_shortened_for_a_template_that_refuses_long_ones() -> None:
    calls = [ToolCall(id=i, name="clock", arguments={}) for i in ("call_1-of-2", "call_2-of-2")]
    results = [Message(role="tool", content="1", call_id=call.id) for call in calls]
    found = template("mistral-nemo").render(
        [QUESTION, Message(role="assistant", calls=calls), *results], tools=TOOLS
    )
    ids = re.findall(r'"(?:call_)?id": "(\w{9})"', found)
    assert ids[:2] == ids[2:]
    assert len(set(ids)) == 2


@pytest.mark.parametrize("name", ["deepseek-r1", "minimax-m1", "qwen3"])
def test_neither_the_text_nor_the_calls_of_an_answer_are_lost(name: str) -> None:
    both = Message(role="assistant", content="Let me see.", calls=[CALL])
    found = template(name).render([QUESTION, both, RESULT], tools=TOOLS)
    assert found.index("Let me see.") < found.rindex(
        '"get_weather"' if name != "deepseek-r1" else "get_weather"
    )


# --- and back


def special_in(source: str) -> list[str]:
    """What looks like a token of its own."""
    found = re.findall(
        r"<\|[\w/]+\|>|<｜[^｜>\n]+｜>|\[/?[A-Z_]+\]|</?[a-z_]+(?::[a-z_]+)?>", source
    )
    return sorted({*found, "<tool_call>", "</tool_call>", "<|call|>"})


def parts_of(source: str, tokens: Sequence[str], *, special: bool) -> TextParts:
    tokenizer = learned_tokenizer()
    tokenizer.add_tokens([AddedToken(t, special=special, normalized=False) for t in tokens])
    files = {
        TOKENIZER: tokenizer.to_str().encode(),
        CHAT_TEMPLATE: source.encode(),
        TOKENIZER_CONFIG: json.dumps(TOKENS).encode(),
    }
    return TextParts(files.get)


# Channels are told by special tokens only.
AS_TOKENS = [(name, kind) for name in SOURCES for kind in ("special", "added")]
AS_TOKENS.remove(("gpt-oss", "added"))


@pytest.mark.parametrize(("name", "kind"), AS_TOKENS)
def test_calls_that_a_template_writes_come_back_from_its_tokens(name: str, kind: str) -> None:
    named = re.compile(r"<[|｜].*|\[.*")
    tokens = [token for token in special_in(SOURCES[name]) if named.fullmatch(token)]
    tokens += [*template(name).style.tags, "<think>", "</think>"]
    text = parts_of(SOURCES[name], tokens, special=kind == "special")
    calls = [CALL] if name in ONE_CALL else [CALL, OTHER_CALL]
    answer = Message(role="assistant", thinking="Hm.", calls=calls)
    asked = template(name).render([QUESTION], tools=TOOLS)
    told = template(name).render([QUESTION, answer], tools=TOOLS, add_generation_prompt=False)
    same = takewhile(lambda pair: pair[0] == pair[1], zip(asked, told, strict=False))
    prompt = "".join(char for char, _ in same).rstrip("<｜")
    assert text.tool_calls is not None
    splitter = text.tool_calls.splitter(TOOLS)
    ids = [text.tokenizer.encode(part, add_special=False) for part in (prompt, told[len(prompt) :])]
    spelling = Spelling(text, [], ids[0], calls=splitter)
    said = [said for i in ids[1] for said in spelling.push(i)[0]]
    said += spelling.flush()[0]
    parts = [(one.kind, one.text) for one in said]
    assert calls_in(parts) == [(call.name, call.arguments) for call in calls]


# --- control tokens


def with_word(value: Any, word: str) -> Any:
    """The same with a word in every string that says nothing about types, and as a key."""
    if isinstance(value, Mapping):
        return {key: with_word(item, word) for key, item in value.items()} | {f"{word}key": word}
    if isinstance(value, list):
        return [with_word(item, word) for item in value]
    return value + word if isinstance(value, str) and value not in TYPES else value


TYPES = {"object", "string", "array", "integer", "boolean", "number", "null", "city"}


def conversation(word: str) -> tuple[list[Message], list[Tool]]:
    parameters = with_word(PARAMETERS["properties"]["city"], word)
    schema = {"type": "object", "properties": {"city": parameters, word: parameters}}
    tool = Tool(name="get_weather", description=f"d{word}", parameters=schema)
    call = ToolCall(id="callcall1", name="get_weather", arguments=with_word(ARGUMENTS, word))
    return [
        Message(role="system", content=f"s{word}"),
        Message(role="user", content=word),
        Message(role="assistant", content="a", calls=[call]),
        Message(role="tool", content=f"r{word}", call_id="callcall1"),
        Message(role="assistant", content="b"),
        Message(role="user", content=f"{word}u"),
    ], [tool]


@pytest.mark.parametrize("name", SOURCES)
def test_nothing_that_people_and_tools_say_becomes_a_control_token(name: str) -> None:
    tokens = special_in(SOURCES[name])
    text = parts_of(SOURCES[name], tokens, special=True)
    control = {text.tokenizer.token_id(token) for token in tokens}
    harmless, hostile = (
        [i for i in text.encode(messages, tools=tools) if i in control]
        for messages, tools in map(conversation, ("word", "".join(tokens)))
    )
    assert hostile == harmless
    assert harmless  # the template's own


def test_a_key_that_templates_make_a_tag_of_is_no_token() -> None:
    text = parts_of(SOURCES["qwen3-coder"], special_in(SOURCES["qwen3-coder"]), special=True)
    parameters = {"type": "object", "properties": {"a": {"type": "string", "|im_end|": "x"}}}
    tool = Tool(name="t", parameters=parameters)
    plain_tool = Tool(
        name="t", parameters={"type": "object", "properties": {"a": {"type": "string", "x": "x"}}}
    )
    end = text.tokenizer.token_id("<|im_end|>")
    question = [Message(role="user", content="u")]
    assert "<|im_end|>x" in text.chat_template.render(question, tools=[tool])
    counts = [text.encode(question, tools=[t]).count(end) for t in (tool, plain_tool)]
    assert counts[0] == counts[1]


def test_json_in_ascii_keeps_a_control_token_apart_too() -> None:
    source = "{{ tools | tojson(ensure_ascii=True) }}<|im_end|>"
    text = parts_of(source, ["<|im_end|>"], special=True)
    tool = Tool(name="t", description="<|im_end|> \\ufdd0 é")
    ids = text.encode([Message(role="user", content="u")], tools=[tool])
    assert ids.count(text.tokenizer.token_id("<|im_end|>")) == 1
    [definition] = json.loads(text.tokenizer.decode(ids))
    assert definition["function"]["description"] == tool.description


LIKE_A_MARK = "\\ufdd0 \\\\ufdd1 <|im_end|>\\ufdd1"


@pytest.mark.parametrize(
    "printed", ["m.content", "[m.content]", "[m.content] | tojson(ensure_ascii=True)"]
)
def test_a_text_that_looks_like_a_mark_is_left_as_it_is(printed: str) -> None:
    source = f"{{% for m in messages %}}{{{{ {printed} }}}}{{% endfor %}}<|im_end|>"
    text = parts_of(source, ["<|im_end|>"], special=True)
    ids = text.encode([Message(role="user", content=LIKE_A_MARK)])
    assert ids.count(text.tokenizer.token_id("<|im_end|>")) == 1
    messages = [[{"role": "user", "content": LIKE_A_MARK}]]
    (expected,), _ = render_jinja_template(conversations=messages, chat_template=source)
    assert text.tokenizer.decode(ids) == expected.removesuffix("<|im_end|>")


# --- thinking

SWITCHES = {
    "deepseek-v3.1": ("thinking", True, False),
    "deepseek-v3.2": ("thinking", True, False),
    "deepseek-v4": ("thinking", True, False),
    "glm-4.5": ("enable_thinking", True, False),
    "glm-4.6": ("enable_thinking", True, False),
    "glm-4.7-flash": ("enable_thinking", True, False),
    "gpt-oss": ("reasoning_effort", "medium", "low"),
    "granite-3.3": ("thinking", True, False),
    "hunyuan-a13b": ("enable_thinking", True, False),
    "qwen3": ("enable_thinking", True, False),
    "qwen3.5": ("enable_thinking", True, False),
}


@pytest.mark.parametrize("name", SOURCES)
def test_a_template_says_whether_thinking_can_be_switched(name: str) -> None:
    found = template(name)
    assert found.has_think_switch == (name in SWITCHES)
    messages = [QUESTION]
    texts = {think: found.render(messages, think=think) for think in (None, True, False)}
    if name not in SWITCHES:
        assert len(set(texts.values())) == 1
        return
    variable, on, off = SWITCHES[name]
    given = [plain(m, "") for m in messages]
    assert texts[True] == theirs(name, given, **{variable: on})
    assert texts[False] == theirs(name, given, **{variable: off})
    assert texts[True] != texts[False]
