"""The bytes that each token of a vocabulary writes.

Knows:        how a tokenizer.json spells bytes: GPT-2's letters, SentencePiece's pieces.
Ignorant of:  how a text becomes tokens, which tokens an answer may have.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lowmoe.engine.text import Tokenizer
from lowmoe.errors import TextError

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenBytes:
    """Of one tokenizer, as they stand inside a text: SentencePiece's first space is one.

    Raises TextError for a tokenizer whose tokens cannot be told one by one.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._read = _reader(tokenizer.decoder)

    def __getitem__(self, token_id: int) -> bytes:
        """b"" for an id that is no token's, a special token's name for one of these."""
        token = self._tokenizer.token(token_id)
        if token is None:
            return b""
        return token.encode() if self._tokenizer.is_silent(token_id) else self._read(token)


def _reader(decoder: Mapping[str, Any] | None) -> Callable[[str], bytes]:
    steps = _steps(decoder)
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return _byte_level()
    # What comes after the tokens were put together changes a whole text, at its beginning.
    alone = kinds.index("Fuse") if "Fuse" in kinds else len(kinds)
    spaces = [found for step in steps[:alone] if (found := _replaced(step)) is not None]
    if not spaces or any(
        _replaced(step) is None and step["type"] != "ByteFallback" for step in steps[:alone]
    ):
        raise TextError(
            f"tokenizer.json decodes by {', '.join(kinds) or 'nothing'}, but the bytes of single "
            "tokens are known of byte-level and SentencePiece's vocabularies only. Ask without "
            "logprobs and without a form that the answer must have."
        )
    return lambda token: _piece(token, spaces, fallback="ByteFallback" in kinds)


def _steps(decoder: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if decoder is None:
        return []
    if decoder["type"] == "Sequence":
        return [inner for step in decoder["decoders"] for inner in _steps(step)]
    return [decoder]


def _replaced(step: Mapping[str, Any]) -> tuple[str, str] | None:
    """What the step writes in place of what, everywhere in a token."""
    if step["type"] == "Metaspace":
        return step["replacement"], " "
    if step["type"] == "Replace" and "String" in step["pattern"]:
        return step["pattern"]["String"], step["content"]
    return None


def _piece(token: str, spaces: Sequence[tuple[str, str]], *, fallback: bool) -> bytes:
    if fallback and (byte := _BYTE.fullmatch(token)):
        return bytes.fromhex(byte[1])
    for old, new in spaces:
        token = token.replace(old, new)
    return token.encode()


def _byte_level() -> Callable[[str], bytes]:
    """A character for each byte, as GPT-2's vocabulary has them."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    bytes_of = {chr(byte): byte for byte in printable}
    bytes_of |= {chr(256 + i): byte for i, byte in enumerate(others)}

    def read(token: str) -> bytes:
        # A token with another character stands for itself, in the tokenizers library too.
        if all(char in bytes_of for char in token):
            return bytes(bytes_of[char] for char in token)
        return token.encode()

    return read
