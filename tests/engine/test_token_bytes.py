"""The bytes of tokens, put together, are the text; and those that their own programs give."""

import pytest
import sentencepiece
import tiktoken
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from lowmoe.engine.text import StreamingDetokenizer, Tokenizer
from lowmoe.engine.text_parts import TextParts
from lowmoe.engine.token_bytes import TokenBytes
from lowmoe.errors import TextError
from lowmoe.families.gguf.splits import SPLITS
from tests.engine.vocabularies import vocabulary_files
from tests.families.test_tokenizer_files import learned_vocabulary, trained

# SentencePiece's usual rules write some characters otherwise than they stand in the text.
AS_WRITTEN = ["byte-level", "ranks", "pieces, llama"]
ALL = {kind: TextParts(files.get) for kind, files in vocabulary_files().items()}


# Which SentencePiece writes for a space, so that both are the same to it.
TEXTS = st.text(st.characters(exclude_characters="\u2581", exclude_categories=["Cs"]), max_size=40)


@settings(max_examples=100, deadline=None)
@given(text=TEXTS, kind=st.sampled_from(AS_WRITTEN))
def test_the_bytes_of_a_texts_tokens_are_the_texts(text: str, kind: str) -> None:
    parts = ALL[kind]
    ids = parts.tokenizer.encode_continuation(text)
    assert b"".join(parts.token_bytes[i] for i in ids) == text.encode()


@settings(max_examples=100, deadline=None)
@given(data=st.data(), kind=st.sampled_from(sorted(ALL)))
def test_a_text_inside_another_is_the_bytes_of_its_tokens(data: st.DataObject, kind: str) -> None:
    parts = ALL[kind]
    ids = [i for i in range(parts.tokenizer.n_ids) if not parts.tokenizer.is_silent(i)]
    chosen = data.draw(st.lists(st.sampled_from(ids), max_size=20))
    detokenizer = StreamingDetokenizer(parts.tokenizer, inside=True)
    said = "".join(detokenizer.push(i) for i in chosen) + detokenizer.flush()
    raw = b"".join(parts.token_bytes[i] for i in chosen)
    # Of bytes that are no character every program makes as many marks as it likes.
    if "\ufffd" not in said:
        assert said.encode() == raw
    else:
        with pytest.raises(UnicodeDecodeError):
            raw.decode()


def test_bytes_are_those_of_tiktoken() -> None:
    ranks = {token: rank for rank, token in enumerate(learned_vocabulary())}
    (pattern,) = SPLITS["kimi-k2"].patterns
    theirs = tiktoken.Encoding("test", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    ours = ALL["ranks"].token_bytes
    assert [ours[i] for i in ranks.values()] == [
        theirs.decode_single_token_bytes(i) for i in ranks.values()
    ]


def test_bytes_are_those_of_sentencepiece() -> None:
    theirs = sentencepiece.SentencePieceProcessor(model_proto=trained())
    ours = ALL["pieces, usual"].token_bytes
    for i in range(theirs.get_piece_size()):
        piece = theirs.id_to_piece(i)
        if theirs.is_byte(i):
            assert ours[i] == bytes([int(piece[3:5], 16)])
        else:
            assert ours[i] == piece.replace("\u2581", " ").encode()


def test_ids_of_no_token_write_nothing() -> None:
    parts = ALL["ranks"]
    assert parts.token_bytes[parts.tokenizer.n_ids + 7] == b""


@pytest.mark.parametrize(
    "decoder",
    [
        None,
        decoders.WordPiece(),
        decoders.BPEDecoder(),
        # Before the tokens are put together it would take a space from each.
        decoders.Sequence([decoders.Replace("_", " "), decoders.Strip(" ", 1, 0)]),
    ],
)
def test_tokens_that_cannot_be_told_one_by_one_are_refused(decoder: object) -> None:
    made = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    if decoder is not None:
        made.decoder = decoder
    with pytest.raises(TextError, match=r"decodes by .*byte-level and SentencePiece's"):
        TokenBytes(Tokenizer(made))
