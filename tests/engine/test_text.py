"""Streams of tokens give the same text as all tokens at once; stops fall where they fall in it."""

import functools
import json
import random

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from lowmoe.engine.text import MAX_WINDOW, StopText, StreamingDetokenizer, Tokenizer
from lowmoe.errors import PromptError, TextError

CORPUS = [
    "The quick brown fox jumps over the lazy dog. It's 12:34, isn't it?",
    "  indented\n\n\ttext with   spaces, naïve café, Straße",
    "我能吞下玻璃而不伤身体。今天天气很好。",
    "emoji 😀😀 👩‍👩‍👧 🇩🇪 e\u0301 o\u0302",
] * 3

# All that a tokenizer may stumble over, and plain characters often enough to make words.
TEXTS = st.text(
    st.one_of(
        st.sampled_from("the quickbrown. \n\t"),
        st.sampled_from("😀👩\u200d👧🇩🇪\u0301\u0302我能吞é한\ufffd"),
        st.characters(exclude_categories=["Cs"]),
    ),
    max_size=60,
)


@functools.cache
def byte_level() -> Tokenizer:
    """A tokenizer as GPT-2, Llama-3 and Qwen have it."""
    raw = tokenizers.Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(CORPUS, trainer)
    raw.add_tokens([AddedToken("<think>", special=False)])
    return Tokenizer.from_bytes(raw.to_str().encode())


@functools.cache
def byte_fallback() -> Tokenizer:
    """A tokenizer as Llama-2 and Mixtral have it, from SentencePiece."""
    raw = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    # Only the first line: the characters of the others fall back to bytes.
    raw.train_from_iterator(CORPUS[:1], trainer)
    fields = json.loads(raw.to_str())
    # SentencePiece's byte tokens are ordinary pieces, not added ones.
    fields["added_tokens"] = [t for t in fields["added_tokens"] if t["id"] < 3]
    return Tokenizer.from_bytes(json.dumps(fields).encode())


@functools.cache
def metaspace() -> Tokenizer:
    """The same with Metaspace, as newer conversions have it."""
    fields = json.loads(byte_fallback()._tokenizer.to_str())
    scheme = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    fields["normalizer"] = None
    fields["pre_tokenizer"] = scheme
    return Tokenizer.from_bytes(json.dumps(fields).encode())


@functools.cache
def torn() -> Tokenizer:
    """A byte-level tokenizer whose tokens begin and end anywhere within characters."""
    spelling = byte_spellings()
    data = "x你😀é".encode()
    pieces = {data[start : start + n] for n in (2, 3, 5) for start in range(len(data))}
    pieces |= {bytes([byte]) for byte in data}
    vocab = {
        "".join(spelling[byte] for byte in piece): token_id
        for token_id, piece in enumerate(sorted(pieces))
    }
    raw = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.decoder = decoders.ByteLevel()
    return Tokenizer.from_bytes(raw.to_str().encode())


TOKENIZERS = pytest.mark.parametrize("make", [byte_level, byte_fallback, metaspace])


def stream(tokenizer: Tokenizer, ids: list[int]) -> tuple[list[str], str]:
    streaming = StreamingDetokenizer(tokenizer)
    return [streaming.push(token_id) for token_id in ids], streaming.flush()


@TOKENIZERS
@settings(max_examples=200, deadline=None)
@given(text=TEXTS)
@example(text="a👩\u200d👩\u200d👧b")
@example(text="\ufffd" * 40)
def test_a_stream_gives_the_text_of_all_tokens_at_once(make, text: str) -> None:
    tokenizer = make()
    ids = tokenizer.encode(text, add_special=False)
    pieces, rest = stream(tokenizer, ids)
    assert "".join(pieces) + rest == tokenizer.decode(ids)
    if "\ufffd" not in text:
        assert rest == ""
        assert all("\ufffd" not in piece for piece in pieces)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 420), max_size=80))
def test_a_byte_level_stream_gives_the_text_of_any_tokens(ids: list[int]) -> None:
    # Some of these ids are beyond the vocabulary, as in a model whose V is padded.
    pieces, rest = stream(byte_level(), ids)
    assert "".join(pieces) + rest == byte_level().decode(ids)


@settings(max_examples=500, deadline=None)
@given(st.lists(st.integers(0, 40), max_size=120))
def test_tokens_torn_within_characters_stream_as_the_text_of_all(ids: list[int]) -> None:
    pieces, rest = stream(torn(), ids)
    assert "".join(pieces) + rest == torn().decode(ids)


def test_a_long_stream_of_torn_tokens_is_the_text_of_all() -> None:
    # Unlike hypothesis, which likes short lists, long enough to be cut in all places.
    ids = random.Random(1).choices(range(torn().vocab_size), k=20_000)
    pieces, rest = stream(torn(), ids)
    assert "".join(pieces) + rest == torn().decode(ids)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 420), max_size=80))
def test_a_byte_fallback_stream_of_any_tokens_says_nothing_unfinished(ids: list[int]) -> None:
    tokenizer = byte_fallback()
    pieces, rest = stream(tokenizer, ids)
    whole = tokenizer.decode(ids)
    if "\ufffd" not in whole:
        assert "".join(pieces) + rest == whole
        assert all("\ufffd" not in piece for piece in pieces)


def test_what_a_byte_fallback_stream_has_said_stays_said() -> None:
    tokenizer = byte_fallback()
    e4, bd, a0, ff = (tokenizer.token_id(f"<0x{byte}>") for byte in ("E4", "BD", "A0", "FF"))
    pieces, rest = stream(tokenizer, [e4, bd, a0, ff])
    assert (pieces, rest) == (["", "", "你", ""], "\ufffd")


