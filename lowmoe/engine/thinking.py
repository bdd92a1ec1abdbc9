"""Tells what a model thinks from what it answers.

Knows:        the tags and the channels by which models mark their thinking, pieces of them.
Ignorant of:  token ids, who is shown what.
"""

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

# A mark divides the other two and belongs to neither: a tag, blank lines beside it. A control is
# a token of the answer that writes nothing of its own and is none of thinking's; or TO_TOOL.
Kind: TypeAlias = Literal["answer", "thinking", "mark", "control"]
Piece: TypeAlias = tuple[Kind, str]

# Before the name of the tool that a message on a channel is for; a line break follows the name.
TO_TOOL = "to=functions."


class Splitter(Protocol):
    """Takes one answer as it comes, in pieces of any size, and says what each part of it is.

    control: the text is one token: of `Thinking.controls`, or of what else stands in the answer.
    """

    def prompt(self, text: str, *, control: bool) -> None:
        """Take what the answer follows; before any push."""

    def push(self, text: str, *, control: bool) -> Sequence[Piece]:
        """The parts that are certain now."""

    def flush(self) -> Sequence[Piece]:
        """Those that were held back, as the answer has ended."""

    @property
    def may_answer(self) -> bool:
        """Whether the answer may begin with the next token."""

    @property
    def opener(self) -> str | None:
        """While the answer may begin, the mark that may come instead."""

    def begin_answer(self) -> None:
        """All that comes is the answer, whatever it looks like."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Thinking:
    """How one model marks its thinking.

    controls: what its marks are spelled like where they are tokens of their own; channels: as
    gpt-oss does, else by tags; answer_tags: the answer stands between tags too.
    """

    controls: Collection[str]
    channels: bool = False
    answer_tags: bool = False

    def splitter(self) -> Splitter:
        """For one answer."""
        return _Channels() if self.channels else _Tags(_PAIRS[: 1 + self.answer_tags])


def thinking_of(template: str) -> Thinking | None:
    """How a model with this chat template marks its thinking; None for one that does not think.

    A template writes the marks, or takes them out of earlier answers.
    """
    if "<|channel|>" in template and "<|message|>" in template:
        return Thinking(controls=_OPENERS | _CLOSERS | {"<|message|>"}, channels=True)
    if _THINK.close in template:
        tags = {tag for pair in _PAIRS for tag in (pair.open, pair.close)}
        return Thinking(controls=tags, answer_tags=_ANSWER.close in template)
    return None


@dataclass(frozen=True, slots=True)
class _Pair:
    open: str
    close: str
    kind: Kind


_THINK = _Pair("<think>", "</think>", "thinking")
_ANSWER = _Pair("<answer>", "</answer>", "answer")  # Hunyuan-A13B
_PAIRS = (_THINK, _ANSWER)


class _Tags:
    """`<think>...</think>` before the answer. Only there: an answer may speak of these tags."""

    def __init__(self, pairs: Sequence[_Pair]) -> None:
        self._tags = {tag for pair in pairs for tag in (pair.open, pair.close)}
        self._pairs = deque(pairs)
        self._inside = False  # of the first pair
        self._blank = False  # all that came since the last tag
        self._prompt = self._held = ""

    def prompt(self, text: str, *, control: bool) -> None:
        # Many templates open the first tag themselves.
        self._prompt = (self._prompt + text).rstrip()
        if self._prompt.endswith(self._pairs[0].open):
            self._inside = self._blank = True
        elif text.strip():
            self._inside = self._blank = False

    def push(self, text: str, *, control: bool) -> Sequence[Piece]:
        if control and text not in self._tags:
            return self._foreign(text)
        pieces: list[Piece] = []
        self._held += text
        while self._held and self._next(pieces):
            pass
        return pieces

    def _foreign(self, token: str) -> Sequence[Piece]:
        """A token of somebody else's: the answer's, if the model is not thinking."""
        held = self.flush()
        if self._kind == "thinking":
            return [*held, ("thinking", token)]
        if not self._inside:
            self._pairs.clear()
        self._blank = False
        return [*held, ("control", token)]

    def flush(self) -> Sequence[Piece]:
        held, self._held = self._held, ""
        return [(self._kind, held)] if held else []

    @property
    def may_answer(self) -> bool:
        return self._kind == "answer" and not self._held.strip()

    @property
    def opener(self) -> str | None:
        if self._inside or not self._pairs or self._prompt.endswith(self._pairs[0].close):
            return None
        return self._pairs[0].open

    def begin_answer(self) -> None:
        self._pairs.clear()
        self._inside = self._blank = False

    @property
    def _kind(self) -> Kind:
        return self._pairs[0].kind if self._inside else "answer"

    def _next(self, pieces: list[Piece]) -> bool:
        """Move one part of the held text to pieces; whether another may follow."""
        if self._blank:
            self._blank = not self._held.strip()
            return self._take(pieces, "mark", len(self._held) - len(self._held.lstrip()))
        if not self._pairs:
            return self._take(pieces, "answer", len(self._held))
        return self._until_close(pieces) if self._inside else self._until_open(pieces)

    def _until_open(self, pieces: list[Piece]) -> bool:
        tag, text = self._pairs[0].open, self._held.lstrip()
        if text.startswith(tag):
            self._inside = self._blank = True
            return self._take(pieces, "mark", len(self._held) - len(text) + len(tag))
        if tag.startswith(text):
            return False
        self._pairs.clear()
        return True

    def _until_close(self, pieces: list[Piece]) -> bool:
        tag = self._pairs[0].close
        before, found, _ = self._held.partition(tag)
        if not found:
            n_held = next(n for n in range(len(tag), -1, -1) if before.endswith(tag[:n]))
            self._take(pieces, self._kind, len(before) - n_held)
            return False
        self._take(pieces, self._kind, len(before))
        self._take(pieces, "mark", len(tag))
        self._pairs.popleft()
        self._inside, self._blank = False, True
        return True

    def _take(self, pieces: list[Piece], kind: Kind, n_chars: int) -> bool:
        if n_chars:
            pieces.append((kind, self._held[:n_chars]))
            self._held = self._held[n_chars:]
        return True


_OPENERS = frozenset({"<|start|>", "<|channel|>"})  # of a message's head
_CLOSERS = frozenset({"<|end|>", "<|return|>", "<|call|>"})  # of its body


class _Channels:
    """Messages on channels: `<|channel|>analysis<|message|>...<|end|>` is thinking.

    Source: https://developers.openai.com/cookbook/articles/openai-harmony
    """

    def __init__(self) -> None:
        self._kind: Kind = "answer"
        self._head: str | None = None  # None in a body
        self._said = self._to_tool = False

    def prompt(self, text: str, *, control: bool) -> None:
        self.push(text, control=control)
        self._said = False

    def push(self, text: str, *, control: bool) -> Sequence[Piece]:
        if control:
            return self._control(text)
        if self._head is not None:
            self._head += text
            return []
        self._said = self._said or bool(text)
        return [(self._kind, text)] if text else []

    def flush(self) -> Sequence[Piece]:
        return []

    @property
    def may_answer(self) -> bool:
        return self._head is None and self._kind == "answer"

    @property
    def opener(self) -> str | None:
        return None

    def begin_answer(self) -> None:
        pass

    def _control(self, token: str) -> Sequence[Piece]:
        if token == "<|message|>" and self._head is not None:
            return self._begin(self._head)
        if token == "<|channel|>":
            self._head = (self._head or "") + token
        elif token in _OPENERS or token in _CLOSERS:
            self._head = ""
            if self._to_tool:
                self._to_tool = False
                return [("control", token)]
        return []

    def _begin(self, head: str) -> Sequence[Piece]:
        """head: "assistant to=functions.NAME<|channel|>CHANNEL <|constrain|>json", or less; the
        name may stand after the channel too.
        """
        self._head = None
        channel = head.rpartition("<|channel|>")[2].split()
        is_thinking = channel[:1] == ["analysis"]
        name = next((word for word in _words(head) if word.startswith(TO_TOOL)), None)
        self._kind = "thinking" if is_thinking and name is None else "answer"
        if name is not None:
            self._to_tool = True
            return [("control", name + "\n")]
        # What a head writes is no text to read, but two bodies must not run together.
        return [("mark", "\n\n")] if self._said else []


def _words(head: str) -> Sequence[str]:
    return head.replace("<|channel|>", " ").replace("<|constrain|>", " ").split()
