"""One argument of a call written as in Python, as it comes.

Knows:        Python's strings, words and brackets; what models and templates get wrong of them.
Ignorant of:  whose argument it is, which type it should have.
"""

import re
from typing import Any

from lowmoe.engine.tool_calls.definitions import from_json, to_json
from lowmoe.engine.tool_calls.json_object import MAX_DEPTH

_WORDS = {"True": "true", "False": "false", "None": "null"}
_ESCAPE = re.compile(
    r"\\(?:[xuU]((?<=x)[0-9a-fA-F]{2}|(?<=u)[0-9a-fA-F]{4}"
    r"|(?<=U)(?:000[0-9a-fA-F]|0010)[0-9a-fA-F]{4})|(.))",
    re.DOTALL,
)
_ESCAPED = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "\n": ""} | {
    c: c for c in "\\'\"/"
}
_AFTER_STRING = ",)]}:"


class PythonValue:
    """Takes text up to the comma or the bracket after a value, neither of which is its own.

    A quote ends a string only where one may end, before such a sign: Llama 4's template escapes
    none within a string, and what a model saw in its prompt it writes.
    """

    def __init__(self) -> None:
        self.is_whole = False
        self.is_broken = False
        self._taken: list[str] = []
        self._json: list[str] = []
        self._n_open = 0  # brackets
        self._word: list[str] = []  # what stands outside of strings, between brackets and commas
        self._quote = ""  # of the string that is open
        self._string: list[str] = []
        self._n_string: int | None = None  # its length, if the latest quote was its end
        self._is_escaped = False

    def push(self, text: str) -> tuple[int, str]:
        """How many characters belong to the value, and nothing to write: that is `read`'s."""
        for n_taken, char in enumerate(text):
            self._take(char)
            if self.is_whole or self.is_broken:
                return n_taken, ""
            self._taken.append(char)
        return len(text), ""

    @property
    def text(self) -> str:
        """As it was written."""
        return "".join(self._taken).strip()

    def read(self) -> tuple[Any] | None:
        """The value, if it is one."""
        try:
            return (from_json("".join(self._json)),)
        except (ValueError, RecursionError):
            return None

    def _take(self, char: str) -> None:
        if self._quote and not self._is_after_string(char):
            self._string.append(char)
        elif char in "\"'" and not self._word:
            self._quote, self._string, self._n_string = char, [], None
        elif char in ",)" and not self._n_open:
            self._end_word("")
            self.is_whole = True
        elif char in "[{(]}),:":
            self._end_word(char)
            self._n_open += (char in "[{(") - (char in "]})")
            self.is_broken = not 0 <= self._n_open <= MAX_DEPTH
        elif self._word or not char.isspace():
            self._word.append(char)

    def _end_word(self, char: str) -> None:
        word = "".join(self._word).strip()
        self._json.append(_WORDS.get(word, word) + char)
        self._word = []

    def _is_after_string(self, char: str) -> bool:
        """Whether the string that is open ended before char."""
        if self._is_escaped:
            self._is_escaped = False
        elif char == "\\":
            self._is_escaped, self._n_string = True, None
        elif char == self._quote:
            self._n_string = len(self._string)
        elif self._n_string is not None and char in _AFTER_STRING:
            self._json.append(to_json(_unescaped("".join(self._string[: self._n_string]))))
            self._quote = ""
            return True
        elif not char.isspace():
            self._n_string = None
        return False


def _unescaped(text: str) -> str:
    if "\\" not in text:
        return text
    # JSON's escapes, which models write too, have two halves for some characters.
    utf16 = _ESCAPE.sub(_unescaped_one, text).encode("utf-16-le", "surrogatepass")
    return utf16.decode("utf-16-le", "surrogatepass")


def _unescaped_one(found: re.Match[str]) -> str:
    code, char = found.groups()
    # Python leaves what is no escape as it is.
    return chr(int(code, 16)) if code else _ESCAPED.get(char, found[0])