@pytest.mark.parametrize("undecodable", [[0xFF], [0x80], [0xF0, 0x9F], [0xF0, 0x9F, 0x98]])
def test_bytes_that_never_make_a_character_are_decoded_once_each(undecodable: list[int]) -> None:
    class Counting(Tokenizer):
        n_decoded = 0

        def decode(self, ids):
            self.n_decoded += len(ids)
            return super().decode(ids)

    tokenizer = Counting(byte_level()._tokenizer)
    spelling = byte_spellings()
    ids = [tokenizer.token_id(spelling[byte]) for byte in undecodable * 200]
    pieces, rest = stream(tokenizer, ids)
    # Each push decodes a window once, and one in thirteen decodes it in two halves four times.
    assert tokenizer.n_decoded < len(ids) * 2 * MAX_WINDOW
    assert "".join(pieces) + rest == tokenizer.decode(ids)


def byte_spellings() -> dict[int, str]:
    """GPT-2's table from bytes to printable characters."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + place) for place, byte in enumerate(others)
    }


def test_a_character_is_given_with_its_last_byte_and_not_before() -> None:
    tokenizer = byte_fallback()
    ids = tokenizer.encode("a我", add_special=False)
    pieces, _ = stream(tokenizer, ids)
    assert [piece for piece in pieces if piece] == ["a", "我"]
    assert pieces[-1] == "我"


def test_special_tokens_are_silent_and_others_are_not() -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode("<think>hm<|end|>", add_special=False)
    assert tokenizer.decode(ids) == "<think>hm"
    assert "".join(stream(tokenizer, ids)[0]) == "<think>hm"
    assert tokenizer.added_tokens == {"<|end|>": True, "<think>": False}
    assert tokenizer.is_silent(tokenizer.vocab_size + 5)


def test_a_streaming_detokenizer_begins_anew_after_flush() -> None:
    streaming = StreamingDetokenizer(byte_fallback())
    ids = byte_fallback().encode("the fox", add_special=False)
    for _ in range(2):
        text = "".join(streaming.push(token_id) for token_id in ids) + streaming.flush()
        assert text == "the fox"


@TOKENIZERS
@settings(max_examples=100, deadline=None)
@given(first=TEXTS, second=TEXTS)
def test_a_continuation_adds_no_space(make, first: str, second: str) -> None:
    tokenizer = make()
    ids = tokenizer.encode("x" + first, add_special=False)
    ids += tokenizer.encode_continuation("y" + second)
    assert tokenizer.decode(ids) == "x" + first + "y" + second


@TOKENIZERS
def test_plain_text_holds_no_added_token(make) -> None:
    tokenizer = make()
    for token in tokenizer.added_tokens:
        ids = tokenizer.encode("x", add_special=False) + tokenizer.encode_plain(token)
        assert tokenizer.token_id(token) not in ids
        assert tokenizer.decode(ids) == "x" + token


def test_a_prompt_is_neither_cut_nor_filled_up() -> None:
    raw = tokenizers.Tokenizer.from_str(byte_level()._tokenizer.to_str())
    raw.enable_truncation(4)
    raw.enable_padding(length=50)
    tokenizer = Tokenizer.from_bytes(raw.to_str().encode())
    text = "the quick brown fox jumps over"
    assert tokenizer.decode(tokenizer.encode(text, add_special=True)) == text


def test_special_tokens_are_put_around_a_text_only_on_request() -> None:
    raw = tokenizers.Tokenizer.from_str(byte_fallback()._tokenizer.to_str())
    raw.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer = Tokenizer.from_bytes(raw.to_str().encode())
    assert tokenizer.encode("the", add_special=True)[0] == 1
    assert 1 not in tokenizer.encode("the", add_special=False)


@pytest.mark.parametrize("data", [b"", b"{}", b"\xff", b"[" * 10_000, b'{"version": "9"}'])
def test_a_damaged_tokenizer_is_refused(data: bytes) -> None:
    with pytest.raises(TextError, match=r"tokenizer\.json \(\d+ bytes\) cannot be read"):
        Tokenizer.from_bytes(data)


def test_a_prompt_that_is_not_unicode_is_refused() -> None:
    with pytest.raises(PromptError, match=r"character 1 of the text is U\+DCE9"):
        byte_level().encode("h\udce9", add_special=False)


def cut_at_first_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """Look at every end in turn, at each for the longest stop: slow, and plainly right."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - len(max(found, key=len))], True
    return text, False


@settings(max_examples=500, deadline=None)
@given(
    pieces=st.lists(st.text("ab\n", max_size=5), max_size=8),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=4),
)
@example(pieces=["a", "b", "c"], stops=["abc", "b"])
def test_stops_cut_the_same_text_however_it_comes_in_pieces(
    pieces: list[str], stops: list[str]
) -> None:
    stop_text = StopText(stops)
    emitted, stopped = "", False
    for piece in pieces:
        new, stopped = stop_text.push(piece)
        emitted += new
    emitted += stop_text.flush()
    assert (emitted, stopped) == cut_at_first_stop("".join(pieces), stops)


@given(text=st.text("ab", max_size=12), stops=st.lists(st.text("ab", min_size=1, max_size=4)))
def test_only_what_may_begin_a_stop_is_held_back(text: str, stops: list[str]) -> None:
    emitted, stopped = StopText(stops).push(text)
    held = "" if stopped else text[len(emitted) :]
    assert held == "" or any(stop.startswith(held) and stop != held for stop in stops)


def test_after_a_stop_nothing_more_is_given() -> None:
    stop_text = StopText(["END"])
    assert stop_text.push("so E") == ("so ", False)
    assert stop_text.push("ND more") == ("", True)
    assert stop_text.push("and more") == ("", True)
    assert stop_text.flush() == ""
