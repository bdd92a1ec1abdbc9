"""Drives OpenAI's library for Python by its younger API, Responses."""

from typing import Any

import harness
import openai
from harness import GIRL, LONG, MODEL, N_LONG, N_TOKENS, SCHEMA, SEA, TOOL, refused, two_at_once

client = openai.OpenAI(max_retries=0)


def chat(text: str = GIRL) -> dict[str, Any]:
    made = client.responses.create(
        model=MODEL, input=text, max_output_tokens=N_TOKENS, temperature=0, store=False
    )
    return {
        "text": made.output_text,
        "finish": "length" if made.status == "incomplete" else "stop",
        "n_new": made.usage.output_tokens,
    }


def stream() -> dict[str, Any]:
    pieces, n_new = [], None
    for event in client.responses.create(
        model=MODEL,
        input=GIRL,
        max_output_tokens=N_TOKENS,
        temperature=0,
        stream=True,
        store=False,
    ):
        if event.type == "response.output_text.delta":
            pieces.append(event.delta)
        if event.type in ("response.completed", "response.incomplete"):
            n_new = event.response.usage.output_tokens
    return {"pieces": pieces, "n_new": n_new}


def cancel() -> dict[str, Any]:
    with client.responses.create(
        model=MODEL, input=LONG, max_output_tokens=N_LONG, stream=True, store=False
    ) as events:
        return {"first": next(e.delta for e in events if e.type == "response.output_text.delta")}


def tools() -> dict[str, Any]:
    made = client.responses.create(
        model=MODEL,
        input=GIRL,
        tools=[{"type": "function", "strict": True, **TOOL}],
        tool_choice={"type": "function", "name": TOOL["name"]},
        store=False,
    )
    (call,) = (item for item in made.output if item.type == "function_call")
    return {"name": call.name, "arguments": call.arguments}


def schema() -> str:
    form = {"type": "json_schema", "name": "girl", "schema": SCHEMA, "strict": True}
    made = client.responses.create(model=MODEL, input=GIRL, text={"format": form}, store=False)
    return made.output_text


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
