"""A response in the making: every event by which it is told, and what it is in the end.

Knows:        the order of a response's events, its states and how they come about.
Ignorant of:  a request's fields, HTTP, who answers.
"""

import time
from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import aclosing
from typing import Any

from lowmoe.server.asking import CallArguments, CallBegan, Ended, Event, Events, Reading, Text
from lowmoe.server.errors import Problem
from lowmoe.server.openai.answers import progress
from lowmoe.server.openai.errors import TOO_LONG
from lowmoe.server.openai.responses_output import (
    Calling,
    Happened,
    Item,
    Status,
    Writing,
    identity,
)
from lowmoe.server.openai.responses_request import ResponsesRequest
from lowmoe.server.sse import frame
from lowmoe.server.whole import require_going_on, told


class ResponseInTheMaking:
    """One response, streamed or whole."""

    def __init__(self, asked: ResponsesRequest, model: str) -> None:
        self._head = {"id": identity("resp"), "object": "response", "created_at": int(time.time())}
        self._repeated = {"model": model, **asked.repeated()}
        self._as_summary, self._names = asked.wants_summary, asked.names()
        self._done: list[dict[str, Any]] = []
        self._item: Writing | Calling | None = None  # the latest, if it is not done
        self._n_told = 0

    async def frames(self, events: Events) -> AsyncGenerator[str, None]:
        """All of it as frames of a stream; closes the events.  Raises as `told`."""
        async with aclosing(told(events)) as going_on:
            async for event in going_on:
                for happened in self._begin():
                    yield self._frame(*happened)
                if isinstance(event, Reading):
                    yield progress(event)
                for happened in self._take(event):
                    yield self._frame(*happened)

    def whole(self, events: Iterable[Event]) -> dict[str, Any]:
        """All of it in one object.  Raises as `require_going_on`."""
        last: dict[str, Any] = {}
        for event in events:
            require_going_on(event)
            for _, fields in self._take(event):
                last = fields
        response: dict[str, Any] = last["response"]
        return response

    def failed(self, problem: Problem) -> str:
        """The frames that end it where there is no more."""
        code = "server_error" if problem.status >= 500 else "invalid_prompt"
        code = TOO_LONG if problem.too_long else code
        error = {"code": code, "message": problem.message}
        begin = [self._frame(*happened) for happened in self._begin()]
        response = self._response("failed", error=error)
        return "".join([*begin, self._frame("failed", {"response": response})])

    def _begin(self) -> Iterator[Happened]:
        """What happens first, if nothing has."""
        if self._n_told == 0:
            for name in ("created", "in_progress"):
                yield name, {"response": self._response("in_progress")}

    def _take(self, event: Event) -> Iterator[Happened]:
        match event:
            case Text() if event.text or (event.tokens and event.kind == "answer"):
                of_answer = event.kind == "answer"
                item = self._item
                if not isinstance(item, Writing) or item.of_answer != of_answer:
                    index = self._next_index()
                    item = (
                        Writing.said(index)
                        if of_answer
                        else Writing.thought(index, as_summary=self._as_summary)
                    )
                    yield from self._add(item)
                yield from item.more(event.text, event.tokens)
            case CallBegan():
                call = Calling(self._next_index(), event.id, event.name, self._names)
                yield from self._add(call)
            case CallArguments():
                assert isinstance(self._item, Calling)
                yield from self._item.more(event.json)
            case Ended():
                yield from self._end(event)

    def _next_index(self) -> int:
        return len(self._done) + (self._item is not None)

    def _add(self, item: Writing | Calling) -> Iterator[Happened]:
        """Let it follow the item before it, which is done."""
        yield from self._finish("completed")
        self._item = item
        yield "output_item.added", _item_fields(item, "in_progress")
        yield from item.begin()

    def _finish(self, status: Status) -> Iterator[Happened]:
        if self._item is not None:
            yield from self._item.end()
            fields = _item_fields(self._item, status)
            self._done.append(fields["item"])
            self._item = None
            yield "output_item.done", fields

    def _end(self, ended: Ended) -> Iterator[Happened]:
        cut = ended.reason == "length"
        status: Status = "incomplete" if cut else "completed"
        yield from self._finish(status)
        details = {"reason": "max_output_tokens"} if cut else None
        yield status, {"response": self._response(status, ended=ended, details=details)}

    def _response(
        self,
        status: str,
        *,
        ended: Ended | None = None,
        details: dict[str, Any] | None = None,
        error: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        return {
            **self._head,
            "status": status,
            "completed_at": int(time.time()) if status == "completed" else None,
            "error": error,
            "incomplete_details": details,
            "output": list(self._done),
            "usage": None if ended is None else _usage(ended),
            **self._repeated,
        }

    def _frame(self, name: str, fields: dict[str, Any]) -> str:
        type_ = f"response.{name}"
        data = {"type": type_, "sequence_number": self._n_told, **fields}
        self._n_told += 1
        return frame(data, event=type_)


def _item_fields(item: Item, status: Status) -> dict[str, Any]:
    return {"output_index": item.index, "item": item.item(status)}


def _usage(ended: Ended) -> dict[str, Any]:
    # What OpenAI charges for writing into its cache, nobody does here.
    cached = {"cached_tokens": ended.n_reused, "cache_write_tokens": 0}
    return {
        "input_tokens": ended.n_prompt,
        "input_tokens_details": cached,
        "output_tokens": ended.n_new,
        "output_tokens_details": {"reasoning_tokens": ended.n_thinking},
        "total_tokens": ended.n_prompt + ended.n_new,
    }
