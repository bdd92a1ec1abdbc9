"""The text of an answer as a style reads it: waits for what has not come, gives back what is none.

Knows:        pieces of any size, tags that are tokens, what was read and may have to go back.
Ignorant of:  how any model writes a call.

A style reads by generators: what they yield are parts of the answer, None while more must come.
"""

import re
from collections.abc import Callable, Collection, Generator
from typing import Literal, Protocol, TypeAlias, TypeVar

# Text; the name of a tool whose call begins; more of its arguments' JSON.
PartKind: TypeAlias = Literal["answer", "call", "arguments"]
Part: TypeAlias = tuple[PartKind, str]

T = TypeVar("T")
Reading: TypeAlias = Generator[Part | None, None, T]

MAX_HEAD = 512  # characters before a call's arguments: a name, an id


class Scan(Protocol):
    """Finds the end of a value."""

    @property
    def is_whole(self) -> bool: ...

    @property
    def is_broken(self) -> bool: ...

    def push(self, text: str) -> tuple[int, str]:
        """How many characters belong to the value, and how they are to be written."""


class Reader:
    """tokens: the tags that count only as tokens; all others are looked for in the text."""

    def __init__(self, tokens: Collection[str]) -> None:
        self._tokens = tokens
        self._text = ""  # from where the latest part ended
        self._at = 0  # so much of it was read
        self._n_done = 0  # characters before it
        self._starts: list[int] = []  # of the tokens in it
        self.has_ended = False

    def push(self, text: str, *, is_token: bool) -> None:
        """More text, or a tag that came as one token."""
        if is_token:
            self._starts.append(len(self._text))
        self._text += text

    # --- what a style says of what it read

    def commit(self) -> None:
        """What was read is a call's, and not given back."""
        self._drop(self._at)

    def give_back(self, n_chars: int) -> Reading[None]:
        """What was read is none: its first n_chars are text, the others are read again."""
        text = self._text[:n_chars]
        self._drop(n_chars)
        self._at = 0
        if text:
            yield ("answer", text)

    def calls(self, *opens: str, read: Callable[[str], Reading[bool]]) -> Reading[None]:
        """Read to the end of the answer: text, and what `read` makes of what one of opens begins.

        read: takes what has begun; whether it came to its end. If it did not, and committed
        nothing, it was text.
        """
        while tag := (yield from self.text_until(*opens)):
            n_open, n_done = self._at, self._n_done
            if (yield from read(tag)):
                yield from self.blanks()
                self.commit()
            elif self._n_done == n_done:
                yield from self.give_back(n_open)
            else:
                self._at = 0

    def at_start(self, sign: str, *, read: Callable[[str], Reading[bool]]) -> Reading[None]:
        """Read what may begin the answer: it must begin with sign, which is not read."""
        yield from self.blanks()
        if (yield from self.expect(sign)):
            self._at -= len(sign)
            if (yield from read(sign)):
                yield from self.blanks()
                self.commit()
        self._at = 0

    # --- reading; all wait until they are certain

    def text_until(self, *tags: str) -> Reading[str]:
        """Pass text on up to the first of tags, which is read; "" if the text ends before one.

        Blanks before a tag are read with it.
        """
        while True:
            found = [(at, tag) for tag in tags if (at := self._find(tag)) >= 0]
            if found:
                at, tag = min(found, key=lambda pair: (pair[0], -len(pair[1])))
                yield from self.give_back(len(self._text[:at].rstrip()))
                self._at = len(self._text) - len(self._text.lstrip()) + len(tag)
                return tag
            if self.has_ended:
                yield from self.give_back(len(self._text))
                return ""
            yield from self.give_back(self._certain(tags))
            yield None

    def until(self, *ends: str, most: int | None = None) -> Reading[tuple[str, str] | None]:
        """What comes before the first of ends, and which it is, both read; None if none comes, or
        not within `most` characters.
        """
        while True:
            found = [(at, end) for end in ends if (at := self._find(end)) >= 0]
            at, end = min(found, key=lambda pair: (pair[0], -len(pair[1])), default=(-1, ""))
            so_far = (at if found else len(self._text)) - self._at
            if most is not None and so_far > most:
                return None
            if found:
                text = self._text[self._at : at]
                self._at = at + len(end)
                return text, end
            if self.has_ended:
                return None
            yield None

    def expect(self, *words: str) -> Reading[str]:
        """Read the first of words that comes next; "" if none does."""
        while True:
            rest = self._text[self._at :]
            for word in words:
                if self._is_here(word):
                    self._at += len(word)
                    return word
                if not self.has_ended and self._may_become(rest, word):
                    break
            else:
                return ""
            yield None

    def blanks(self) -> Reading[None]:
        """Read spaces and line breaks, if any come."""
        while True:
            rest = self._text[self._at :].lstrip()
            self._at = len(self._text) - len(rest)
            if rest or self.has_ended:
                return
            yield None

    def match(
        self, pattern: re.Pattern[str], *, most: int = MAX_HEAD
    ) -> Reading[re.Match[str] | None]:
        """Read what pattern matches here, which must look at what follows its match; None if it
        matches nothing within `most` characters.
        """
        while True:
            found = pattern.match(self._text, self._at)
            if found is not None and found.end() - self._at < most:
                self._at = found.end()
                return found
            if self.has_ended or len(self._text) - self._at > most:
                return None
            yield None

    def value(self, scan: Scan, *, kind: PartKind | None = None) -> Reading[bool]:
        """Read a value to its end, passing it on as parts of a kind; whether it came to one."""
        while True:
            n_taken, written = scan.push(self._text[self._at :])
            self._at += n_taken
            if kind is not None:
                self.commit()
                if written:
                    yield (kind, written)
            if scan.is_whole or scan.is_broken or self.has_ended:
                return scan.is_whole
            yield None

    def since(self, start: int) -> str:
        """What was read from `start` on."""
        return self._text[start : self._at]

    @property
    def at(self) -> int:
        """So much was read since the last commit."""
        return self._at

    @property
    def is_at_end(self) -> bool:
        """Whether the answer has ended with what was read."""
        return self.has_ended and self._at == len(self._text)

    def rewind(self, at: int) -> None:
        """Read again from there."""
        self._at = at

    # --- inside

    def _drop(self, n_chars: int) -> None:
        self._text, self._at = self._text[n_chars:], max(0, self._at - n_chars)
        self._n_done += n_chars
        self._starts = [start - n_chars for start in self._starts if start >= n_chars]

    def _find(self, tag: str) -> int:
        if tag not in self._tokens:
            return self._text.find(tag, self._at)
        at = (s for s in self._starts if s >= self._at and self._text.startswith(tag, s))
        return next(at, -1)

    def _is_here(self, word: str) -> bool:
        return self._text.startswith(word, self._at) and (
            word not in self._tokens or self._at in self._starts
        )

    def _may_become(self, text: str, word: str) -> bool:
        """Whether text, the last there is, may be the beginning of word."""
        return not text if word in self._tokens else word.startswith(text)

    def _certain(self, tags: Collection[str]) -> int:
        """How many characters belong neither to a tag that may come nor to the blanks before it."""
        n_held = max(
            n
            for tag in tags
            for n in range(len(tag))
            if n == 0 or (tag not in self._tokens and self._text.endswith(tag[:n]))
        )
        return len(self._text[: len(self._text) - n_held].rstrip())
