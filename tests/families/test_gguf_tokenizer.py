"""Tokenizers out of GGUF files against those whose vocabularies they hold."""

import io
import json
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from lowmoe.engine.text import Tokenizer as OurTokenizer
from lowmoe.errors import TextError
from lowmoe.families.gguf import gguf_small_file
from lowmoe.families.gguf.splits import SPLITS
from tests.gguf_models import Writer
from tests.talking_mixtral import learned_tokenizer

TEXT = (resources.files("lowmoe") / "loader" / "calibration.txt").read_text("utf-8")
SAMPLES = [
    "Hello, world!",
    "  two spaces, and\n\n\nthree lines\t\ttabs ",
    "In 1984 it's 12345.678 dollars; we'LL see. CamelCase, ALLCAPS",
    "Grüße aus Köln, 你好。世界, שלום, 🦙🦙",
    "def f(x):\r\n    return x**2  # done",
    "",
    " ",
    TEXT[:3000],
]


def values_of_pairs(made: Tokenizer, pre: str) -> dict[str, Any]:
    """What a GGUF file holds of a vocabulary of byte pairs."""
    model = json.loads(made.to_str())
    vocabulary = model["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    special = {t["content"] for t in model["added_tokens"]}
    merges = model["model"]["merges"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array([3 if t in special else 1 for t in tokens]),
        "tokenizer.ggml.merges": [" ".join(m) for m in merges],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 0,
    }


def tokenizer_of(values: dict[str, Any]) -> OurTokenizer:
    data = gguf_small_file(values, "tokenizer.json")
    assert data is not None
    return OurTokenizer.from_bytes(data)


def write(values: dict[str, Any], path: Path, architecture: str) -> None:
    writer = Writer(path, architecture)
    for key, value in values.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_array(key, value if isinstance(value, list) else value.tolist())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


KNOWN_TO_TRANSFORMERS = ["llama-bpe", "qwen2", "tekken", "gpt-4o", "dbrx", "smaug-bpe", "llama4"]


@pytest.mark.parametrize("pre", KNOWN_TO_TRANSFORMERS)
def test_byte_pairs_are_cut_as_transformers_cuts_them(tmp_path: Path, pre: str) -> None:
    values = values_of_pairs(learned_tokenizer(), pre)
    write(values, tmp_path / "x.gguf", "llama")
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="x.gguf")
    ours = tokenizer_of(values)
    for text in SAMPLES:
        wanted = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, add_special=False) == wanted, text


def test_the_kind_of_gpt_2_gives_what_the_tokenizer_itself_gives() -> None:
    made = learned_tokenizer()  # which cuts as GPT-2 does
    ours = tokenizer_of(values_of_pairs(made, "gpt-2"))
    for text in [*SAMPLES, "<|user|>Hello<|end|>"]:
        assert ours.encode(text, add_special=False) == made.encode(text).ids
        assert ours.decode(made.encode(text).ids) == made.decode(made.encode(text).ids)


@pytest.mark.parametrize("pre", SPLITS)
def test_every_kind_keeps_every_character(pre: str) -> None:
    ours = tokenizer_of(values_of_pairs(learned_tokenizer(), pre))
    for text in SAMPLES:
        assert ours.decode(ours.encode(text, add_special=False)) == text


def test_digits_are_cut_as_the_kinds_say() -> None:
    made = learned_tokenizer()

    def words(pre: str, text: str) -> list[str]:
        data = gguf_small_file(values_of_pairs(made, pre), "tokenizer.json")
        assert data is not None
        cut = Tokenizer.from_buffer(data).pre_tokenizer
        assert cut is not None
        return [word for word, _ in cut.pre_tokenize_str(text)]

    assert words("qwen2", "a1234") == ["a", "1", "2", "3", "4"]
    assert words("llama-bpe", "a1234") == ["a", "123", "4"]
    assert words("deepseek-v3", "a1234") == ["a", "123", "4"]
    assert words("kimi-k2", "a1234") == ["a", "123", "4"]
    assert words("smollm", "a12") == ["a", "1", "2"]
    assert words("gpt-2", "a1234") == ["a", "1234"]


# --- SentencePiece


@pytest.fixture(scope="module")
def pieces() -> sentencepiece.SentencePieceProcessor:
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT[:60_000].splitlines()),
        model_writer=made,
        model_type="bpe",
        vocab_size=600,
        byte_fallback=True,
        character_coverage=0.98,
        user_defined_symbols=["<own>"],
        minloglevel=2,
        num_threads=1,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=made.getvalue())


