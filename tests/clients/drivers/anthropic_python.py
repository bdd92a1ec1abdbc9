"""Drives Anthropic's library for Python."""

import json
from typing import Any

import anthropic
import harness
from harness import (
    GIRL,
    LONG,
    MODEL,
    N_LONG,
    N_TOKENS,
    SCHEMA,
    SEA,
    TOOL,
    refused,
    said,
    two_at_once,
)

client = anthropic.Anthropic(max_retries=0)
EXACT = {"temperature": 0}  # which the library has no argument for any more


def chat(text: str = GIRL) -> dict[str, Any]:
    made = client.messages.create(
        model=MODEL, messages=said(text), max_tokens=N_TOKENS, extra_body=EXACT
    )
    return {
        "text": made.content[0].text,
        "finish": {"max_tokens": "length"}.get(made.stop_reason, "stop"),
        "n_new": made.usage.output_tokens,
    }


def stream() -> dict[str, Any]:
    with client.messages.stream(
        model=MODEL, messages=said(GIRL), max_tokens=N_TOKENS, extra_body=EXACT
    ) as events:
        pieces = list(events.text_stream)
        return {"pieces": pieces, "n_new": events.get_final_message().usage.output_tokens}


def cancel() -> dict[str, Any]:
    with client.messages.stream(model=MODEL, messages=said(LONG), max_tokens=N_LONG) as events:
        return {"first": next(iter(events.text_stream))}


def tools() -> dict[str, Any]:
    own = {
        "name": TOOL["name"],
        "description": TOOL["description"],
        "input_schema": TOOL["parameters"],
    }
    made = client.messages.create(
        model=MODEL,
        messages=said(GIRL),
        max_tokens=200,
        tools=[own],
        tool_choice={"type": "tool", "name": TOOL["name"]},
    )
    (call,) = (block for block in made.content if block.type == "tool_use")
    return {"name": call.name, "arguments": json.dumps(call.input)}


def schema() -> str:
    made = client.messages.create(
        model=MODEL,
        messages=said(GIRL),
        max_tokens=200,
        output_config={"format": {"type": "json_schema", "schema": SCHEMA}},
    )
    return made.content[0].text


if __name__ == "__main__":
    harness.drive(
        {
            "models": lambda: [model.id for model in client.models.list()],
            "chat": chat,
            "other": lambda: chat(SEA),
            "stream": stream,
            "cancel": cancel,
            "tools": tools,
            "schema": schema,
            "error": lambda: refused(chat, anthropic.BadRequestError),
            "two": lambda: two_at_once(chat),
        }
    )
