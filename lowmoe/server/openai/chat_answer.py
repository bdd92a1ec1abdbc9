"""Answers of /v1/chat/completions, in pieces and whole.

Knows:        the shapes of chunks and of whole answers.
Ignorant of:  requests, HTTP, who answers.
"""

from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import aclosing
from typing import Any

from lowmoe.server.asking import (
    CallArguments,
    CallBegan,
    ChosenToken,
    Ended,
    Event,
    Events,
    Reading,
    Text,
)
from lowmoe.server.openai.answers import (
    DONE,
    Head,
    chances_of,
    finish_reason,
    progress,
    usage,
)
from lowmoe.server.sse import frame
from lowmoe.server.whole import WholeAnswer, WholeCall, told


def whole_chat(answers: list[WholeAnswer], model: str) -> dict[str, Any]:
    """All answers in one object."""
    head = Head(prefix="chatcmpl", object="chat.completion", model=model)
    choices = [
        {
            "index": index,
            "message": _message(answer),
            "logprobs": _logprobs(answer.tokens),
            "finish_reason": finish_reason(answer.ended),
        }
        for index, answer in enumerate(answers)
    ]
    return head.write(choices=choices, usage=usage([[answer.ended for answer in answers]]))


def _message(answer: WholeAnswer) -> dict[str, Any]:
    # A text that is not there is null only beside calls: clients take the length of others.
    content = answer.text if answer.text or not answer.calls else None
    message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
    if answer.thinking:
        message["reasoning_content"] = answer.thinking
    if answer.calls:
        message["tool_calls"] = [_call(call) for call in answer.calls]
    return message


def _call(call: WholeCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.json}
    return {"id": call.id, "type": "function", "function": function}


def _logprobs(tokens: Iterable[ChosenToken]) -> dict[str, Any] | None:
    chances = chances_of(tokens)
    return {"content": chances, "refusal": None} if chances else None


async def chat_frames(
    events: Events, model: str, *, n: int, include_usage: bool
) -> AsyncGenerator[str, None]:
    """All n answers as frames of a stream; closes the events.  Raises as `told`."""
    head = Head(prefix="chatcmpl", object="chat.completion.chunk", model=model)
    # Who asked for usage finds the field in every chunk, as OpenAI's are.
    others = {"usage": None} if include_usage else {}
    roles = [_choice(index, {"role": "assistant", "content": ""}) for index in range(n)]
    ends = []
    async with aclosing(told(events)) as going_on:
        async for event in going_on:
            if isinstance(event, Reading):
                yield progress(event)
                continue
            if isinstance(event, Ended):
                ends.append(event)
            # Every role first and in order: OpenAI's own client can take the answers in no other.
            for choice in [*roles, *_choices(event)]:
                yield frame(head.write(choices=[choice], **others))
            roles = []
    if include_usage:
        yield frame(head.write(choices=[], usage=usage([ends])))
    yield DONE


def _choices(event: Event) -> Iterator[dict[str, Any]]:
    """What one event adds."""
    match event:
        case Text(kind="answer") if event.text or event.tokens:
            yield _choice(event.answer, {"content": event.text}, _logprobs(event.tokens))
        case Text(kind="thinking") if event.text:
            yield _choice(event.answer, {"reasoning_content": event.text})
        case CallBegan():
            yield _choice(event.answer, {"tool_calls": [_began(event)]})
        case CallArguments():
            more = {"index": event.call, "function": {"arguments": event.json}}
            yield _choice(event.answer, {"tool_calls": [more]})
        case Ended():
            yield _choice(event.answer, {}, reason=finish_reason(event))


def _began(event: CallBegan) -> dict[str, Any]:
    return {"index": event.call, **_call(WholeCall(event.id, event.name))}


def _choice(
    index: int,
    delta: dict[str, Any],
    logprobs: dict[str, Any] | None = None,
    *,
    reason: str | None = None,
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
