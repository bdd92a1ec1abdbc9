"""Answers that must have a form have it, whatever the scores: judged by jsonschema and re."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import llguidance
import numpy as np
import pytest
import torch
from tokenizers import AddedToken
from torch import Tensor

import lowmoe
from lowmoe.engine.answer import Answer
from lowmoe.engine.constraint import Constraint, Grammar, JsonSchema, Regex
from lowmoe.engine.forms import Forms
from lowmoe.engine.kept_to_form import KeptToForm
from lowmoe.engine.load import load_folder
from lowmoe.engine.load_options import LoadOptions
from lowmoe.engine.options import SamplingOptions
from lowmoe.engine.run_clock import Tally
from lowmoe.engine.runtime import Runtime
from lowmoe.engine.text_parts import CHAT_TEMPLATE, TOKENIZER, TOKENIZER_CONFIG, TextParts
from lowmoe.errors import LowMoeError
from tests.engine.vocabularies import END, vocabulary_files
from tests.talking_mixtral import learned_tokenizer

ALL = {kind: TextParts(files.get) for kind, files in vocabulary_files().items()}
N_PADDING = 21  # ids that a model gives scores to and no token has

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 9},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "mood": {"enum": ["glad", "sad", None, 3, {"a": [1]}]},
        "pets": {"type": "array", "items": {"$ref": "#/$defs/pet"}, "minItems": 1, "maxItems": 2},
    },
    "required": ["name", "pets"],
    "additionalProperties": False,
    "$defs": {
        "pet": {
            "type": "object",
            "properties": {"kind": {"const": "cat"}, "of": {"$ref": "#/$defs/pet"}},
            "required": ["kind"],
            "additionalProperties": False,
        }
    },
}
SCHEMAS: list[dict[str, Any]] = [
    PERSON,
    {"type": "object"},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 5},
    {"type": "integer", "minimum": -12, "exclusiveMaximum": 700, "multipleOf": 4},
    {"type": "number", "minimum": 0.5, "maximum": 2.25},
    {"anyOf": [{"type": "null"}, {"type": "string", "pattern": "^[a-f]{2,4}(-[0-9]+)?$"}]},
    {"oneOf": [{"type": "string", "maxLength": 4}, {"type": "array", "maxItems": 0}]},
    {"allOf": [{"type": "integer", "minimum": 5}, {"type": "integer", "maximum": 90}]},
    {"type": "object", "additionalProperties": {"type": "integer"}, "minProperties": 1},
    {"type": "object", "patternProperties": {"^x_": {"type": "null"}}, "maxProperties": 2},
    {"type": "string", "format": "date"},
    {"type": "string", "format": "ipv4"},
    {"type": ["string", "null"], "minLength": 3},
    {"prefixItems": [{"const": 1}, {"type": "string"}], "type": "array", "items": False},
    {"enum": ['ä"\\\n', "🦙", 1.5, [], {}]},
    {"const": f"a{END}<|user|><own>"},  # tokens' names are written out
]
PATTERNS = [
    r"(yes|no), [A-Z][a-z]{2,8}\.",
    r"[0-9]{3}-[0-9]{4}",
    r" ?[^a-z\s]{1,5}[äöü🦙]+",
    r"(ab|a(b|c)*d){2,}e?",
    r" leading",
    r"\s{1,3}x",
]


@pytest.fixture(scope="module", autouse=True)
def untried() -> Iterator[None]:
    """Nothing here is hostile, and trying a form takes longer than compiling it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lowmoe.engine.forms._try", lambda kind, grammar, special: None)
        yield


@pytest.fixture(scope="module")
def any_runtime(model_folder: Path) -> Iterator[Runtime]:
    runtime = load_folder(model_folder, LoadOptions(threads=1))
    yield runtime
    runtime.close()


def with_vocabulary(runtime: Runtime, text: TextParts) -> Runtime:
    """A runtime whose answers are written in this vocabulary, its scores padded beyond it."""
    end = text.tokenizer.token_id(END)
    assert end is not None
    spec = replace(runtime.spec, n_vocab=text.tokenizer.n_ids + N_PADDING, end_ids=(end,))
    return replace(runtime, spec=spec, text=text, forms=Forms(text, spec.end_ids))


@pytest.fixture(scope="module", params=sorted(ALL))
def runtime(any_runtime: Runtime, request: pytest.FixtureRequest) -> Runtime:
    return with_vocabulary(any_runtime, ALL[request.param])


