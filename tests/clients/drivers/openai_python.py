"""Drives OpenAI's library for Python."""

from typing import Any

import harness
import openai
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

client = openai.OpenAI(max_retries=0)  # all else from the environment


def chat(text: str = GIRL) -> dict[str, Any]:
    made = client.chat.completions.create(
        model=MODEL, messages=said(text), max_tokens=N_TOKENS, temperature=0
    )
    return {
        "text": made.choices[0].message.content,
        "finish": made.choices[0].finish_reason,
        "n_new": made.usage.completion_tokens,
    }


def stream() -> dict[str, Any]:
    chunks = list(
        client.chat.completions.create(
            model=MODEL,
            messages=said(GIRL),
            max_tokens=N_TOKENS,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    pieces = [c.choices[0].delta.content for c in chunks if c.choices]
    return {"pieces": [p for p in pieces if p], "n_new": chunks[-1].usage.completion_tokens}


def cancel() -> dict[str, Any]:
    with client.chat.completions.create(
        model=MODEL, messages=said(LONG), max_tokens=N_LONG, stream=True
    ) as chunks:
        pieces = (c.choices[0].delta.content for c in chunks if c.choices)
        return {"first": next(piece for piece in pieces if piece)}


def tools() -> dict[str, Any]:
    made = client.chat.completions.create(
        model=MODEL,
        messages=said(GIRL),
        tools=[{"type": "function", "function": TOOL}],
        tool_choice={"type": "function", "function": {"name": TOOL["name"]}},
    )
    (call,) = made.choices[0].message.tool_calls
    return {"name": call.function.name, "arguments": call.function.arguments}


def schema() -> str:
    form = {"type": "json_schema", "json_schema": {"name": "girl", "schema": SCHEMA}}
    made = client.chat.completions.create(model=MODEL, messages=said(GIRL), response_format=form)
    return made.choices[0].message.content


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
            "error": lambda: refused(chat, openai.BadRequestError),
            "two": lambda: two_at_once(chat),
        }
    )
