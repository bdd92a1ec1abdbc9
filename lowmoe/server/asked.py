"""One ask under way: its answers on the model's thread, its events on the event loop.

Knows:        which of its answers have begun, what their tokens are as events.
Ignorant of:  other asks, whose turn it is, how answers are decoded.
"""

import asyncio
import json
import math
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from lowmoe.engine.answer import Answer, EndReason, Token
from lowmoe.engine.forms import Form
from lowmoe.engine.messages import Tool
from lowmoe.engine.options import SamplingOptions
from lowmoe.errors import LowMoeError, UsageError
from lowmoe.server.asking import Ask, CallArguments, CallBegan, Ended, Event, Failed, Reading, Text
from lowmoe.server.outbox import MOST_WAITING, Outbox
from lowmoe.server.request_log import note

REASONS: dict[str, Literal["end", "stop", "length", "cancelled"]] = {
    "end": "end",
    "stop": "stop",
    "length": "length",
    "cancelled": "cancelled",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """An ask, ready for the model.  options: of each answer; form: that all of them must have."""

    prompt_ids: Sequence[int]
    options: Sequence[SamplingOptions]
    form: Form | None


class Asked:
    """prepared: set before anything begins."""

    prepared: Prepared

    def __init__(self, ask: Ask) -> None:
        self.ask = ask
        self.outbox = Outbox()
        self.cancelled = False
        self.told: list[Told] = []  # answers that have begun
        self.n_under_way = 0  # of them
        self.error: LowMoeError | None = None  # for which nothing more comes of it
        self._n_read = -1
        self._failure_told = False

    # --- on any thread

    def cancel(self) -> None:
        """End all of it within one token."""
        self.cancelled = True
        self.outbox.close()
        self.stop()

    def stop(self) -> None:
        """End those that have begun within one token, and tell so."""
        for told in list(self.told):
            told.answer.cancel()

    # --- on the model's thread

    @property
    def may_begin(self) -> bool:
        """Whether the next answer may: the others go on from what the first has read."""
        return self.error is None and (not self.told or self.told[0].is_read)

    def begun(self, answer: Answer) -> "Told":
        """The next answer has joined the others."""
        n_most_calls = math.inf if self.ask.tool_choice.parallel else 1
        told = Told(len(self.told), answer, n_most_calls=n_most_calls)
        self.told.append(told)
        if self.cancelled:  # meanwhile
            answer.cancel()
        self._tell_reading(told)
        return told

    def tell(self, told: "Told") -> None:
        """What came of this answer since the last time."""
        self._tell_reading(told)
        for event in told.events():
            if not self.outbox.put(event) and not self.cancelled:
                self.fail(
                    UsageError(
                        f"{MOST_WAITING} characters of the answer wait to be read, so it was ended."
                        " Read a stream as it comes."
                    )
                )
                return
        if told.answer.error is not None:
            self.fail(told.answer.error)

    def fail(self, error: LowMoeError) -> None:
        """Let nothing more come of it."""
        if self.error is None:
            self.error = error
            self.stop()

    def tell_end(self, told: "Told | None" = None) -> None:
        """That this answer has ended, or that all of it failed: when its place is free again, so
        that who hears it can ask anew.
        """
        if self.error is not None:
            if not self._failure_told:
                self._failure_told = True
                self.outbox.put_last(Failed(self.error))
        elif told is not None:
            self.outbox.put_last(told.ended())

    def _tell_reading(self, told: "Told") -> None:
        """Of the first answer, whose prompt is read before any other begins."""
        if told.number == 0 and self._n_read < told.answer.n_prompt:
            n_read = told.n_read
            if n_read != self._n_read:
                self._n_read = n_read
                answer = told.answer
                self.outbox.put(Reading(n_read, answer.n_prompt, answer.n_reused))


class Told:
    """One answer, and what of it was told.  n_most_calls: the answer ends before more of them."""

    def __init__(self, number: int, answer: Answer, *, n_most_calls: float = math.inf) -> None:
        self.number, self.answer, self._n_most_calls = number, answer, n_most_calls
        self._n_tokens = self._n_thinking = self._n_calls = 0
        self._kind: Literal["answer", "thinking"] | None = None  # of the text before
        self._mark = ""
        self._arguments = ""  # of the call that began last
        self._is_whole = True  # whether the arguments of every call came to their end

    @property
    def is_read(self) -> bool:
        """Whether its prompt is, or need not be any more."""
        return self.answer.n_new > 0 or self.has_ended

    @property
    def has_ended(self) -> bool:
        """Whether no more tokens come."""
        return self.answer.end is not None

    @property
    def outcome(self) -> str:
        """By what it ended, an end that is not told of among them."""
        end = self.answer.end or "cancelled"
        return self._reason(end) if end in REASONS else end

    @property
    def n_read(self) -> int:
        """So many of its prompt's tokens."""
        if self.answer.n_new:
            return self.answer.n_prompt
        return min(self.answer.conversation.n_tokens, self.answer.n_prompt)

    def events(self) -> Iterator[Event]:
        """Of the tokens since the last time."""
        for token in self.answer.take():
            yield from self._of_token(token)

    def ended(self) -> Ended:
        """Its end, once it has."""
        answer = self.answer
        assert answer.end is not None
        return Ended(
            answer=self.number,
            reason=self._reason(answer.end),
            stop=answer.stop_text,
            n_prompt=answer.n_prompt,
            n_reused=answer.n_reused,
            n_new=answer.n_new,
            n_thinking=self._n_thinking,
        )

    def _reason(self, end: EndReason) -> Literal["end", "stop", "calls", "length", "cancelled"]:
        has_called = self._n_calls > self._n_most_calls or (self._n_calls and end == "end")
        if not has_called:
            return REASONS[end]
        # Nobody had better make a call that broke off, however its client completes it.
        return "calls" if self._is_whole and _is_json(self._arguments) else "length"

    def _of_token(self, token: Token) -> Iterator[Event]:
        self._n_tokens += token.id is not None
        if token.kind in ("thinking", "mark") and self._kind != "answer":
            self._n_thinking = self._n_tokens
        if self._n_calls > self._n_most_calls:
            return
        match token.kind:
            case "mark":
                self._mark += token.text
            case "call":
                yield from self._call(token.text)
            case "arguments":
                self._arguments += token.text
                yield CallArguments(self.number, self._n_calls - 1, token.text)
            case "answer" | "thinking" as kind if token.text or token.chosen:
                # A mark belongs to neither of what it divides; two answers or two thoughts it keeps
                # apart.
                mark = self._mark if kind == self._kind else ""
                self._mark, self._kind = "", kind
                yield Text(self.number, kind, mark + token.text, token.chosen)

    def _call(self, name: str) -> Iterator[Event]:
        self._kind = "answer"
        self._n_calls += 1
        if self._n_calls > self._n_most_calls:
            self.answer.cancel()
            return
        if self._n_calls > 1:
            self._is_whole &= _is_json(self._arguments)
        self._arguments = ""
        # Nine letters and digits: some templates take no other.
        yield CallBegan(self.number, self._n_calls - 1, uuid.uuid4().hex[:9], name)


def _is_json(text: str) -> bool:
    try:
        json.loads(text or "{}")
    except ValueError:
        return False
    return True


def offered(ask: Ask) -> Sequence[Tool]:
    """The tools that its answers may call."""
    return () if ask.tool_choice.mode == "none" else ask.tools


class AskedEvents:
    """The events of one ask, as they come.  On the event loop.

    preparing: what has to be done first, None if it was; it raises what is wrong with the ask.
    """

    def __init__(
        self,
        asked: Asked,
        close: Callable[[Asked], None],
        preparing: "asyncio.Task[None] | None" = None,
    ) -> None:
        self._asked, self._close, self._preparing = asked, close, preparing
        self._here: deque[Event] = deque()
        self._n_left = asked.ask.n

    def __aiter__(self) -> "AskedEvents":
        return self

    async def __anext__(self) -> Event:
        if self._preparing is not None:
            # Shielded: who stops waiting closes the events, which is no reason to break off here.
            preparing, self._preparing = self._preparing, None
            try:
                await asyncio.shield(preparing)
            except LowMoeError:
                self._n_left = 0
                raise
        while self._n_left and not self._here:
            self._here = await self._asked.outbox.take()
        if not self._n_left:
            raise StopAsyncIteration
        event = self._here.popleft()
        if isinstance(event, Failed):
            self._n_left = 0
        elif isinstance(event, Ended):
            self._n_left -= 1
            note(_words(event))
        return event

    async def aclose(self) -> None:
        """Cancel what has not ended."""
        if self._n_left:
            self._n_left = 0
            note("the client went away")
        self._close(self._asked)


def _words(ended: Ended) -> str:
    return (
        f"{ended.n_prompt} tokens of prompt, {ended.n_reused} of them in the cache, "
        f"{ended.n_new} new: {ended.reason}"
    )
