"""Answers of /v1/messages, in pieces and whole.

Knows:        blocks, and the order in which a stream tells of them.
Ignorant of:  requests, HTTP, who answers.
"""

import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from pydantic_core import from_json

from lowmoe.server.anthropic.frames import frame
from lowmoe.server.asking import CallArguments, CallBegan, Ended, Event, Events, Reading, Text
from lowmoe.server.whole import WholeAnswer, WholeCall, told

_STOP_REASONS = {
    "end": "end_turn",
    "stop": "stop_sequence",
    "calls": "tool_use",
    "length": "max_tokens",
}


def whole_message(answer: WholeAnswer, model: str, *, show_thinking: bool) -> dict[str, Any]:
    """An answer in one object."""
    content: list[dict[str, Any]] = []
    if answer.thinking:
        content.append(_thinking(answer.thinking if show_thinking else ""))
    if answer.text:
        content.append({"type": "text", "text": answer.text})
    content += [_call(call) for call in answer.calls]
    ended = answer.ended
    usage = _usage(ended.n_prompt, ended.n_reused, ended)
    return {**_head(model), "content": content, **_stopped(ended), "usage": usage}


def _head(model: str) -> dict[str, Any]:
    identity = f"msg_{uuid.uuid4().hex}"
    return {"id": identity, "type": "message", "role": "assistant", "model": model}


def _thinking(text: str) -> dict[str, Any]:
    # Anthropic signs what its models thought, so that nobody changes it; here anybody may.
    return {"type": "thinking", "thinking": text, "signature": ""}


def _call(call: WholeCall) -> dict[str, Any]:
    # max_new_tokens may have cut it off; what there is of it is told.
    arguments = from_json(call.json or "{}", allow_partial=True)
    return {"type": "tool_use", "id": call.id, "name": call.name, "input": arguments}


def _stopped(ended: Ended) -> dict[str, Any]:
    return {"stop_reason": _STOP_REASONS[ended.reason], "stop_sequence": ended.stop}


def _usage(n_prompt: int, n_reused: int, ended: Ended | None = None) -> dict[str, Any]:
    n_new, n_thinking = (ended.n_new, ended.n_thinking) if ended else (0, 0)
    return {
        "input_tokens": n_prompt - n_reused,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": n_reused,
        "output_tokens": n_new,
        "output_tokens_details": {"thinking_tokens": n_thinking},
    }


async def message_frames(
    events: Events, model: str, *, show_thinking: bool
) -> AsyncGenerator[str, None]:
    """An answer as frames of a stream; closes the events.  Raises as `told`."""
    stream = _MessageStream(model, show_thinking)
    async with aclosing(told(events)) as going_on:
        async for event in going_on:
            for data in stream.see(event):
                yield frame(data)


@dataclass(slots=True)
class _MessageStream:
    """message_start; of each block its start, deltas and stop; message_delta, message_stop."""

    model: str
    show_thinking: bool
    _began: bool = False
    _index: int = -1
    _block: str | None = None  # the kind of the open block, or the call that it is

    def see(self, event: Event) -> Iterator[dict[str, Any]]:
        """What this event adds."""
        if not self._began:
            self._began = True
            yield self._start(event)
        match event:
            case Text(kind="thinking") if event.text:
                yield from self._open("thinking", _thinking(""))
                if self.show_thinking:
                    yield self._delta({"type": "thinking_delta", "thinking": event.text})
            case Text(kind="answer") if event.text:
                yield from self._open("text", {"type": "text", "text": ""})
                yield self._delta({"type": "text_delta", "text": event.text})
            case CallBegan():
                block = _call(WholeCall(event.id, event.name))
                yield from self._open(f"call {event.call}", block)
            case CallArguments():
                yield self._delta({"type": "input_json_delta", "partial_json": event.json})
            case Ended():
                yield from self._close()
                usage = _usage(event.n_prompt, event.n_reused, event)
                yield {"type": "message_delta", "delta": _stopped(event), "usage": usage}
                yield {"type": "message_stop"}

    def _start(self, first: Event) -> dict[str, Any]:
        reading = first if isinstance(first, Reading) else Reading(0, 0, 0)
        usage = _usage(reading.n_prompt, reading.n_reused)
        message = {**_head(self.model), "content": [], "usage": usage}
        return {
            "type": "message_start",
            "message": {**message, "stop_reason": None, "stop_sequence": None},
        }

    def _open(self, block: str, content: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if block == self._block:
            return
        yield from self._close()
        self._block = block
        self._index += 1
        yield {"type": "content_block_start", "index": self._index, "content_block": content}

    def _close(self) -> Iterator[dict[str, Any]]:
        if self._block is not None:
            self._block = None
            yield {"type": "content_block_stop", "index": self._index}

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}
