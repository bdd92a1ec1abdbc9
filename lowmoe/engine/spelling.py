"""Tokens of one answer to text that is certain to stay, and what of it is thinking.

Knows:        unfinished characters, stop texts, marks of thinking, and in which order they count.
Ignorant of:  how tokens are chosen.
"""

from collections import deque
from collections.abc import Sequence

from lowmoe.engine.text import StopText, StreamingDetokenizer
from lowmoe.engine.text_parts import TextParts
from lowmoe.engine.thinking import Kind, Piece

# A template may open the model's thinking with its last tokens, by a tag of up to eight characters
# and blank lines, or by the head of a message.
N_PROMPT_END = 16


class Spelling:
    """What becomes readable with each token, and whether a stop text has come."""

    def __init__(self, text: TextParts, stops: Sequence[str], prompt_ids: Sequence[int]) -> None:
        self._detokenizer = StreamingDetokenizer(text.tokenizer)
        self._stops = StopText(stops)
        self._waiting: deque[Piece] = deque()  # what StopText holds back
        self._splitter = None if text.thinking is None else text.thinking.splitter()
        controls = () if text.thinking is None else text.thinking.controls
        ids = {text.tokenizer.token_id(control): control for control in controls}
        self._controls = {
            i: c for i, c in ids.items() if i is not None and text.tokenizer.is_silent(i)
        }
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
            pieces += self._splitter.flush()
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
        if self._splitter is None:
            return [("answer", text)] if text else []
        return list(self._splitter.push(text, control=control))

    def _until_stop(self, pieces: list[Piece]) -> tuple[list[Piece], bool]:
        certain: list[Piece] = []
        for kind, text in pieces:
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
