"""A tokenizer.json made of the vocabulary files of models that come without one.

Knows:        SentencePiece's tokenizer.model, tiktoken's lists of ranks and who uses which.
Ignorant of:  how a tokenizer is used.
"""

import base64
import binascii
import json
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, Tokenizer, normalizers

from lowmoe.errors import TextError

SENTENCEPIECE = "tokenizer.model"
_JSON, _CONFIG = "tokenizer.json", "tokenizer_config.json"
_NORMAL, _CONTROL, _OWN = 1, 3, 4  # kinds of tokens, as in GGUF files
_BYTE_PAIRS, _OTHER_KINDS = 2, {1: "unigram", 3: "words", 4: "characters"}

Read = Callable[[str], bytes | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ranks:
    """A tiktoken file, llama.cpp's name for how it cuts a text, and what follows its ranks."""

    file: str
    cut: str
    special: tuple[str, ...] = ()


_TIKTOKEN: Mapping[str, _Ranks] = {
    "qwen": _Ranks(
        file="qwen.tiktoken",
        cut="qwen2",
        special=(
            "<|endoftext|>",
            "<|im_start|>",
            "<|im_end|>",
            *(f"<|extra_{i}|>" for i in range(205)),
        ),
    ),
    # Its tokenizer_config.json names what follows.
    "kimi_k2": _Ranks(file="tiktoken.model", cut="kimi-k2"),
}
TIKTOKEN_FILES = frozenset(ranks.file for ranks in _TIKTOKEN.values())


def made_tokenizer(model_type: str, read: Read) -> bytes | None:
    """The tokenizer.json of a model that has a vocabulary in another file; None if it has neither.

    read: the content of a small file, or None.  Raises TextError for what cannot be read.
    """
    ranks = _TIKTOKEN.get(model_type)
    if ranks is not None and (data := read(ranks.file)) is not None:
        return _of_ranks(ranks, data, _own_tokens(read))
    data = read(SENTENCEPIECE)
    return None if data is None else _of_pieces(data, _own_tokens(read), _config(read))


# --- SentencePiece


def _of_pieces(data: bytes, own: Mapping[int, tuple[str, int]], config: Mapping[str, Any]) -> bytes:
    model = _model_proto(data)
    tokens = [piece.piece for piece in model.pieces]
    kinds = [piece.type for piece in model.pieces]
    scores = [piece.score for piece in model.pieces]
    if (kind := model.trainer_spec.model_type) != _BYTE_PAIRS:
        raise TextError(
            f"{SENTENCEPIECE}: is of SentencePiece's kind {kind} ({_OTHER_KINDS.get(kind, '?')}), "
            f"but only {_BYTE_PAIRS} (byte pairs) is implemented. Put a tokenizer.json beside it."
        )
    for token_id, (token, kind) in _in_order(own, len(tokens)):
        _name(tokens, kinds, token_id, token, kind)
    scores += [0.0] * (len(tokens) - len(scores))
    values: dict[str, Any] = {
        "model": "llama",
        "tokens": tokens,
        "scores": array("d", scores),
        "token_type": array("q", kinds),
        "bos_token_id": model.trainer_spec.bos_id,
        "eos_token_id": model.trainer_spec.eos_id,
        "add_space_prefix": model.normalizer_spec.add_dummy_prefix,
        "add_bos_token": config.get("add_bos_token", True) is True,
        "add_eos_token": config.get("add_eos_token", False) is True,
    }
    made = _built(values)
    made.normalizer = normalizers.Sequence(
        [*_normalizers(model.normalizer_spec), *([made.normalizer] if made.normalizer else [])]
    )
    return made.to_str().encode()


def _normalizers(spec: Any) -> Iterator[Any]:
    """What is done to a text before its spaces are replaced."""
    if spec.precompiled_charsmap:
        yield normalizers.Precompiled(spec.precompiled_charsmap)
    if spec.remove_extra_whitespaces:
        yield normalizers.Strip()
        yield normalizers.Replace(Regex(" {2,}"), " ")


def _model_proto(data: bytes) -> Any:
    try:
        from google.protobuf.message import DecodeError
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as e:
        raise TextError(
            f"this model's vocabulary is in {SENTENCEPIECE}, which is read by the packages "
            f"sentencepiece and protobuf, but {e.name} is not installed. "
            "pip install 'lowmoe[sentencepiece]', or put a tokenizer.json beside it."
        ) from e
    try:
        model = sentencepiece_model_pb2.ModelProto.FromString(data)  # type: ignore[attr-defined]
    except DecodeError as e:
        raise TextError(
            f"{SENTENCEPIECE}: is not SentencePiece's ({e}). Download the file again."
        ) from e
    if not model.pieces:
        raise TextError(f"{SENTENCEPIECE}: holds no pieces. Download the file again.")
    return model


# --- tiktoken


def _of_ranks(ranks: _Ranks, data: bytes, own: Mapping[int, tuple[str, int]]) -> bytes:
    rank_of = _read_ranks(ranks.file, data)
    spelled = _spelling()
    tokens = ["".join(spelled[b] for b in token) for token in rank_of]
    merges = [
        f"{''.join(spelled[b] for b in left)} {''.join(spelled[b] for b in right)}"
        for token in rank_of
        for left, right in _halves(token, rank_of)
    ]
    kinds = [_NORMAL] * len(tokens)
    named = own or {len(tokens) + i: (t, _CONTROL) for i, t in enumerate(ranks.special)}
    for token_id, (token, kind) in _in_order(named, len(tokens)):
        _name(tokens, kinds, token_id, token, kind)
    values = {
        "model": "gpt2",
        "pre": ranks.cut,
        "tokens": tokens,
        "merges": merges,
        "token_type": array("q", kinds),
    }
    made = _built(values)
    made.model.ignore_merges = True  # a word that has a rank is a token, however it came to be
    return made.to_str().encode()


def _read_ranks(name: str, data: bytes) -> dict[bytes, int]:
    """Byte strings in the order of their ranks, which are their token ids."""
    found: dict[bytes, int] = {}
    try:
        for line in data.splitlines():
            if line:
                token, rank = line.split()
                found[base64.b64decode(token, validate=True)] = int(rank)
    except (ValueError, binascii.Error) as e:
        raise TextError(
            f"{name}: line {len(found) + 1} is not a token in base64 and its rank ({e}). "
            "Download the file again."
        ) from e
    if list(found.values()) != list(range(len(found))) or not found:
        raise TextError(
            f"{name}: ranks are not 0 to {len(found) - 1} in order, each of another token. "
            "Download the file again."
        )
    return found


def _halves(token: bytes, rank_of: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """All two tokens that become this one: tiktoken joins any neighbours that are a token."""
    found = [
        (token[:cut], token[cut:])
        for cut in range(1, len(token))
        if token[:cut] in rank_of and token[cut:] in rank_of
    ]
    return sorted(found, key=lambda pair: (rank_of[pair[0]], rank_of[pair[1]]))


def _spelling() -> dict[int, str]:
    """A printable character for each byte, as byte-level vocabularies write them (GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


# --- both


def _name(tokens: list[str], kinds: list[int], token_id: int, token: str, kind: int) -> None:
    """Call one as the config does, whatever the vocabulary called it: a reserved token may have
    become a chat's mark. Between those that have names some have none, and are never written.
    """
    while len(tokens) <= token_id:
        tokens.append(f"<|reserved_token_{len(tokens)}|>")
        kinds.append(_CONTROL)
    tokens[token_id], kinds[token_id] = token, kind


def _built(values: Mapping[str, Any]) -> Tokenizer:
    """As of a GGUF file that holds the same."""
    # Those who only ask which files there may be do not wait for the gguf package.
    from lowmoe.families.gguf import gguf_small_file

    keyed = {f"tokenizer.ggml.{key}": value for key, value in values.items()}
    data = gguf_small_file(keyed, _JSON)
    assert data is not None
    return Tokenizer.from_buffer(data)


def _config(read: Read) -> Mapping[str, Any]:
    try:
        config = json.loads(read(_CONFIG) or b"{}")
    except (ValueError, RecursionError) as e:
        raise TextError(f"{_CONFIG} is not JSON ({e}). Download the file again.") from e
    return config if isinstance(config, dict) else {}


def _own_tokens(read: Read) -> dict[int, tuple[str, int]]:
    """Tokens that tokenizer_config.json lists by id, each with its kind."""
    listed = _config(read).get("added_tokens_decoder")
    found: dict[int, tuple[str, int]] = {}
    for token_id, entry in (listed if isinstance(listed, dict) else {}).items():
        content = entry.get("content") if isinstance(entry, dict) else None
        if not isinstance(content, str) or not content or not token_id.isdecimal():
            raise TextError(
                f"{_CONFIG}: added_tokens_decoder has {token_id!r}: {str(entry)[:80]}, but must "
                "give an id its token's content. Download the file again."
            )
        found[int(token_id)] = content, _CONTROL if entry.get("special") is True else _OWN
    return found


# A vocabulary goes on at its end; an id far beyond is damage, and would be filled up to.
_MOST_BEYOND = 4096


def _in_order(
    own: Mapping[int, tuple[str, int]], n_tokens: int
) -> list[tuple[int, tuple[str, int]]]:
    if own and max(own) >= n_tokens + _MOST_BEYOND:
        raise TextError(
            f"{_CONFIG}: added_tokens_decoder has the id {max(own)}, but the vocabulary {n_tokens} "
            "tokens. Are the files of one model?"
        )
    return sorted(own.items())
