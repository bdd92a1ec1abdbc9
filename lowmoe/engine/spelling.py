"""Tokens of one answer to text that is certain to stay, what of it is thinking and what are calls.

Knows:        unfinished characters, marks of thinking, calls, stop texts, and in which order they
              count: an answer's text ends at a stop text, neither a call nor its arguments do.
Ignorant of:  how tokens are chosen.
"""

import copy
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from lowmoe.engine.logprobs import ChosenToken
from lowmoe.engine.text import StopText, StreamingDetokenizer
from lowmoe.engine.text_parts import TextParts
from lowmoe.engine.thinking import Kind as TextKind
from lowmoe.engine.tool_calls.splitter import CallSplitter

# "call" is the name of a tool whose call begins, "arguments" more of the JSON of its arguments.
Kind: TypeAlias = Literal["answer", "thinking", "mark", "call", "arguments"]
Piece: TypeAlias = tuple[Kind, str]

# A template may open the model's thinking with its last tokens, by a tag of up to eight characters
# and blank lines, or by the head of a message.
N_PROMPT_END = 16


@dataclass(frozen=True, slots=True)
class Said:
    """A part of the text, all of one kind.  chosen: of the tokens that end in it, if it is asked
    how they were chosen.
    """

    kind: Kind
    text: str
    chosen: tuple[ChosenToken, ...] = ()


class Spelling:
    """What becomes readable with each token, and whether a stop text has come."""

    def __init__(
        self,
        text: TextParts,
        stops: Sequence[str],
        prompt_ids: Sequence[int],
        *,
        calls: CallSplitter | None = None,
    ) -> None:
        """calls: tells calls of tools from text, if any are offered."""
        self._tokenizer = text.tokenizer
        self._detokenizer = StreamingDetokenizer(text.tokenizer)
        self._stops = StopText(stops)
        self._waiting: deque[Said] = deque()  # what StopText holds back
        self._untold: tuple[ChosenToken, ...] = ()  # of tokens without text so far
        self._splitter = None if text.thinking is None else text.thinking.splitter()
        self._calls = calls
        self._controls = _controls(text, with_calls=calls is not None)
        self.kind: Kind = "answer"  # of what came last
        if self._splitter is not None:
            for token_id in prompt_ids[-N_PROMPT_END:]:
                for part, is_control in self._spelled(token_id):
                    self._splitter.prompt(part, control=is_control)
            self._splitter.prompt(self._detokenizer.flush(), control=False)

    @property
    def stop(self) -> str | None:
        """The stop text that has come."""
        return self._stops.found

    def push(self, token_id: int, chosen: ChosenToken | None = None) -> tuple[list[Said], bool]:
        """Take the next token.  chosen: what it was chosen as, to be told with its text."""
        if chosen is not None:
            self._untold += (chosen,)
        pieces: list[Piece] = []
        for part, is_control in self._spelled(token_id):
            pieces += self._split(part, control=is_control)
        return self._until_stop(self._told(pieces))

    def flush(self) -> tuple[list[Said], bool]:
        """What was held back, as the answer has ended."""
        pieces = self._split(self._detokenizer.flush(), control=False)
        if self._splitter is not None:
            pieces += self._without_calls(self._splitter.flush())
        if self._calls is not None:
            pieces += self._calls.flush()
        certain, stopped = self._until_stop(self._told(pieces))
        if stopped:
            return certain, True
        certain += self._released(self._stops.flush())
        if self._untold:  # of tokens that never had a text
            certain.append(Said(self.kind, "", self._untold))
            self._untold = ()
        return certain, False

    # --- for an answer that must have a form

    @property
    def may_answer(self) -> bool:
        """Whether the answer itself, not thinking, may begin with the next token."""
        return self._splitter is None or self._splitter.may_answer

    @property
    def opener(self) -> int | None:
        """While the answer may begin, the token that may come instead and begins thinking."""
        tag = None if self._splitter is None else self._splitter.opener
        return None if tag is None else self._tokenizer.token_id(tag)

    def begin_answer(self) -> None:
        """What comes is the answer to its last byte: a space at its beginning, a tag in it too."""
        if self._splitter is not None:
            self._splitter.begin_answer()
        self._detokenizer = StreamingDetokenizer(self._tokenizer, inside=True)

    def answers_with(self, text: str) -> bool:
        """Whether this text, of one token, would end the thinking and begin the answer too."""
        if self._splitter is None:
            return False
        pieces = copy.deepcopy(self._splitter).push(text, control=False)
        return any(kind == "answer" for kind, _ in pieces)

    # --- the parts of it

    def _spelled(self, token_id: int) -> list[tuple[str, bool]]:
        """Text, and whether it is a control token; the text before a control token apart."""
        if token_id in self._controls:
            return [(self._detokenizer.flush(), False), (self._controls[token_id], True)]
        return [(self._detokenizer.push(token_id), False)]

    def _split(self, text: str, *, control: bool) -> list[Piece]:
        if self._splitter is not None:
            return self._without_calls(self._splitter.push(text, control=control))
        return self._without_calls([("control" if control else "answer", text)] if text else [])

    def _without_calls(self, parts: Sequence[tuple[TextKind, str]]) -> list[Piece]:
        """What of the answer are calls; nothing of the model's thinking is."""
        pieces: list[Piece] = []
        for kind, text in parts:
            if kind == "thinking" or kind == "mark":
                pieces.append((kind, text))
            elif self._calls is not None:
                pieces += self._calls.push(text, control=kind == "control")
            elif kind == "answer":
                pieces.append((kind, text))
        return pieces

    def _told(self, pieces: list[Piece]) -> list[Said]:
        """The pieces, the last with what the tokens that end in it were chosen as."""
        said = [Said(kind, text) for kind, text in pieces]
        if said and self._untold:
            said[-1] = replace(said[-1], chosen=self._untold)
            self._untold = ()
        return said

    def _until_stop(self, pieces: list[Said]) -> tuple[list[Said], bool]:
        certain: list[Said] = []
        for piece in pieces:
            if piece.kind in ("call", "arguments"):
                certain += [*self._released(self._stops.flush()), piece]
                self.kind = piece.kind
                continue
            self._waiting.append(piece)
            passed, stopped = self._stops.push(piece.text)
            certain += self._released(passed)
            if stopped:
                return certain, True
        return certain, False

    def _released(self, text: str) -> list[Said]:
        """The text that StopText let through, which is what waited longest, by its kinds."""
        released: list[Said] = []
        n_chars = len(text)
        while n_chars:
            waiting = self._waiting.popleft()
            if len(waiting.text) > n_chars:
                released.append(Said(waiting.kind, waiting.text[:n_chars]))
                self._waiting.appendleft(replace(waiting, text=waiting.text[n_chars:]))
            else:
                released.append(waiting)
            n_chars -= len(released[-1].text)
            self.kind = waiting.kind
        return released


def _controls(text: TextParts, *, with_calls: bool) -> Mapping[int, str]:
    """The tokens that are told apart from text: those that decoding leaves out and that mark
    thinking; and all that mark calls.
    """
    names = () if text.thinking is None else text.thinking.controls
    ids = {text.tokenizer.token_id(name): name for name in names}
    found = {i: name for i, name in ids.items() if i is not None and text.tokenizer.is_silent(i)}
    if with_calls and text.tool_calls is not None:
        found |= {i: tag for tag, i in text.tool_calls.token_ids.items()}
    return found
