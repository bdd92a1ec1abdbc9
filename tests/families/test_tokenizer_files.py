"""Vocabularies in other files become a tokenizer.json that cuts texts as their own programs do."""

import base64
import io
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tiktoken
from tokenizers import Tokenizer as LibraryTokenizer

from lowmoe.decoder.open_checkpoint import open_checkpoint
from lowmoe.engine.text import Tokenizer
from lowmoe.engine.text_parts import TextParts
from lowmoe.errors import TextError
from lowmoe.families.gguf.splits import SPLITS
from lowmoe.families.tokenizer_files import made_tokenizer
from tests.families.test_gguf_tokenizer import SAMPLES, TEXT
from tests.talking_mixtral import copy_of, learned_tokenizer


def tokenizer_of(model_type: str, files: Mapping[str, bytes]) -> Tokenizer:
    data = made_tokenizer(model_type, files.get)
    assert data is not None
    return Tokenizer.from_bytes(data)


def config(added: Mapping[int, tuple[str, bool]], **others: Any) -> bytes:
    decoder = {
        str(i): {"content": text, "special": special} for i, (text, special) in added.items()
    }
    return json.dumps({"added_tokens_decoder": decoder, **others}).encode()


# --- SentencePiece


def trained(**options: Any) -> bytes:
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT[:60_000].splitlines()),
        model_writer=made,
        vocab_size=600,
        byte_fallback=True,
        character_coverage=0.98,
        user_defined_symbols=["<own>"],
        minloglevel=2,
        num_threads=1,
        **{"model_type": "bpe", **options},
    )
    return made.getvalue()