def random_scores(runtime: Runtime, seed: int) -> Callable[[], Tensor]:
    """Any scores; what closes a part of a form is likelier, so that answers come to an end."""
    generator = torch.Generator().manual_seed(seed)
    n_vocab, raw = runtime.spec.n_vocab, runtime.text.token_bytes
    closing = [i for i in range(n_vocab) if i in runtime.end_ids or set(raw[i]) & set(b'"]}')]
    lift = torch.zeros(n_vocab)
    lift[closing] = 4

    def next_scores() -> Tensor:
        return torch.randn(n_vocab, generator=generator) * 2 + lift

    return next_scores


def answer_to(
    runtime: Runtime,
    constraint: Constraint,
    options: SamplingOptions,
    scores: Callable[[], Tensor],
    *,
    prompt: str = "x",
    **how: Any,
) -> Answer:
    """One whose scores come from nowhere, at its end."""
    ids = runtime.text.tokenizer.encode(prompt, add_special=False)
    how.setdefault("end_ids", runtime.end_ids)
    answer = Answer(runtime, ids, options, constraint=constraint, **how)
    while answer.end is None:
        answer.go_on(scores(), Tally())
    return answer


def text_of(answer: Answer, kind: str = "answer") -> str:
    return "".join(token.text for token in answer.take() if token.kind == kind)


def options(seed: int) -> SamplingOptions:
    return SamplingOptions(
        temperature=[0.0, 1.0, 1.5][seed % 3],
        top_p=[0.9, 1.0][seed % 2],
        top_k=[0, 7][seed % 2],
        seed=seed,
        max_new_tokens=300,
    )


def all_finished(runtime: Runtime, constraint: Constraint) -> list[str]:
    """Texts of the answers that came to an end by themselves; most do."""
    found = []
    for seed in range(6):
        answer = answer_to(runtime, constraint, options(seed), random_scores(runtime, seed))
        assert answer.error is None
        if answer.end == "end":
            found.append(text_of(answer))
    assert len(found) >= 2
    return found


@pytest.mark.parametrize("schema", SCHEMAS, ids=[json.dumps(s)[:40] for s in SCHEMAS])
def test_json_is_valid_to_jsonschema(runtime: Runtime, schema: Mapping[str, Any]) -> None:
    for text in all_finished(runtime, JsonSchema(schema)):
        jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker()).validate(
            json.loads(text)
        )


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_matches_from_the_first_to_the_last_character(
    runtime: Runtime, pattern: str
) -> None:
    for text in all_finished(runtime, Regex(pattern)):
        assert re.fullmatch(pattern, text), text


def test_a_grammar_derives_the_answer(runtime: Runtime) -> None:
    grammar = Grammar('start: "<" start ">" | "x" | start "|" start')
    for text in all_finished(runtime, grammar):
        while (shorter := re.sub(r"x\|x|<x>", "x", text)) != text:
            text = shorter
        assert text == "x"


# --- against llguidance


@pytest.mark.parametrize("kind", ["byte-level", "ranks", "pieces, llama"])
@pytest.mark.parametrize(
    "constraint", [JsonSchema(PERSON), Regex(PATTERNS[2]), Grammar('start: "a" start? | " b"')]
)
def test_what_is_allowed_is_what_llguidance_allows_of_the_tokenizer_json(
    any_runtime: Runtime, kind: str, constraint: Constraint
) -> None:
    runtime = with_vocabulary(any_runtime, ALL[kind])
    form = runtime.forms.compile(constraint)
    kept = KeptToForm(form, None)
    # llguidance's own reading of the vocabulary; the grammar is written as ours.
    data = vocabulary_files()[kind][TOKENIZER].decode()
    # A token between angle brackets is no text to it; to us it is what decoding makes of it.
    own = runtime.text.tokenizer.token_id("<own>")
    theirs = llguidance.LLTokenizer(data, eos_token=list(runtime.end_ids))
    matcher = llguidance.LLMatcher(theirs, form.grammar)
    generator = np.random.default_rng(0)
    for _ in range(40):
        allowed = kept.allowed()
        others = {own, *runtime.end_ids}
        valid = {i for i in range(form.n_tokens) if matcher.validate_tokens([i]) == 1} - others
        if len(allowed) > 1:
            assert {*allowed.tolist()} - others == valid
        else:  # of several ways to write what must come, the tokenizer's own
            assert {*allowed.tolist()} - others <= valid
        assert bool(runtime.end_ids & {*allowed.tolist()}) == matcher.is_accepting()
        goes_on = [i for i in allowed.tolist() if i not in runtime.end_ids]
        if not goes_on:
            break
        chosen = int(generator.choice(goes_on))
        kept.take(chosen)
        assert matcher.consume_token(chosen)


