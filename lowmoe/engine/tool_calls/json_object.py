"""One JSON object as it comes, character by character: is it one so far, and is it whole?

Knows:        JSON (RFC 8259), how deep it may be.
Ignorant of:  what the object is about.
"""

import json
import math
import re
from collections.abc import Callable
from typing import TypeAlias

MAX_DEPTH = 64

_BLANK = " \t\n\r"
_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?", re.ASCII)
_NUMBER_SO_FAR = re.compile(r"-?((0|[1-9]\d*)(\.(\d+([eE][+-]?\d*)?)?|[eE][+-]?\d*)?)?", re.ASCII)
_WORDS = ("true", "false", "null")
_HEX = "0123456789abcdefABCDEF"
_NO_CHARACTER = r"\ufffd"
_WORD_CHARS = frozenset("+-.0123456789abcdefghijklmnopqrstuvwxyzE")


_Step: TypeAlias = Callable[[str], str]


class JsonObject:
    """Takes text until an object is whole or can be none any more.

    Models break lines inside strings, which JSON must escape, and write half a surrogate pair,
    which many a reader refuses; that is mended, nothing else is. Nor is a number one beyond what
    a float holds: not every reader takes it.
    """

    def __init__(self) -> None:
        self.is_whole = False
        self.is_broken = False
        self._open: list[str] = []  # the brackets that are
        self._word = ""  # a number, true, false or null
        self._escaped = ""  # what came of an escape after its backslash
        self._half = ""  # the escape of the first half of a surrogate pair
        self._step: _Step = self._start

    def push(self, text: str) -> tuple[int, str]:
        """How many characters belong to the object, and how they are to be written."""
        written: list[str] = []
        for n_taken, char in enumerate(text):
            if self.is_whole or self.is_broken:
                return n_taken, "".join(written)
            mended = self._step(char)
            if self.is_broken:
                return n_taken, "".join(written)
            written.append(mended)
        return len(text), "".join(written)

    # --- one character each; they give what to write, and set what is to follow

    def _start(self, char: str) -> str:
        return self._begin(char) if char == "{" else self._break()

    def _value(self, char: str) -> str:
        if char in _BLANK:
            return char
        if char in "{[":
            return self._begin(char)
        if char == '"':
            self._step = self._string
        elif char in _WORD_CHARS:
            self._word, self._step = "", self._in_word
            return self._in_word(char)
        else:
            return self._break()
        return char

    def _begin(self, bracket: str) -> str:
        if len(self._open) == MAX_DEPTH:
            return self._break()
        self._open.append(bracket)
        self._step = self._first_key if bracket == "{" else self._first_item
        return bracket

    def _first_key(self, char: str) -> str:
        return self._end(char) if char == "}" else self._key(char)

    def _first_item(self, char: str) -> str:
        return self._end(char) if char == "]" else self._value(char)

    def _key(self, char: str) -> str:
        if char in _BLANK:
            return char
        if char != '"':
            return self._break()
        self._step = self._string_of_key
        return char

    def _colon(self, char: str) -> str:
        if char == ":":
            self._step = self._value
        elif char not in _BLANK:
            return self._break()
        return char

    def _after(self, char: str) -> str:
        if char in _BLANK:
            return char
        if char == ",":
            self._step = self._key if self._open[-1] == "{" else self._value
            return char
        return self._end(char)

    def _end(self, char: str) -> str:
        if char != {"{": "}", "[": "]"}[self._open[-1]]:
            return self._break()
        self._open.pop()
        self._step = self._after
        self.is_whole = not self._open
        return char

    def _string(self, char: str) -> str:
        return self._in_string(char, self._after, self._escape)

    def _string_of_key(self, char: str) -> str:
        return self._in_string(char, self._colon, self._escape_in_key)

    def _in_string(self, char: str, after: _Step, escape: _Step) -> str:
        if char == "\\":
            self._step = escape
            return ""
        before, self._half = _NO_CHARACTER if self._half else "", ""
        if char == '"':
            self._step = after
        return before + (json.dumps(char)[1:-1] if char < " " else char)

    def _escape(self, char: str) -> str:
        return self._in_escape(char, self._string)

    def _escape_in_key(self, char: str) -> str:
        return self._in_escape(char, self._string_of_key)

    def _in_escape(self, char: str, back: _Step) -> str:
        if char not in (_HEX if self._escaped else '"\\/bfnrtu'):
            return self._break()
        self._escaped += char
        if self._escaped.startswith("u") and len(self._escaped) < 5:
            return ""
        escaped, self._escaped, self._step = self._escaped, "", back
        return self._whole_escape(escaped)

    def _whole_escape(self, escaped: str) -> str:
        half, self._half = self._half, ""
        code = int(escaped[1:], 16) if escaped[0] == "u" else 0
        if half and 0xDC00 <= code < 0xE000:
            return f"{half}\\{escaped}"
        before = _NO_CHARACTER if half else ""
        if 0xD800 <= code < 0xDC00:
            self._half = f"\\{escaped}"
            return before
        return before + (_NO_CHARACTER if 0xDC00 <= code < 0xE000 else f"\\{escaped}")

    def _in_word(self, char: str) -> str:
        if char in _WORD_CHARS:
            self._word += char
            so_far = any(word.startswith(self._word) for word in _WORDS)
            return char if so_far or _is_number_so_far(self._word) else self._break()
        if self._word not in _WORDS and not _NUMBER.fullmatch(self._word):
            return self._break()
        self._step = self._after
        return self._after(char)

    def _break(self) -> str:
        self.is_broken = True
        return ""


def _is_number_so_far(word: str) -> bool:
    if _NUMBER.fullmatch(word):
        return math.isfinite(float(word))
    return _NUMBER_SO_FAR.fullmatch(word) is not None
