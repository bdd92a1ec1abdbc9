"""The small files of a model, out of a GGUF file's header.

Knows:        llama.cpp's kinds of vocabularies, byte pairs and SentencePiece's, and of tokens.
Ignorant of:  how a tokenizer is used, what a chat template writes.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from lowmoe.errors import TextError
from lowmoe.families.gguf.splits import SPLITS, Split

_KEYS = "tokenizer.ggml."
_UNKNOWN, _CONTROL, _OWN, _BYTE = 2, 3, 4, 6  # kinds of tokens; 1 is the usual kind
_SPACE = "\u2581"  # what SentencePiece writes for one
MAX_PIECE = 1024  # characters, far above any vocabulary's; each is cut everywhere for its merges


def gguf_small_file(values: Mapping[str, Any], name: str) -> bytes | None:
    """What a file of this name would hold in a Hugging Face folder; None for nothing.

    values: of the header, by key.  Raises TextError for a vocabulary that is not implemented or
    damaged.
    """
    if name == "tokenizer.json" and _KEYS + "tokens" in values:
        return _tokenizer(values).to_str().encode()
    if name == "tokenizer_config.json" and _KEYS + "tokens" in values:
        roles = {role: _special(values, role) for role in ("bos", "eos")}
        return json.dumps({f"{r}_token": t for r, t in roles.items() if t is not None}).encode()
    template = values.get("tokenizer.chat_template")
    if name == "chat_template.jinja" and isinstance(template, str):
        return template.encode("utf-8", "surrogatepass")
    return None


def _tokenizer(values: Mapping[str, Any]) -> Tokenizer:
    kind = values.get(_KEYS + "model")
    tokens = list(_strings(values, "tokens"))
    if kind == "gpt2":
        split = _split(values)
        made, begins = _byte_pairs(values, tokens, split), split.begins
    elif kind == "llama":
        made, begins = _sentence_pieces(values, tokens), True
    else:
        raise TextError(
            f"GGUF: {_KEYS}model is {str(kind)[:40]!r}, but implemented are 'gpt2' (byte pairs) "
            "and 'llama' (SentencePiece). Give the model's Hugging Face files instead."
        )
    _add_own(made, values, tokens)
    _surround(made, values, begins)
    return made


def _split(values: Mapping[str, Any]) -> Split:
    name = values.get(_KEYS + "pre")
    if not isinstance(name, str) or name not in SPLITS:
        raise TextError(
            f"GGUF: {_KEYS}pre is {str(name)[:40]!r}, but implemented are {', '.join(SPLITS)}. A "
            "text would be cut otherwise than in training. Give the model's Hugging Face files "
            "instead."
        )
    return SPLITS[name]


def _byte_pairs(values: Mapping[str, Any], tokens: list[str], split: Split) -> Tokenizer:
    # A pair ends at a space after its first character, as a space itself is written otherwise.
    merges = [pair.partition(" ") for pair in _strings(values, "merges")]
    made = _built(
        dict(zip(tokens, range(len(tokens)), strict=True)),
        [(left, right) for left, _, right in merges],
        ignore_merges=split.whole_words,
    )
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(p), behavior="isolated") for p in split.patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    return made


def _sentence_pieces(values: Mapping[str, Any], tokens: list[str]) -> Tokenizer:
    vocabulary = dict(zip(tokens, range(len(tokens)), strict=True))
    kinds = _kinds(values, len(tokens))
    unknown = next((t for t, kind in zip(tokens, kinds, strict=True) if kind == _UNKNOWN), None)
    made = _built(
        vocabulary,
        _merges(vocabulary, _scores(values, len(tokens)), kinds),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=_BYTE in kinds,
    )
    prefixed = values.get(_KEYS + "add_space_prefix", True) is not False
    spaces = normalizers.Replace(" ", _SPACE)
    made.normalizer = (
        normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if prefixed else spaces
    )
    made.decoder = decoders.Sequence(
        [
            decoders.Replace(_SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if prefixed else []),
        ]
    )
    return made


def _built(vocabulary: dict[str, int], merges: list[tuple[str, str]], **how: Any) -> Tokenizer:
    try:
        return Tokenizer(models.BPE(vocabulary, merges, **how))
    except Exception as e:  # the library's own type of whatever is wrong with a vocabulary
        raise TextError(f"GGUF: the vocabulary cannot be used ({e}). Download it again.") from e


def _merges(
    vocabulary: Mapping[str, int], scores: Sequence[float], kinds: Sequence[int]
) -> list[tuple[str, str]]:
    """Pairs of pieces in the order in which SentencePiece joins them: by the whole's score."""
    found = []
    for piece, token_id in vocabulary.items():
        if kinds[token_id] in (_UNKNOWN, _CONTROL, _OWN, _BYTE):
            continue
        if len(piece) > MAX_PIECE:
            raise TextError(
                f"GGUF: a token has {len(piece)} characters, but at most {MAX_PIECE} are allowed. "
                "Download the file again."
            )
        for cut in range(1, len(piece)):
            left, right = vocabulary.get(piece[:cut]), vocabulary.get(piece[cut:])
            if left is not None and right is not None:
                found.append((-scores[token_id], left, right, piece[:cut], piece[cut:]))
    return [(left, right) for *_, left, right in sorted(found)]