# As Llama's are made, as SentencePiece makes them by itself, and without a space in front.
KINDS = {
    "llama": {"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    "usual": {},
    "bare": {"add_dummy_prefix": False},
}


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_are_those_of_sentencepiece(kind: str) -> None:
    data = trained(**KINDS[kind])
    theirs = sentencepiece.SentencePieceProcessor(model_proto=data)
    ours = tokenizer_of("mixtral", {"tokenizer.model": data})
    for text in [*SAMPLES, "🦙 ß", "\ufb01ve  \uff12 apples "]:
        # On two sides of a line break SentencePiece's usual rules see a space; so do ours.
        ids = theirs.encode(text)
        assert ours.encode(text, add_special=False) == ids, text
        assert ours.decode(ids) == theirs.decode(ids)
    assert ours.prefix == [theirs.bos_id()]
    assert ours.vocab_size == theirs.get_piece_size()


def test_what_the_config_adds_is_matched_whole() -> None:
    data = trained()
    theirs = sentencepiece.SentencePieceProcessor(model_proto=data)
    end = theirs.get_piece_size()
    added = {0: ("<unk>", True), end: ("<|im_start|>", True), end + 1: ("<think>", False)}
    files = {"tokenizer.model": data, "tokenizer_config.json": config(added, add_bos_token=False)}
    ours = tokenizer_of("mixtral", files)
    assert ours.prefix == []
    assert ours.added_tokens["<|im_start|>"]
    assert not ours.added_tokens["<think>"]
    assert ours.encode("<|im_start|>", add_special=True) == [end]
    assert ours.token_id("<think>") == end + 1


def test_a_piece_that_the_config_calls_otherwise_is_called_so_and_gaps_are_reserved() -> None:
    data = trained()
    end = sentencepiece.SentencePieceProcessor(model_proto=data).get_piece_size()
    added = {5: ("<|im_start|>", True), end + 2: ("<|im_end|>", True)}
    files = {"tokenizer.model": data, "tokenizer_config.json": config(added, add_bos_token=False)}
    ours = tokenizer_of("mixtral", files)
    assert ours.encode("<|im_start|>", add_special=True) == [5]
    assert ours.encode("<|im_end|>", add_special=True) == [end + 2]


def test_pieces_by_likelihood_are_refused() -> None:
    with pytest.raises(TextError, match=r"kind 1 \(unigram\), but only 2"):
        made_tokenizer("mixtral", {"tokenizer.model": trained(model_type="unigram")}.get)


@pytest.mark.parametrize("data", [b"\xff\xff", b"", b"IQ== 0\n"])
def test_what_is_no_model_of_pieces_is_refused(data: bytes) -> None:
    with pytest.raises(TextError, match=r"tokenizer\.model: .* Download the file again"):
        made_tokenizer("mixtral", {"tokenizer.model": data}.get)


def test_a_package_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(TextError, match=r"pip install 'lowmoe\[sentencepiece\]'"):
        made_tokenizer("mixtral", {"tokenizer.model": b"x"}.get)


# --- tiktoken


@pytest.fixture(scope="module")
def ranks() -> dict[bytes, int]:
    """Byte pairs learned from the calibration text, in the order of their merges."""
    spelled = learned_vocabulary()
    return {token: rank for rank, token in enumerate(spelled)}


def learned_vocabulary() -> list[bytes]:
    learned = json.loads(learned_tokenizer().to_str())["model"]
    byte_of = {c: b for b, c in enumerate(byte_characters())}
    singles = [bytes([b]) for b in range(256)]
    merged = [bytes(byte_of[c] for c in "".join(pair)) for pair in learned["merges"]]
    return singles + list(dict.fromkeys(merged))


def byte_characters() -> list[str]:
    """What the library's own byte-level step makes of each byte."""
    from tokenizers import pre_tokenizers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    found = [bytes_to_unicode()[b] for b in range(256)]
    assert sorted(found) == sorted(pre_tokenizers.ByteLevel.alphabet())
    return found


def written(ranks: Mapping[bytes, int]) -> bytes:
    return b"".join(base64.b64encode(t) + b" " + str(r).encode() + b"\n" for t, r in ranks.items())


@pytest.mark.parametrize(
    ("model_type", "file", "cut"),
    [("qwen", "qwen.tiktoken", "qwen2"), ("kimi_k2", "tiktoken.model", "kimi-k2")],
)
def test_ranks_are_joined_as_by_tiktoken(
    ranks: dict[bytes, int], model_type: str, file: str, cut: str
) -> None:
    (pattern,) = SPLITS[cut].patterns
    theirs = tiktoken.Encoding("test", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    ours = tokenizer_of(model_type, {file: written(ranks)})
    for text in [*SAMPLES, TEXT[3000:9000]]:
        ids = theirs.encode_ordinary(text)
        assert ours.encode(text, add_special=True) == ids, text
        assert ours.decode(ids) == text


def test_qwens_own_tokens_follow_the_ranks(ranks: dict[bytes, int]) -> None:
    ours = tokenizer_of("qwen", {"qwen.tiktoken": written(ranks)})
    n = len(ranks)
    assert [ours.token_id(t) for t in ("<|endoftext|>", "<|im_end|>", "<|extra_204|>")] == [
        n,
        n + 2,
        n + 207,
    ]
    assert ours.encode("a<|im_start|>", add_special=True)[-1] == n + 1


def test_tokens_that_the_config_names_keep_their_ids_over_gaps(ranks: dict[bytes, int]) -> None:
    n = len(ranks)
    files = {
        "tiktoken.model": written(ranks),
        "tokenizer_config.json": config({n: ("[BOS]", True), n + 3: ("<think>", False)}),
    }
    ours = tokenizer_of("kimi_k2", files)
    assert (ours.token_id("[BOS]"), ours.token_id("<think>")) == (n, n + 3)
    assert ours.is_silent(n + 1)


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b"IQ== 0\nno base64 1\n", "line 2 is not a token"),
        (b"IQ== x\n", "line 1 is not a token"),
        (b"IQ== 0\nIg== 2\n", "ranks are not 0 to 1"),
        (b"", "ranks are not"),
    ],
)
def test_damaged_ranks_are_refused(data: bytes, fault: str) -> None:
    with pytest.raises(TextError, match=fault):
        made_tokenizer("qwen", {"qwen.tiktoken": data}.get)


@pytest.mark.parametrize(
    "added", [{"x": {"content": "a"}}, {"5": {}}, {"5": "a"}, {"999999": {"content": "a"}}]
)
def test_a_damaged_list_of_added_tokens_is_refused(
    ranks: dict[bytes, int], added: dict[str, object]
) -> None:
    files = {
        "tiktoken.model": written(ranks),
        "tokenizer_config.json": json.dumps({"added_tokens_decoder": added}).encode(),
    }
    with pytest.raises(TextError, match=r"tokenizer_config\.json: added_tokens_decoder has"):
        made_tokenizer("kimi_k2", files.get)


# --- in a folder


def test_a_checkpoint_without_a_tokenizer_json_has_one_made(
    talking_checkpoint: Path, tmp_path: Path
) -> None:
    folder = copy_of(talking_checkpoint, tmp_path / "checkpoint", without="tokenizer.json")
    assert open_checkpoint(folder).small_file("tokenizer.json") is None
    (folder / "tokenizer.model").write_bytes(trained())
    data = open_checkpoint(folder).small_file("tokenizer.json")
    assert data is not None
    assert LibraryTokenizer.from_buffer(data).token_to_id("<own>") is not None
    assert TextParts(open_checkpoint(folder).small_file).encode("Once upon a time")
