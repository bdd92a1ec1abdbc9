"""Answers of /v1/completions, in pieces and whole.

Knows:        the shapes of both, and of this path's own way to tell chances.
Ignorant of:  requests, HTTP, who answers.
"""

from collections import Counter
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from lowmoe.server.asking import ChosenToken, Ended, Event, Events, Reading, Text
from lowmoe.server.openai.answers import (
    DONE,
    Head,
    finish_reason,
    logprob,
    progress,
    usage,
)
from lowmoe.server.sse import frame
from lowmoe.server.whole import WholeAnswer, told


def all_as_answer(event: Event) -> Event:
    """This path knows no thinking: what goes on with a text is all of one kind."""
    return replace(event, kind="answer") if isinstance(event, Text) else event


def whole_completion(answers: Sequence[WholeAnswer], model: str, *, n: int) -> dict[str, Any]:
    """All answers in one object.  n: of each prompt."""
    head = Head(prefix="cmpl", object="text_completion", model=model)
    choices = [
        _choice(index, answer.text, _logprobs(answer.tokens, 0), finish_reason(answer.ended))
        for index, answer in enumerate(answers)
    ]
    return head.write(choices=choices, usage=_usage([answer.ended for answer in answers], n))


async def completion_frames(
    events: Events, model: str, *, n: int, include_usage: bool
) -> AsyncGenerator[str, None]:
    """All answers as frames of a stream; closes the events.  Raises as `told`.  n: of a prompt."""
    head = Head(prefix="cmpl", object="text_completion", model=model)
    others = {"usage": None} if include_usage else {}
    n_chars: Counter[int] = Counter()  # of each answer's tokens so far
    ends: list[Ended] = []
    async with aclosing(told(events)) as going_on:
        async for event in going_on:
            match event:
                case Reading():
                    yield progress(event)
                case Text() if event.text or event.tokens:
                    logprobs = _logprobs(event.tokens, n_chars[event.answer])
                    n_chars[event.answer] += _length(event.tokens)
                    choice = _choice(event.answer, event.text, logprobs, None)
                    yield frame(head.write(choices=[choice], **others))
                case Ended():
                    ends.append(event)
                    choice = _choice(event.answer, "", None, finish_reason(event))
                    yield frame(head.write(choices=[choice], **others))
    if include_usage:
        yield frame(head.write(choices=[], usage=_usage(ends, n)))
    yield DONE


def _usage(ends: Iterable[Ended], n: int) -> dict[str, Any]:
    in_order = sorted(ends, key=lambda ended: ended.answer)
    return usage([in_order[i : i + n] for i in range(0, len(in_order), n)])


def _choice(
    index: int, text: str, logprobs: dict[str, Any] | None, reason: str | None
) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}


def _length(tokens: Iterable[ChosenToken]) -> int:
    return sum(len(token.chance.text) for token in tokens)


def _logprobs(tokens: Sequence[ChosenToken], n_chars: int) -> dict[str, Any] | None:
    """n_chars: of the tokens before these."""
    if not tokens:
        return None
    offsets = [n_chars + _length(tokens[:i]) for i in range(len(tokens))]
    return {
        "tokens": [token.chance.text for token in tokens],
        "token_logprobs": [logprob(token.chance) for token in tokens],
        # Of tokens that are spelled alike the likeliest, which comes first, is told.
        "top_logprobs": [{o.text: logprob(o) for o in reversed(token.others)} for token in tokens],
        "text_offset": offsets,
    }