def _add_own(made: Tokenizer, values: Mapping[str, Any], tokens: list[str]) -> None:
    """Tokens that are matched whole, whatever stands around them."""
    for token, kind in zip(tokens, _kinds(values, len(tokens)), strict=True):
        if kind in (_UNKNOWN, _CONTROL):
            made.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif kind == _OWN:
            made.add_tokens([AddedToken(token, special=False, normalized=False)])


def _surround(made: Tokenizer, values: Mapping[str, Any], begins: bool) -> None:
    """What a text begins and ends with."""
    ends = {"bos": begins, "eos": False}
    tokens = {
        role: _special(values, role)
        for role, usual in ends.items()
        if values.get(f"{_KEYS}add_{role}_token", usual) is True
    }
    found = {role: token for role, token in tokens.items() if token}
    if not found:
        return
    # By roles: a token's own name may hold what a template gives a meaning to, such as a colon.
    front, back = (role for role in ends)
    made.post_processor = processors.TemplateProcessing(
        single=[*([front] if front in found else []), "$A", *([back] if back in found else [])],
        pair=None,
        special_tokens=[
            {"id": role, "ids": [made.token_to_id(token)], "tokens": [token]}
            for role, token in found.items()
        ],
    )


def _special(values: Mapping[str, Any], role: str) -> str | None:
    token_id, tokens = values.get(f"{_KEYS}{role}_token_id"), _strings(values, "tokens")
    if type(token_id) is not int or not 0 <= token_id < len(tokens):
        return None
    return tokens[token_id]


def _strings(values: Mapping[str, Any], key: str) -> Sequence[str]:
    found = values.get(_KEYS + key)
    if not isinstance(found, Sequence) or isinstance(found, str):
        raise TextError(f"GGUF: {_KEYS}{key} is not a list of words. Download the file again.")
    return found


def _kinds(values: Mapping[str, Any], count: int) -> list[int]:
    found = _numbers(values, "token_type", count, 1)
    if not all(isinstance(kind, int) for kind in found):
        raise TextError(f"GGUF: {_KEYS}token_type has fractions. Download the file again.")
    return found


def _scores(values: Mapping[str, Any], count: int) -> list[float]:
    return [float(score) for score in _numbers(values, "scores", count, 0.0)]


def _numbers(values: Mapping[str, Any], key: str, count: int, usual: float) -> list[Any]:
    found = values.get(_KEYS + key)
    if found is None:
        return [usual] * count
    numbers = found.tolist() if hasattr(found, "tolist") else []
    if len(numbers) != count:
        raise TextError(
            f"GGUF: {_KEYS}{key} is not a list of {count} numbers, as many as there are tokens. "
            "Download the file again."
        )
    return list(numbers)
