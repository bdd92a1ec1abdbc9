"""Calls among an answer's other parts: its thinking, stop texts, tokens; and a model that is made
to call.
"""

from collections.abc import Sequence
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken

import lowmoe
from lowmoe.engine.answer import Answer
from lowmoe.engine.batch import Batch
from lowmoe.engine.load import load_folder
from lowmoe.engine.load_options import LoadOptions
from lowmoe.engine.messages import Message, Tool, ToolChoice
from lowmoe.engine.options import SamplingOptions
from lowmoe.engine.spelling import Spelling
from lowmoe.engine.text_parts import CHAT_TEMPLATE, TOKENIZER, TOKENIZER_CONFIG, TextParts
from tests.engine.tool_calls.styled import NOTHING, TOOLS, calls_in, joined
from tests.talking_mixtral import learned_tokenizer

THINKS = "{{ messages[0].content.split('</think>')[-1] }}<tool_call>"
CALL = '<tool_call>{"name": "nothing", "arguments": {"a": "one two"}}</tool_call>'
CALLED = [("call", "nothing"), ("arguments", '{"a": "one two"}')]


def spelled(
    text: str,
    *,
    template: str = THINKS,
    stops: Sequence[str] = (),
    prompt: str = "",
    special: Sequence[str] = (),
    plain: str = "",
) -> list[tuple[str, str]]:
    """plain: more text, none of it special tokens."""
    tokenizer: tokenizers.Tokenizer = learned_tokenizer()
    unable = tokenizer.encode(plain, add_special_tokens=False).ids
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    files = {
        TOKENIZER: tokenizer.to_str().encode(),
        CHAT_TEMPLATE: template.encode(),
        TOKENIZER_CONFIG: b"{}",
    }
    parts = TextParts(files.get)
    assert parts.tool_calls is not None
    splitter = parts.tool_calls.splitter(list(TOOLS.values()))
    spelling = Spelling(parts, stops, tokenizer.encode(prompt).ids, calls=splitter)
    found = []
    for token_id in [*tokenizer.encode(text).ids, *unable]:
        said, stopped = spelling.push(token_id)
        found += said
        if stopped:
            return joined((one.kind, one.text) for one in found)  # type: ignore[misc]
    found += spelling.flush()[0]
    return joined((one.kind, one.text) for one in found)  # type: ignore[misc]


@pytest.mark.parametrize("special", [(), ("<think>", "</think>", "<tool_call>", "</tool_call>")])
def test_a_call_counts_after_thinking_and_not_within_it(special: Sequence[str]) -> None:
    found = spelled(f"<think>Say {CALL}</think>\n\nWell.\n{CALL}", special=special)
    assert found == [
        ("mark", "<think>"),
        ("thinking", f"Say {CALL}"),
        ("mark", "</think>\n\n"),
        ("answer", "Well."),
        *CALLED,
    ]
    assert spelled(CALL, special=special, prompt="Hi<think>\n\n</think>\n\n") == CALLED


def test_a_model_that_quotes_what_is_a_token_calls_nothing() -> None:
    tags = ("<tool_call>", "</tool_call>")
    assert spelled(CALL, special=tags) == CALLED
    assert spelled("", special=tags, plain=CALL) == [("answer", CALL)]
    # Where the tags are no tokens, it does.
    assert spelled("", plain=CALL) == CALLED


def test_stop_texts_count_in_text_and_not_in_calls() -> None:
    assert spelled(f"Wait. {CALL}", stops=["it"]) == [("answer", "Wa")]
    assert spelled(f"Wait. {CALL} more", stops=["two", "nothing"]) == [
        ("answer", "Wait."),
        *CALLED,
        ("answer", "more"),
    ]
    # What might have become a stop text comes before the call.
    assert spelled(f"Wait{CALL}", stops=["Wait for"]) == [("answer", "Wait"), *CALLED]


HARMONY = "{{ '<|start|>assistant<|channel|>final<|message|>' + messages[0].content + '<|end|>' }}"
HEADS = (
    "<|channel|>commentary to=functions.nothing <|constrain|>json<|message|>",
    " to=functions.nothing<|channel|>commentary json<|message|>",
    "<|channel|>analysis to=functions.nothing code<|message|>",
)


@pytest.mark.parametrize("head", HEADS)
def test_a_message_to_a_tool_is_a_call_on_whatever_channel(head: str) -> None:
    special = ("<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|call|>")
    thought = "<|channel|>analysis<|message|>Hm to=functions.nothing<|end|><|start|>assistant"
    found = spelled(
        f'{thought}{head}{{"a": "one two"}}<|call|>',
        template=HARMONY,
        special=special,
        prompt="<|start|>assistant",
    )
    assert found == [("thinking", "Hm to=functions.nothing"), *CALLED]


def test_a_preamble_is_text_before_the_call() -> None:
    special = ("<|start|>", "<|channel|>", "<|message|>", "<|call|>")
    found = spelled(
        "<|channel|>commentary<|message|>I shall look.<|end|><|start|>assistant"
        ' to=functions.nothing<|channel|>commentary<|message|>{"a": "one two"}',
        template=HARMONY,
        special=special,
        prompt="<|start|>assistant",
    )
    assert found == [("answer", "I shall look."), *CALLED]


def test_the_demo_model_can_be_made_to_call_a_tool() -> None:
    colours = {"type": "string", "enum": ["red", "green"]}
    paint = Tool(
        name="paint",
        description="Paint something.",
        parameters={
            "type": "object",
            "properties": {"colour": colours, "twice": {"type": "boolean"}},
            "required": ["colour"],
            "additionalProperties": False,
        },
    )
    runtime = load_folder(
        Path(lowmoe.__file__).parent / "demo", LoadOptions(threads=1, ram="256MiB")
    )
    try:
        text = runtime.text
        assert text.tool_calls is not None
        ids = text.encode([Message(role="user", content="Paint it red.")], tools=[paint, NOTHING])
        choice = ToolChoice(mode="required", name="paint", parallel=False)
        answer = Answer(
            runtime,
            ids,
            SamplingOptions(temperature=1.0, seed=1, max_new_tokens=200),
            end_ids=runtime.end_ids,
            constraint=text.tool_calls.grammar([paint, NOTHING], choice),
            calls=text.tool_calls.splitter([paint, NOTHING]),
        )
        batch = Batch(runtime)
        batch.join(answer)
        while batch.answers:
            batch.step()
        [(name, arguments)] = calls_in((one.kind, one.text) for one in answer.take())  # type: ignore[misc]
        assert (answer.end, name) == ("end", "paint")
        assert arguments["colour"] in ("red", "green")
        assert arguments.keys() <= {"colour", "twice"}
    finally:
        runtime.close()
