"""A call that is forced is one, in each model's style, and of the tool that was chosen."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken

from lowmoe.engine.constraint import Grammar
from lowmoe.engine.forms import Forms
from lowmoe.engine.messages import Tool, ToolChoice
from lowmoe.engine.spelling import Spelling
from lowmoe.engine.text_parts import CHAT_TEMPLATE, TOKENIZER, TOKENIZER_CONFIG, TextParts
from lowmoe.errors import UsageError
from tests.engine.tool_calls.sources import SOURCES, TOKENS
from tests.engine.tool_calls.styled import calls_in, text_in
from tests.talking_mixtral import learned_tokenizer

# One for each style, and a tokenizer that has its tags as tokens, or some of them, or none.
ONE_OF_EACH = (
    "deepseek-r1",
    "deepseek-v3.1",
    "deepseek-v3.2",
    "glm-4.7-flash",
    "gpt-oss",
    "granite-3.3",
    "hunyuan-a13b",
    "kimi-k2",
    "llama-3.1",
    "llama-4",
    "minimax-m1",
    "minimax-m2",
    "ministral-3",
    "mistral-nemo",
    "mixtral",
    "qwen3",
    "qwen3.5",
)
END = 0  # of learned_tokenizer

# Whatever is drawn comes to an end: no free text, few numbers.
PARAMETERS: Mapping[str, Any] = {
    "type": "object",
    "properties": {
        "unit": {"type": "string", "enum": ["C", "F"], "description": "of degrees"},
        "sure": {"type": "boolean"},
        "description": {"type": "string", "enum": ["a property of this name"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 9},
        "kinds": {"type": "array", "items": {"enum": ["x", "y"]}, "maxItems": 2},
    },
    "required": ["unit", "description"],
}
EMPTY: Mapping[str, Any] = {"type": "object", "properties": {}}
TOOLS = [Tool(name="weather", parameters=PARAMETERS), Tool(name="clock", parameters=EMPTY)]


def parts_of(name: str, *, with_tokens: bool = True) -> TextParts:
    tokenizer = learned_tokenizer()
    added = ["<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|call|>"]
    if with_tokens:
        added += TextParts(
            {CHAT_TEMPLATE: SOURCES[name].encode(), TOKENIZER_CONFIG: b"{}"}.get
        ).chat_template.style.tags
    new = [token for token in added if token in SOURCES[name] or "tool" in token.lower()]
    tokenizer.add_tokens([AddedToken(t, special=t[1] == "|", normalized=False) for t in new])
    files = {
        TOKENIZER: tokenizer.to_str().encode(),
        CHAT_TEMPLATE: SOURCES[name].encode(),
        TOKENIZER_CONFIG: str(TOKENS).replace("'", '"').encode(),
    }
    return TextParts(files.get)


def drawn(text: TextParts, grammar: Grammar, seed: int) -> list[int]:
    """What a model may write that likes all tokens alike, and ends where it may."""
    form = Forms(text, {END}).compile(grammar)
    matcher, ids, choose = form.matcher(), [], random.Random(seed)
    while True:
        mask = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        allowed = np.unpackbits(mask, bitorder="little")[: form.n_tokens].nonzero()[0]
        if END in allowed:
            return ids
        ids.append(int(choose.choice(allowed)))
        assert matcher.consume_token(ids[-1]), matcher.get_error()


def read(text: TextParts, prompt: str, ids: Sequence[int]) -> tuple[list[tuple[str, Any]], str]:
    assert text.tool_calls is not None
    prompt_ids = text.tokenizer.encode(prompt, add_special=False)
    spelling = Spelling(text, [], prompt_ids, calls=text.tool_calls.splitter(TOOLS))
    said = [said for i in ids for said in spelling.push(i)[0]] + spelling.flush()[0]
    parts = [(one.kind, one.text) for one in said]
    return calls_in(parts), text_in(parts)


def require_fit(name: str, arguments: Any) -> None:
    assert isinstance(arguments, dict)
    if name == "clock":
        assert arguments == {}
        return
    assert {"unit", "description"} <= arguments.keys() <= PARAMETERS["properties"].keys()
    assert arguments["unit"] in ("C", "F")
    assert arguments["description"] == "a property of this name"
    assert isinstance(arguments.get("sure", True), bool)
    assert arguments.get("count", 0) in range(10)
    assert set(arguments.get("kinds", [])) <= {"x", "y"}


@pytest.mark.parametrize("with_tokens", [True, False], ids=["tokens", "text"])
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_what_is_forced_is_a_call_whose_arguments_fit(name: str, with_tokens: bool) -> None:
    text = parts_of(name, with_tokens=with_tokens)
    assert text.tool_calls is not None
    grammar = text.tool_calls.grammar(TOOLS, ToolChoice(mode="required"))
    assert grammar is not None
    assert "of degrees" not in grammar.lark
    prompt = "<|start|>assistant" if grammar.from_start else ""
    calls, rest = read(text, prompt, drawn(text, grammar, seed=1))
    assert calls
    for tool_name, arguments in calls:
        require_fit(tool_name, arguments)
    assert rest.strip() == ""


@pytest.mark.parametrize("name", ["gpt-oss", "kimi-k2", "qwen3", "qwen3.5"])
def test_the_tool_that_is_chosen_is_called_and_once_if_asked(name: str) -> None:
    text = parts_of(name)
    assert text.tool_calls is not None
    for seed, tool_name in enumerate(("clock", "weather")):
        choice = ToolChoice(mode="required", name=tool_name, parallel=False)
        grammar = text.tool_calls.grammar(TOOLS, choice)
        assert grammar is not None
        prompt = "<|start|>assistant" if grammar.from_start else ""
        calls, _ = read(text, prompt, drawn(text, grammar, seed))
        assert [called for called, _ in calls] == [tool_name]


def test_a_model_may_think_on_its_channel_before_the_call() -> None:
    text = parts_of("gpt-oss")
    assert text.tool_calls is not None
    grammar = text.tool_calls.grammar(TOOLS, ToolChoice(mode="required"))
    assert grammar is not None
    matcher = Forms(text, {END + 1}).compile(grammar).matcher()
    written = (
        "<|channel|>analysis<|message|>Hm, (what)?<|end|><|start|>assistant"
        "<|channel|>commentary to=functions.clock <|constrain|>json<|message|>{}"
    )
    ids = text.tokenizer.encode(written, add_special=False)
    for token_id in ids:
        assert matcher.consume_token(token_id), text.tokenizer.decode([token_id])
    assert read(text, "<|start|>assistant", ids) == ([("clock", {})], "")


@pytest.mark.parametrize("mode", ["none", "auto"])
def test_what_need_not_be_called_is_not_forced(mode: Any) -> None:
    text = parts_of("qwen3")
    assert text.tool_calls is not None
    assert text.tool_calls.grammar(TOOLS, ToolChoice(mode=mode)) is None
    assert text.tool_calls.grammar([], ToolChoice(mode=mode)) is None


@pytest.mark.parametrize(
    ("tools", "choice", "fault"),
    [
        ([], ToolChoice(mode="required"), "a call of a tool is required, but no tools are given"),
        (
            TOOLS,
            ToolChoice(mode="required", name="moon"),
            r"'moon' is chosen.*\['weather', 'clock'",
        ),
    ],
)
def test_a_choice_that_cannot_be_kept_to_is_refused(
    tools: list[Tool], choice: ToolChoice, fault: str
) -> None:
    text = parts_of("qwen3")
    assert text.tool_calls is not None
    with pytest.raises(UsageError, match=fault):
        text.tool_calls.grammar(tools, choice)


ODD: Mapping[str, Any] = {
    "type": "object",
    "properties": {
        "a": True,
        "b": {},
        "c": {"type": ["string", "null"], "format": "unheard-of"},
        'quoted " \\ <[5]> \n é': {"type": "string", "title": "t"},
        "d": {"type": "integer", "not": {"const": 3}},
        "e": {"$ref": "#/$defs/e"},
        "f": {"type": "string", "const": "f"},
        "g": {"enum": ["x", None, 3]},
    },
    "$defs": {"e": {"type": "object", "properties": {"e": {"$ref": "#/$defs/e"}}}},
    "required": ["a", "f"],
}


@pytest.mark.parametrize("name", ["qwen3", "qwen3.5", "deepseek-v3.2", "llama-4"])
@pytest.mark.parametrize("parameters", [ODD, {}], ids=["odd", "none"])
def test_what_llguidance_does_not_know_of_a_schema_is_left_out(
    name: str, parameters: Mapping[str, Any]
) -> None:
    text = parts_of(name)
    assert text.tool_calls is not None
    tools = [Tool(name="odd", parameters=parameters)]
    grammar = text.tool_calls.grammar(tools, ToolChoice(mode="required"))
    assert grammar is not None
    Forms(text, {END}).compile(grammar)


@pytest.mark.parametrize("wrong", [{"properties": []}, {"properties": {"a": {"enum": 5}}}])
def test_what_is_no_schema_forces_nothing_and_is_refused_in_one_line(wrong: Any) -> None:
    text = parts_of("qwen3")
    assert text.tool_calls is not None
    grammar = text.tool_calls.grammar(
        [Tool(name="t", parameters=wrong)], ToolChoice(mode="required")
    )
    assert grammar is not None
    with pytest.raises(UsageError, match="failed to compile JSON schema") as refusal:
        Forms(text, {END}).compile(grammar)
    assert "\n" not in str(refusal.value)
