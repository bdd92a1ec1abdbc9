"""How likely tokens were is what transformers says of them, and comes with their text."""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import MixtralForCausalLM

import lowmoe
from lowmoe.api import Model
from lowmoe.engine.answer import Token
from lowmoe.engine.logprobs import Chances, ChosenToken
from lowmoe.engine.spelling import Spelling
from lowmoe.engine.text_parts import TextParts
from lowmoe.errors import UsageError
from tests.engine.test_thinking import parts_with
from tests.engine.vocabularies import text_parts

PROMPT = "Once upon a time"


@pytest.fixture
def unquantized(talking_checkpoint: Path) -> Iterator[Model]:
    with lowmoe.load(talking_checkpoint, dtype="float32", gpu="none") as model:
        yield model


def chosen_of(tokens: list[Token]) -> list[ChosenToken]:
    return [chosen for token in tokens for chosen in token.chosen]


def test_they_are_those_of_transformers_before_any_option(
    unquantized: Model, talking_checkpoint: Path
) -> None:
    how = {"temperature": 1.7, "top_k": 40, "repetition_penalty": 1.3, "seed": 3}
    tokens = list(unquantized.stream(PROMPT, n_logprobs=5, max_new_tokens=12, **how))  # type: ignore[arg-type]
    ids = [token.id for token in tokens if token.id is not None]
    prompt = unquantized.runtime.text.encode(PROMPT)
    theirs = MixtralForCausalLM.from_pretrained(talking_checkpoint, dtype=torch.float32)
    with torch.no_grad():
        logits = theirs(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 :]
    wanted = logits.log_softmax(-1)
    chosen = chosen_of(tokens)
    assert [one.chance.id for one in chosen] == ids
    for one, of_one in zip(chosen, wanted, strict=False):
        # Logits differ by 1e-4 at most, see tests/test_api.py, and so does their logarithmic sum.
        assert math.isclose(one.chance.logprob, float(of_one[one.chance.id]), abs_tol=2e-4)
        best = of_one.topk(5)
        assert [other.id for other in one.others] == best.indices.tolist()
        for other, likeliest in zip(one.others, best.values.tolist(), strict=True):
            assert math.isclose(other.logprob, likeliest, abs_tol=2e-4)


def test_asking_changes_no_token_and_not_asking_tells_nothing(model: Model) -> None:
    def answer(n_logprobs: int | None) -> list[Token]:
        return list(model.stream(PROMPT, seed=5, max_new_tokens=20, n_logprobs=n_logprobs))

    without, none, some = answer(None), answer(0), answer(3)
    assert [(t.id, t.text, t.kind) for t in without] == [(t.id, t.text, t.kind) for t in some]
    assert chosen_of(without) == []
    assert [c.chance for c in chosen_of(none)] == [c.chance for c in chosen_of(some)]
    assert {len(c.others) for c in chosen_of(none)} == {0}
    assert {len(c.others) for c in chosen_of(some)} == {3}


@pytest.mark.parametrize("n_logprobs", [-1, 321])
def test_more_than_there_are_is_refused(model: Model, n_logprobs: int) -> None:
    with pytest.raises(UsageError, match=rf"n_logprobs is {n_logprobs}, but must be from 0 to 320"):
        model.stream(PROMPT, n_logprobs=n_logprobs)


def test_a_part_of_a_character_has_its_bytes(model: Model) -> None:
    parts = text_parts("pieces, llama")
    ids = parts.tokenizer.encode_continuation("🦙")
    chances = Chances(parts.token_bytes, 0)
    scores = torch.zeros(parts.tokenizer.n_ids)
    told = [chances.of(token_id, scores).chance for token_id in ids]
    assert b"".join(chance.raw for chance in told) == "🦙".encode()
    assert {chance.text for chance in told} == {"\ufffd"}


# --- with the text


def pushed(
    parts: TextParts, text: str, *, stops: tuple[str, ...] = ()
) -> tuple[list[tuple[str, str, str]], bool]:
    """Each part of the text: its kind, itself, and the tokens told with it."""
    tokenizer = parts.tokenizer
    spelling, chances = Spelling(parts, stops, []), Chances(parts.token_bytes, 0)
    scores = torch.zeros(tokenizer.n_ids)
    said = []
    for token_id in tokenizer.encode(text, add_special=False):
        pieces, stopped = spelling.push(token_id, chances.of(token_id, scores))
        said += pieces
        if stopped:
            break
    else:
        pieces, stopped = spelling.flush()
        said += pieces
    told = [
        (one.kind, one.text, b"".join(c.chance.raw for c in one.chosen).decode()) for one in said
    ]
    return told, stopped


def test_tokens_of_one_character_are_told_with_it(model: Model) -> None:
    told, _ = pushed(model.runtime.text, "a🦙b")
    assert [(text, tokens) for _, text, tokens in told] == [("a", "a"), ("🦙", "🦙"), ("b", "b")]


def test_what_is_held_back_is_told_when_it_comes(model: Model) -> None:
    told, stopped = pushed(model.runtime.text, "x\n\n-y", stops=("\n\n\n",))
    assert not stopped
    assert "".join(text for _, text, _ in told) == "x\n\n-y"
    assert "".join(tokens for _, _, tokens in told) == "x\n\n-y"
    for i in range(len(told)):  # no token before its text
        assert len("".join(t for _, _, t in told[: i + 1])) <= len(
            "".join(t for _, t, _ in told[: i + 1])
        )


def test_the_tokens_of_a_stop_text_are_not_told(model: Model) -> None:
    told, stopped = pushed(model.runtime.text, "abc\n\n\ndef", stops=("\n\n\n",))
    assert stopped
    assert "".join(tokens for _, _, tokens in told) == "abc"


def test_tokens_are_of_the_kind_of_their_text() -> None:
    parts, _ = parts_with("</think>", special=())
    told, _ = pushed(parts, "<think>Hm</think>\n\nYes <b>", stops=("never",))
    by_kind = {
        kind: "".join(tokens for k, _, tokens in told if k == kind)
        for kind in ("thinking", "answer")
    }
    assert by_kind == {"thinking": "Hm", "answer": "Yes <b>"}


# --- which stop text


@pytest.mark.parametrize(
    ("stops", "found"), [((" zzz",), None), (("b", "abc"), "b"), (("bc", "abc"), "abc")]
)
def test_an_answer_says_which_stop_text_ended_it(
    model: Model, stops: tuple[str, ...], found: str | None
) -> None:
    spelling = Spelling(model.runtime.text, stops, [])
    for token_id in model.runtime.text.tokenizer.encode("xxabcd", add_special=False):
        if spelling.push(token_id)[1]:
            break
    assert spelling.stop == found
