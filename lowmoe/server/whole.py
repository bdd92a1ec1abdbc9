"""An answer put together from its events, for clients that take it in one piece.

Knows:        how events add up; which of them mean that there is no answer.
Ignorant of:  dialects, who waits for it.
"""

from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from dataclasses import dataclass, field

from lowmoe.server.asking import (
    CallArguments,
    CallBegan,
    ChosenToken,
    Ended,
    Event,
    Events,
    Failed,
    Overloaded,
    Reading,
    Text,
)


def require_going_on(event: Event) -> None:
    """Raise what ends all answers: a Failed's error, or that the server shuts down."""
    if isinstance(event, Failed):
        raise event.error
    if isinstance(event, Ended) and event.reason == "cancelled":
        raise Overloaded("the server shuts down. Ask again when it is back.")


async def told(events: Events) -> AsyncGenerator[Event, None]:
    """The events, until one means that there is no answer, which is raised.  Closes them."""
    async with aclosing(events):
        async for event in events:
            require_going_on(event)
            yield event


@dataclass(slots=True)
class WholeCall:
    """One call of a tool; json: all of its arguments."""

    id: str
    name: str
    json: str = ""


@dataclass(slots=True)
class WholeAnswer:
    """One answer.  tokens: of its text, if logprobs were asked for."""

    text: str = ""
    thinking: str = ""
    tokens: list[ChosenToken] = field(default_factory=list)
    calls: list[WholeCall] = field(default_factory=list)
    _ended: Ended | None = None

    @property
    def ended(self) -> Ended:
        """How it ended."""
        assert self._ended is not None
        return self._ended

    def add(self, event: Text | CallBegan | CallArguments | Ended) -> None:
        """Take the next event of this answer."""
        match event:
            case Text(kind="answer"):
                self.text += event.text
                self.tokens += event.tokens
            case Text():
                self.thinking += event.text
            case CallBegan():
                self.calls.append(WholeCall(event.id, event.name))
            case CallArguments():
                self.calls[event.call].json += event.json
            case Ended():
                self._ended = event


def whole_answers(events: Iterable[Event], n: int) -> list[WholeAnswer]:
    """All n answers.  Raises as `require_going_on`."""
    answers = [WholeAnswer() for _ in range(n)]
    for event in events:
        require_going_on(event)
        assert not isinstance(event, Failed)
        if not isinstance(event, Reading):
            answers[event.answer].add(event)
    return answers