def test_without_end_tokens_an_answer_ends_where_nothing_can_follow(any_runtime: Runtime) -> None:
    runtime = with_vocabulary(any_runtime, ALL["byte-level"])
    runtime = replace(
        runtime,
        spec=replace(runtime.spec, end_ids=()),
        forms=Forms(runtime.text, ()),
    )
    answer = answer_to(runtime, Regex("[ab]{5}"), options(1), random_scores(runtime, 1), end_ids=())
    assert answer.end == "end"
    assert re.fullmatch("[ab]{5}", text_of(answer))


def test_an_answer_without_text_is_kept_to_its_form_too(any_runtime: Runtime) -> None:
    runtime = with_vocabulary(any_runtime, ALL["byte-level"])
    answer = answer_to(
        runtime, Regex("[ab]{5}"), options(1), random_scores(runtime, 1), spelled=False
    )
    ids = answer.context[answer.n_prompt : -1]
    assert re.fullmatch("[ab]{5}", runtime.text.tokenizer.decode(ids))


def test_a_form_that_becomes_too_complex_ends_its_own_answer(any_runtime: Runtime) -> None:
    runtime = with_vocabulary(any_runtime, ALL["byte-level"])
    answer = answer_to(runtime, Regex("a{4294967295}"), options(0), random_scores(runtime, 0))
    assert answer.end == "error"
    with pytest.raises(LowMoeError, match=r"too complex to follow .*too many expressions"):
        raise answer.error or AssertionError


# --- after thinking

TAGS = "{{ m }}{% if '</think>' in m %}{% endif %}"
ANSWER_TAGS = TAGS + "<answer></answer>"
CHANNELS = "<|channel|><|message|>"
MARKS = ("<think>", "</think>", "<answer>", "</answer>")
CHANNEL_MARKS = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>")


def thinking_runtime(
    any_runtime: Runtime, template: str, *, special: tuple[str, ...] = (), own: tuple[str, ...] = ()
) -> Runtime:
    tokenizer = learned_tokenizer()
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in (END, *special)])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in own])
    files = {
        TOKENIZER: tokenizer.to_str().encode(),
        CHAT_TEMPLATE: template.encode(),
        TOKENIZER_CONFIG: b"{}",
    }
    return with_vocabulary(any_runtime, TextParts(files.get))


def scripted(runtime: Runtime, script: str) -> Callable[[], Tensor]:
    """Scores that write this, and anything afterwards; what is not allowed of it is passed over."""
    ids = iter(runtime.text.tokenizer.encode(script, add_special=False))
    anything = random_scores(runtime, 0)

    def next_scores() -> Tensor:
        scores = anything()
        if (token_id := next(ids, None)) is not None:
            scores[token_id] = 100
        return scores

    return next_scores


GREEDY = SamplingOptions(temperature=0.0, max_new_tokens=60)
DIGITS = Regex(r"\s[0-9]{3}")


@pytest.mark.parametrize("how", ["special", "own", None])
@pytest.mark.parametrize(
    ("template", "prompt", "script"),
    [
        (TAGS, "Hi<think>\n", 'I {"think" of 1.</think>'),
        (ANSWER_TAGS, "Hi<think>\n", "Hm.</think><answer>"),
        (ANSWER_TAGS, "Hi<think>\n", "Hm.</think>"),
    ],
)
def test_the_form_begins_where_thinking_ends(
    any_runtime: Runtime, template: str, prompt: str, script: str, how: str | None
) -> None:
    tokens = {} if how is None else {how: MARKS}
    runtime = thinking_runtime(any_runtime, template, **tokens)  # type: ignore[arg-type]
    if how is None:  # what comes after `</think>` must be the answer then
        script = script.removesuffix("<answer>")
    answer = answer_to(runtime, DIGITS, GREEDY, scripted(runtime, script), prompt=prompt)
    tokens_said = answer.take()
    assert answer.end == "end"
    said = {
        kind: "".join(t.text for t in tokens_said if t.kind == kind)
        for kind in ("thinking", "answer")
    }
    assert re.fullmatch(DIGITS.pattern, said["answer"])
    assert said["thinking"] == script.partition("</think>")[0]


