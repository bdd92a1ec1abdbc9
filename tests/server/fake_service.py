"""Who answers in tests of the faces: says what it was told to say, when it may.

Knows:        a script for each ask; what was asked, and which asks were cancelled.
Ignorant of:  models, threads, the dialects of clients.
"""

import asyncio
import concurrent.futures
import queue
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from lowmoe.errors import LowMoeError
from lowmoe.server.asking import (
    Ask,
    CallArguments,
    CallBegan,
    ChosenToken,
    Ended,
    Event,
    ModelCard,
    Reading,
    Text,
    TokenChance,
)

DEMO_CARD = ModelCard(
    name="demo",
    created=1_700_000_000,
    n_context=4096,
    can_chat=True,
    can_call_tools=True,
    thinks=True,
)
N_PROMPT, N_REUSED = 7, 3  # what `saying` and `calling` count


class Gate:
    """Holds a script until a test opens it, from any thread.

    reached: done once a script waits here; `reached.result(timeout=5)` waits for that.
    """

    def __init__(self) -> None:
        self.reached: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._opened: concurrent.futures.Future[None] = concurrent.futures.Future()

    def open(self) -> None:
        """Let the script go on."""
        self._opened.set_result(None)

    async def passed(self) -> None:
        """Return once it is open."""
        if not self.reached.done():
            self.reached.set_result(None)
        # Shielded, so that a client who goes away does not close it to the others.
        await asyncio.shield(asyncio.wrap_future(self._opened))


# What comes of an ask, one after the other; an error is raised where it stands.
Script: TypeAlias = Sequence[Event | Gate | LowMoeError | RuntimeError]


def saying(
    *pieces: str,
    thinking: Sequence[str] = (),
    answer: int = 0,
    reason: Literal["end", "stop", "length", "cancelled"] = "end",
    stop: str | None = None,
    n_prompt: int = N_PROMPT,
    n_reused: int = N_REUSED,
) -> list[Event]:
    """One answer of these pieces, each a token, and its end."""
    return [
        *(Text(answer, "thinking", piece) for piece in thinking),
        *(Text(answer, "answer", piece) for piece in pieces),
        Ended(
            answer=answer,
            reason=reason,
            stop=stop,
            n_prompt=n_prompt,
            n_reused=n_reused,
            n_new=len(thinking) + len(pieces),
            n_thinking=len(thinking),
        ),
    ]


def calling(*calls: tuple[str, str], before: str = "", answer: int = 0) -> list[Event]:
    """One answer that calls tools, each (name, JSON of its arguments), which comes in two pieces.

    The id of call i is "call_i".
    """
    events: list[Event] = [Text(answer, "answer", before)] if before else []
    for index, (name, json) in enumerate(calls):
        half = len(json) // 2
        events.append(CallBegan(answer, index, f"call_{index}", name))
        events += [CallArguments(answer, index, part) for part in (json[:half], json[half:])]
    ended = Ended(
        answer=answer,
        reason="calls",
        n_prompt=N_PROMPT,
        n_reused=N_REUSED,
        n_new=10 * len(calls),
        n_thinking=0,
    )
    return [*events, ended]


def reading(*n_read: int, n_prompt: int = N_PROMPT, n_reused: int = N_REUSED) -> list[Event]:
    """A prompt that is read in these steps."""
    return [Reading(n, n_prompt, n_reused) for n in n_read]


def chosen(
    text: str, logprob: float = -0.25, others: Sequence[tuple[str, float]] = ()
) -> ChosenToken:
    """A token with its chance and those of others; its id is its text's length."""
    chances = [
        TokenChance(len(t), t, t.encode(), chance) for t, chance in ((text, logprob), *others)
    ]
    return ChosenToken(chances[0], chances[1:])


@dataclass(kw_only=True, eq=False)
class Tape:
    """What became of one ask.  ended: its script was played to the end; cancelled: it was closed
    before that.
    """

    ask: Ask
    ended: bool = False
    cancelled: bool = False


@dataclass(eq=False)
class FakeService:
    """Plays scripts: the first ask gets the first, the last is for all who come after.

    An error that stands first is raised by `ask` itself, before anything is told.
    tapes: of every ask, in order; cancelled: a queue of those that were closed before their end,
    `cancelled.get(timeout=5)` waits for one, from any thread.
    """

    scripts: Sequence[Script] = field(default_factory=lambda: [saying("Hello", " world")])
    model: ModelCard = DEMO_CARD
    n_prompt: int = N_PROMPT
    tapes: list[Tape] = field(default_factory=list)
    counted: list[Ask] = field(default_factory=list)
    cancelled: "queue.SimpleQueue[Tape]" = field(default_factory=queue.SimpleQueue)

    @property
    def asks(self) -> list[Ask]:
        """Everything that was asked."""
        return [tape.ask for tape in self.tapes]

    def ask(self, ask: Ask) -> "Playing":
        """Play the next script."""
        script = self.scripts[min(len(self.tapes), len(self.scripts) - 1)]
        self.tapes.append(Tape(ask=ask))
        if script and isinstance(script[0], Exception):
            raise script[0]
        return Playing(script, self.tapes[-1], self.cancelled)

    async def count_tokens(self, ask: Ask) -> int:
        """The number it was given, or the error that stands first."""
        self.counted.append(ask)
        script = self.scripts[0]
        if script and isinstance(script[0], Exception):
            raise script[0]
        return self.n_prompt


class Playing:
    """The events of one script; unlike a generator it knows that it is closed before it began."""

    def __init__(self, script: Script, tape: Tape, cancelled: "queue.SimpleQueue[Tape]") -> None:
        self._steps, self._tape, self._cancelled = list(script), tape, cancelled

    def __aiter__(self) -> "Playing":
        return self

    async def __anext__(self) -> Event:
        while self._steps:
            step = self._steps.pop(0)
            self._tape.ended = not self._steps
            if isinstance(step, Exception):
                raise step
            if not isinstance(step, Gate):
                return step
            self._tape.ended = False
            try:
                await step.passed()
            except asyncio.CancelledError:
                await self.aclose()
                raise
        self._tape.ended = True
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Be cancelled, unless everything was said or it was closed before."""
        self._steps.clear()
        if not self._tape.ended and not self._tape.cancelled:
            self._tape.cancelled = True
            self._cancelled.put(self._tape)
