"""What a model thinks is told from what it answers, however its tokens cut the marks."""

from collections.abc import Iterable, Sequence
from itertools import groupby

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken

from lowmoe.engine.spelling import Spelling
from lowmoe.engine.text_parts import CHAT_TEMPLATE, TOKENIZER, TOKENIZER_CONFIG, TextParts
from lowmoe.engine.thinking import Piece, Splitter, thinking_of
from tests.talking_mixtral import learned_tokenizer

THINKS = "{{ messages[0].content.split('</think>')[-1] }}"
HUNYUAN = THINKS + "{{ '<answer>' + '</answer>' }}"
HARMONY = "{{ '<|start|>assistant<|channel|>final<|message|>' + messages[0].content + '<|end|>' }}"
CONTROLS = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>")


def splitter_for(template: str) -> Splitter:
    thinking = thinking_of(template)
    assert thinking is not None
    return thinking.splitter()


def joined(pieces: Iterable[Piece]) -> list[Piece]:
    by_kind = groupby(pieces, key=lambda piece: piece[0])
    return [(kind, "".join(text for _, text in group)) for kind, group in by_kind]


def split(splitter: Splitter, parts: Sequence[str], prompt: str = "") -> list[Piece]:
    splitter.prompt(prompt, control=False)
    pieces = [piece for part in parts for piece in splitter.push(part, control=False)]
    return joined([*pieces, *splitter.flush()])


@pytest.mark.parametrize(
    ("template", "prompt", "text", "pieces"),
    [
        (
            THINKS,
            "",
            "<think>\nHm.\n</think>\n\nYes <think>",
            [
                ("mark", "<think>\n"),
                ("thinking", "Hm.\n"),
                ("mark", "</think>\n\n"),
                ("answer", "Yes <think>"),
            ],
        ),
        # The template has opened the tag.
        (
            THINKS,
            "assistant<think>\n",
            "\nHm.</think>Yes",
            [("mark", "\n"), ("thinking", "Hm."), ("mark", "</think>"), ("answer", "Yes")],
        ),
        # The template has let it think nothing.
        (THINKS, "<think>\n\n</think>\n\n", "Yes", [("answer", "Yes")]),
        (THINKS, "say <think> again", "Yes", [("answer", "Yes")]),
        # No thinking, and tags that are spoken of.
        (THINKS, "", " \nThe tag </think>", [("answer", " \nThe tag </think>")]),
        (THINKS, "", "<thin", [("answer", "<thin")]),
        # Cut off while it thinks.
        (THINKS, "", "<think>Hm </thi", [("mark", "<think>"), ("thinking", "Hm </thi")]),
        (
            HUNYUAN,
            "",
            "<think>Hm</think>\n<answer>\nYes\n</answer>",
            [
                ("mark", "<think>"),
                ("thinking", "Hm"),
                ("mark", "</think>\n<answer>\n"),
                ("answer", "Yes\n"),
                ("mark", "</answer>"),
            ],
        ),
    ],
)
def test_tags_are_found_wherever_the_text_is_cut(
    template: str, prompt: str, text: str, pieces: list[Piece]
) -> None:
    for cut in range(len(text) + 1):
        assert split(splitter_for(template), [text[:cut], text[cut:]], prompt) == pieces
    assert split(splitter_for(template), list(text), prompt) == pieces


PARTS = st.lists(st.sampled_from(["<think>", "</think>", "<", "think>", "/", "\n", " ", "a"]))


@given(parts=PARTS, prompt=st.sampled_from(["", "<think>\n"]))
def test_no_character_is_lost_and_no_cut_changes_its_kind(parts: list[str], prompt: str) -> None:
    text = "".join(parts)
    pieces = split(splitter_for(THINKS), parts, prompt)
    assert "".join(part for _, part in pieces) == text
    assert pieces == split(splitter_for(THINKS), [text], prompt)


def test_a_model_whose_template_knows_no_thinking_has_none() -> None:
    assert thinking_of("{{ messages[0].content }}") is None


# --- with tokens


def parts_with(
    template: str, *, special: Sequence[str] = ()
) -> tuple[TextParts, tokenizers.Tokenizer]:
    tokenizer = learned_tokenizer()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    files = {
        TOKENIZER: tokenizer.to_str().encode(),
        CHAT_TEMPLATE: template.encode(),
        TOKENIZER_CONFIG: b"{}",
    }
    return TextParts(files.get), tokenizer


def spelled(
    template: str, prompt: str, text: str, *, special: Sequence[str], stops: Sequence[str] = ()
) -> list[Piece]:
    parts, tokenizer = parts_with(template, special=special)
    spelling = Spelling(parts, stops, tokenizer.encode(prompt).ids)
    pieces: list[Piece] = []
    for token_id in tokenizer.encode(text).ids:
        certain, stopped = spelling.push(token_id)
        pieces += [(said.kind, said.text) for said in certain]
        if stopped:
            return joined(pieces)
    return joined([*pieces, *((said.kind, said.text) for said in spelling.flush()[0])])


@pytest.mark.parametrize("special", [(), ("<think>", "</think>")])
def test_a_tag_counts_as_text_and_as_a_token_that_is_not_printed(special: Sequence[str]) -> None:
    opened = [("thinking", "Grüße"), ("mark", "</think> "), ("answer", "Ja 🦙")]
    text = "Grüße</think> Ja 🦙"
    assert spelled(THINKS, "Hi<think>\n", text, special=special) == opened
    whole = spelled(THINKS, "Hi", "<think>" + text, special=special)
    assert whole == [("mark", "<think>"), *opened]


@pytest.mark.parametrize(
    ("prompt", "text", "pieces"),
    [
        (
            "<|end|><|start|>assistant",
            "<|channel|>analysis<|message|>Hm.<|end|>"
            "<|start|>assistant<|channel|>final<|message|>Yes<|return|>",
            [("thinking", "Hm."), ("mark", "\n\n"), ("answer", "Yes")],
        ),
        ("<|start|>assistant", "<|channel|>final<|message|>Yes", [("answer", "Yes")]),
        ("<|start|>assistant<|channel|>analysis<|message|>", "Hm", [("thinking", "Hm")]),
        ("Once", " upon", [("answer", " upon")]),
        # What merely looks like a mark is text.
        ("Once", " <|chan nel|>", [("answer", " <|chan nel|>")]),
    ],
)
def test_channels_are_told_by_their_tokens(prompt: str, text: str, pieces: list[Piece]) -> None:
    assert spelled(HARMONY, prompt, text, special=CONTROLS) == pieces


def test_a_stop_text_counts_across_tags_and_what_it_held_back_keeps_its_kind() -> None:
    text = "<think>one</think>two three"
    for stop, last in (
        ("k>tw", [("mark", "</thin")]),
        ("ne", [("thinking", "o")]),
        ("three", [("thinking", "one"), ("mark", "</think>"), ("answer", "two ")]),
        ("</think>two four", [("thinking", "one"), ("mark", "</think>"), ("answer", "two three")]),
    ):
        found = spelled(THINKS, "Hi", text, special=(), stops=[stop])
        assert found[-len(last) :] == last
        assert found[0] == ("mark", "<think>")