@pytest.mark.parametrize("how", ["special", "own"])
def test_a_model_may_begin_to_think_by_itself(any_runtime: Runtime, how: str) -> None:
    runtime = thinking_runtime(any_runtime, TAGS, **{how: MARKS})  # type: ignore[arg-type]
    script = "<think>Well</think> 123"
    answer = answer_to(runtime, DIGITS, GREEDY, scripted(runtime, script), prompt="Hi")
    assert [(t.kind, t.text) for t in answer.take() if t.text and t.kind != "mark"][-1][
        0
    ] == "answer"
    assert answer.end == "end"
    text = runtime.text.tokenizer.decode(answer.context[answer.n_prompt :])
    assert text.removeprefix("<think>").startswith("Well")


@pytest.mark.parametrize("prompt", ["Hi", "Hi<think>\n\n</think>\n\n"])
def test_who_does_not_think_answers_at_once(any_runtime: Runtime, prompt: str) -> None:
    runtime = thinking_runtime(any_runtime, TAGS, special=MARKS)
    answer = answer_to(runtime, DIGITS, GREEDY, scripted(runtime, " 12"), prompt=prompt)
    assert re.fullmatch(r" 12[0-9]", text_of(answer))


def test_where_thinking_was_closed_none_is_begun(any_runtime: Runtime) -> None:
    runtime = thinking_runtime(any_runtime, TAGS, special=MARKS)
    prompt = "Hi<think>\n\n</think>\n\n"
    answer = answer_to(runtime, DIGITS, GREEDY, scripted(runtime, "<think>"), prompt=prompt)
    assert re.fullmatch(DIGITS.pattern, text_of(answer))


def test_no_answer_ends_before_its_form_began(any_runtime: Runtime) -> None:
    runtime = thinking_runtime(any_runtime, TAGS, special=MARKS)
    answer = answer_to(
        runtime, DIGITS, GREEDY, scripted(runtime, f"Hm{END}</think>"), prompt="Hi<think>"
    )
    assert answer.end == "end"
    assert re.fullmatch(DIGITS.pattern, text_of(answer))


def test_the_form_is_that_of_the_last_channel(any_runtime: Runtime) -> None:
    runtime = thinking_runtime(any_runtime, CHANNELS, special=CHANNEL_MARKS)
    script = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>"
    answer = answer_to(
        runtime, DIGITS, GREEDY, scripted(runtime, script), prompt="<|start|>assistant"
    )
    tokens = answer.take()
    assert "".join(t.text for t in tokens if t.kind == "thinking") == "Hm."
    assert re.fullmatch(DIGITS.pattern, "".join(t.text for t in tokens if t.kind == "answer"))


def test_no_token_ends_the_thinking_and_begins_the_answer(any_runtime: Runtime) -> None:
    tokenizer = learned_tokenizer()
    tokenizer.add_special_tokens([END])
    tokenizer.add_tokens([AddedToken(">7", normalized=False)])
    files = {TOKENIZER: tokenizer.to_str().encode(), CHAT_TEMPLATE: TAGS.encode()}
    runtime = with_vocabulary(any_runtime, TextParts({**files, TOKENIZER_CONFIG: b"{}"}.get))
    answer = answer_to(
        runtime, DIGITS, GREEDY, scripted(runtime, "Hm</think>7"), prompt="Hi<think>"
    )
    tokens = answer.take()
    said = "".join(t.text for t in tokens if t.kind == "answer")
    # Another token was chosen in its place, so the thinking went on; it never ended here.
    assert re.fullmatch(DIGITS.pattern, said) if answer.end == "end" else not said
    assert tokenizer.token_to_id(">7") in runtime.text.tokenizer.encode(
        "Hm</think>7", add_special=False
    )


# --- by a real model

TALE = {
    "type": "object",
    "properties": {
        "girl": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 3, "maximum": 12},
        "likes": {"type": "array", "items": {"enum": ["cats", "the sea", "cake"]}, "maxItems": 2},
    },
    "required": ["girl", "age", "likes"],
    "additionalProperties": False,
}


def test_the_demo_model_writes_valid_json_alone_and_with_others() -> None:
    prompts = [f"Tell me of {whom}." for whom in ("a girl", "Lily", "a girl by the sea")]
    with lowmoe.load(gpu="none", threads=1, sequences=3) as model:
        for temperature in (0.0, 1.0):
            how = {"constraint": JsonSchema(TALE), "temperature": temperature, "seed": 1}
            together = model.generate(prompts, **how)  # type: ignore[call-overload]
            for prompt, text in zip(prompts, together, strict=True):
                jsonschema.validate(json.loads(text), TALE)
                assert model.generate(prompt, **how) == text  # type: ignore[call-overload]
