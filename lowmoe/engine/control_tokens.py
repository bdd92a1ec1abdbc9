"""Keeps what people write from becoming the tokens that steer a conversation.

Knows:        which tokens steer it, who may write them.
Ignorant of:  how a chat template works, what roles mean to it.

A message that spells out `<|im_end|>` must not end its turn: it gets the tokens of these ten
characters, not the one that the template writes. So the spelling is put between two marks before
the template sees it, and encoded apart from the rest afterwards. So are the strings in calls,
results and definitions of tools; and a key there that would be one with a template's brackets.

Control tokens are the special ones, and of the other added ones those that the template mentions.
The assistant may write the latter itself: `</think>` in an earlier answer is the token it was.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lowmoe.engine.text import Tokenizer

# Two of Unicode's noncharacters, which mean nothing in any text. A user who writes them divides
# the text there and nothing else: a mark never turns text into a token.
_START = "\ufdd0"
_END = "\ufdd1"

# As templates write them that print a list or a mapping, or JSON in ASCII; a backslash before one
# makes it text.
_ESCAPED = re.compile(r"(?<!\\)((?:\\\\)*)\\u(fdd[01])")
_SPELLED_OUT = re.compile(r"\\(?=ufdd[01])")


class ControlTokens:
    """The control tokens of one tokenizer under one chat template."""

    def __init__(self, tokenizer: Tokenizer, *, template: str) -> None:
        added = tokenizer.added_tokens.items()
        special = [text for text, is_special in added if is_special]
        # Blank ones are runs of spaces or line breaks, which every text may hold.
        mentioned = [
            text
            for text, is_special in added
            if not is_special and text in template and not text.isspace()
        ]
        self._tokenizer = tokenizer
        self._of_assistant = _any_of(special)
        self._of_others = _any_of(special + mentioned)
        # Without their brackets, which templates put around keys.
        inner = {text[1:-1] for text in special + mentioned if len(text) > 2}
        self._bracketed = inner | {text.removeprefix("/") for text in inner}

    def text(self, text: str, *, by_assistant: bool = False) -> str:
        """Put each control token that this text must not write between the marks.

        Where it spells out a mark as a template may, it is divided, so that it stays what it is.
        """
        control = self._of_assistant if by_assistant else self._of_others
        marked = re.sub(control, rf"{_START}\g<0>{_END}", text)
        return _SPELLED_OUT.sub(rf"\g<0>{_END}", marked)

    def value(self, value: Any) -> Any:
        """Do so in every string of a mapping or list."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return {self._key(key): self.value(item) for key, item in value.items()}
        return [self.value(item) for item in value] if isinstance(value, list | tuple) else value

    def _key(self, key: str) -> str:
        # `<` + "|im_end|" + `>`, as templates write that make tags of keys.
        marked = self.text(key)
        return f"{_START}{marked}{_END}" if key in self._bracketed else marked

    def encode(self, text: str) -> list[int]:
        """Encode a rendered text: between the marks without control tokens, elsewhere with them.

        A mark that lost its partner, say because the template split a string, is left out but
        still divides the text: its two sides never join to a token.
        """
        marked = re.compile(f"{_START}({self._of_others}){_END}|[{_START}{_END}]")
        # re.split gives text, plain, text, plain, ..., text; plain is None at a lone mark.
        first, *rest = marked.split(_ESCAPED.sub(_as_mark, text))
        ids = self._tokenizer.encode(first, add_special=False)
        # Slow, of a few tokens that a text may repeat a million times.
        encode_plain = functools.cache(self._tokenizer.encode_plain)
        for plain, following in zip(rest[::2], rest[1::2], strict=True):
            if plain:
                ids += encode_plain(plain)
            if following:
                ids += self._tokenizer.encode_continuation(following)
        return ids


class Unmarked:
    """Leaves everything as it is, for a text that people read."""

    def text(self, text: str, *, by_assistant: bool = False) -> str:
        """As it is."""
        return text

    def value(self, value: Any) -> Any:
        """As it is."""
        return value


def _as_mark(found: re.Match[str]) -> str:
    return found[1] + chr(int(found[2], 16))


def _any_of(tokens: Sequence[str]) -> str:
    """Write a pattern that matches any of tokens, the longest first; (?!) matches nothing."""
    return "|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)"