def values_of_pieces(made: sentencepiece.SentencePieceProcessor) -> dict[str, Any]:
    def kind(i: int) -> int:
        if made.is_unknown(i):
            return 2
        if made.is_control(i):
            return 3
        if made.id_to_piece(i) == "<own>":
            return 4
        return 6 if made.is_byte(i) else 1

    count = made.get_piece_size()
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [made.id_to_piece(i) for i in range(count)],
        "tokenizer.ggml.scores": np.array([made.get_score(i) for i in range(count)]),
        "tokenizer.ggml.token_type": np.array([kind(i) for i in range(count)]),
        "tokenizer.ggml.bos_token_id": made.bos_id(),
        "tokenizer.ggml.eos_token_id": made.eos_id(),
    }


def test_pieces_are_those_of_sentencepiece(pieces: sentencepiece.SentencePieceProcessor) -> None:
    ours = tokenizer_of(values_of_pieces(pieces))
    # SentencePiece's own normalization, of spaces and of characters, is no part of a GGUF file.
    for text in [" ".join(sample.split()) for sample in SAMPLES if sample.strip()] + ["🦙 ß"]:
        wanted = pieces.encode(text)
        assert ours.encode(text, add_special=False) == wanted, text
        assert ours.decode(wanted) == pieces.decode(wanted)


def test_a_token_of_the_makers_own_is_matched_whole(
    pieces: sentencepiece.SentencePieceProcessor,
) -> None:
    ours = tokenizer_of(values_of_pieces(pieces))
    own = pieces.piece_to_id("<own>")
    # Text behind one begins with a space again, as in llama.cpp and in Llama 2's own files; the
    # space behind <s> that these models are used to comes from there.
    [front, back] = pieces.encode("an"), pieces.encode("word")
    assert ours.encode("an<own>word", add_special=False) == [*front, own, *back]


def test_a_vocabulary_of_pieces_begins_texts_unless_it_says_otherwise(
    pieces: sentencepiece.SentencePieceProcessor,
) -> None:
    values = values_of_pieces(pieces)
    assert tokenizer_of(values).prefix == [pieces.bos_id()]
    silent = {**values, "tokenizer.ggml.add_bos_token": False}
    assert tokenizer_of(silent).prefix == []
    ended = tokenizer_of({**silent, "tokenizer.ggml.add_eos_token": True})
    assert ended.encode("a", add_special=True)[-1] == pieces.eos_id()


def test_no_space_goes_in_front_where_the_file_says_so(
    pieces: sentencepiece.SentencePieceProcessor,
) -> None:
    values = {**values_of_pieces(pieces), "tokenizer.ggml.add_space_prefix": False}
    ours = tokenizer_of(values)
    ids = ours.encode("the", add_special=False)
    assert "▁" not in "".join(pieces.id_to_piece(ids))
    assert ours.decode(ids) == "the"


# --- other small files, and refusals


def test_the_chat_template_and_special_tokens_come_along() -> None:
    values = values_of_pairs(learned_tokenizer(), "gpt-2")
    values["tokenizer.chat_template"] = "{{ messages }}"
    assert gguf_small_file(values, "chat_template.jinja") == b"{{ messages }}"
    config = gguf_small_file(values, "tokenizer_config.json")
    assert config is not None
    assert json.loads(config) == {"bos_token": "<|system|>", "eos_token": "<|end|>"}
    assert gguf_small_file(values, "generation_config.json") is None
    assert gguf_small_file({}, "tokenizer.json") is None


def test_a_token_of_any_name_may_begin_texts() -> None:
    values = values_of_pairs(learned_tokenizer(), "gpt-2")
    values["tokenizer.ggml.tokens"][1] = "$A:b"
    values["tokenizer.ggml.add_bos_token"] = True
    assert tokenizer_of(values).encode("x", add_special=True)[0] == 1


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"model": "rwkv"}, r"model is 'rwkv', but implemented are 'gpt2'"),
        ({"pre": "nobody's"}, r"pre is \"nobody's\", but implemented are chatglm-bpe"),
        ({"merges": 5}, r"merges is not a list of words"),
        ({"token_type": np.array([1, 2])}, r"token_type is not a list of 320 numbers"),
        ({"token_type": np.array([1.0] * 319 + [float("nan")])}, r"token_type has fractions"),
        ({"model": "llama", "tokens": ["a" * 1025] * 320}, r"a token has 1025 characters"),
        ({"merges": ["zz qq"]}, r"the vocabulary cannot be used"),
    ],
)
def test_a_vocabulary_that_cannot_be_used_is_refused(changes: dict[str, Any], found: str) -> None:
    values = values_of_pairs(learned_tokenizer(), "gpt-2")
    values |= {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    with pytest.raises(TextError, match=found):
        gguf_small_file(values, "tokenizer.json")
