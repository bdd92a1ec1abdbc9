"""One JSON object as it comes, character by character: is it one so far, and is it whole?

Knows:        JSON (RFC 8259), how deep it may be.
Ignorant of:  what the object is about.
"""

import json
import re
from collections.abc import Callable
from typing import TypeAlias

MAX_DEPTH = 64

_BLANK = " \t\n\r"
_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?", re.ASCII)
_NUMBER_SO_FAR = re.compile(r"-?((0|[1-9]\d*)(\.(\d+([eE][+-]?\d*)?)?|[eE][+-]?\d*)?)?", re.ASCII)
_WORDS = ("true", "false", "null")
_WORD_CHARS = frozenset("+-.0123456789abcdefghijklmnopqrstuvwxyzE")


_Step: TypeAlias = Callable[[str], str]


class JsonObject:
    """Takes text until an object is whole or can be none any more.

    Models break lines inside strings, which JSON must escape; that is mended, nothing else is.
    """

    def __init__(self) -> None:
        self.is_whole = False
        self.is_broken = False
        self._open: list[str] = []  # the brackets that are
        self._word = ""  # a number, true, false or null
        self._hex = 0  # digits of an escape that are missing
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
        if char == '"':
            self._step = after
        elif char == "\\":
            self._step = escape
        elif char < " ":
            return json.dumps(char)[1:-1]
        return char

    def _escape(self, char: str) -> str:
        return self._in_escape(char, self._string)

    def _escape_in_key(self, char: str) -> str:
        return self._in_escape(char, self._string_of_key)

    def _in_escape(self, char: str, back: _Step) -> str:
        if self._hex:
            if char not in "0123456789abcdefABCDEF":
                return self._break()
            self._hex -= 1
        elif char == "u":
            self._hex = 4
        elif char not in '"\\/bfnrt':
            return self._break()
        if not self._hex:
            self._step = back
        return char

    def _in_word(self, char: str) -> str:
        if char in _WORD_CHARS:
            self._word += char
            so_far = any(word.startswith(self._word) for word in _WORDS)
            return char if so_far or _NUMBER_SO_FAR.fullmatch(self._word) else self._break()
        if self._word not in _WORDS and not _NUMBER.fullmatch(self._word):
            return self._break()
        self._step = self._after
        return self._after(char)

    def _break(self) -> str:
        self.is_broken = True
        return ""
