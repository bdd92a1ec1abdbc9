"""Tokens of one answer to text that is certain to stay, what of it is thinking and what are calls.

Knows:        unfinished characters, marks of thinking, calls, stop texts, and in which order they
              count: an answer's text ends at a stop text, neither a call nor its arguments do.
Ignorant of:  how tokens are chosen.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

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
        self._detokenizer = StreamingDetokenizer(text.tokenizer)
        self._stops = StopText(stops)
        self._waiting: deque[Piece] = deque()  # what StopText holds back
        self._splitter = None if text.thinking is None else text.thinking.splitter()
        self._calls = calls
        self._controls = _controls(text, with_calls=calls is not None)
        self.kind: Kind = "answer"  # of what came last
        if self._splitter is not None:
            for token_id in prompt_ids[-N_PROMPT_END:]:
                for part, is_control in self._spelled(token_id):
                    self._splitter.prompt(part, control=is_control)
            self._splitter.prompt(self._detokenizer.flush(), control=False)

    def push(self, token_id: int) -> tuple[list[Piece], bool]:
        """Take the next token."""
        pieces: list[Piece] = []
        for part, is_control in self._spelled(token_id):
            pieces += self._split(part, control=is_control)
        return self._until_stop(pieces)

    def flush(self) -> tuple[list[Piece], bool]:
        """What was held back, as the answer has ended."""
        pieces = self._split(self._detokenizer.flush(), control=False)
        if self._splitter is not None:
            pieces += self._without_calls(self._splitter.flush())
        if self._calls is not None:
            pieces += self._calls.flush()
        certain, stopped = self._until_stop(pieces)
        return (
            (certain, True) if stopped else (certain + self._released(self._stops.flush()), False)
        )

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

    def _until_stop(self, pieces: list[Piece]) -> tuple[list[Piece], bool]:
        certain: list[Piece] = []
        for kind, text in pieces:
            if kind in ("call", "arguments"):
                certain += [*self._released(self._stops.flush()), (kind, text)]
                self.kind = kind
                continue
            self._waiting.append((kind, text))
            passed, stopped = self._stops.push(text)
            certain += self._released(passed)
            if stopped:
                return certain, True
        return certain, False

    def _released(self, text: str) -> list[Piece]:
        """The text that StopText let through, which is what waited longest, by its kinds."""
        released: list[Piece] = []
        n_chars = len(text)
        while n_chars:
            kind, waiting = self._waiting.popleft()
            released.append((kind, waiting[:n_chars]))
            if rest := waiting[n_chars:]:
                self._waiting.appendleft((kind, rest))
            n_chars -= len(released[-1][1])
            self.kind = kind
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
