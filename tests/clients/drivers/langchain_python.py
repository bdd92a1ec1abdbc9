"""Drives LangChain's class for OpenAI's API."""

import json
from typing import Any

import harness
import openai
from harness import GIRL, LONG, MODEL, N_LONG, N_TOKENS, SCHEMA, SEA, TOO_LONG, TOOL
from langchain_openai import ChatOpenAI

model = ChatOpenAI(model=MODEL, temperature=0, max_tokens=N_TOKENS, max_retries=0)
longer = ChatOpenAI(model=MODEL, max_tokens=N_LONG, max_retries=0)


def models() -> None:
    raise harness.Absent("lists no models")


def chat(text: str = GIRL) -> dict[str, Any]:
    made = model.invoke(text)
    return {
        "text": made.content,
        "finish": made.response_metadata["finish_reason"],
        "n_new": made.usage_metadata["output_tokens"],
    }


def stream() -> dict[str, Any]:
    chunks = list(model.stream(GIRL, stream_usage=True))
    told = [chunk.usage_metadata for chunk in chunks if chunk.usage_metadata]
    return {
        "pieces": [chunk.content for chunk in chunks if chunk.content],
        "n_new": told[-1]["output_tokens"],
    }


def cancel() -> dict[str, Any]:
    chunks = longer.stream(LONG)
    first = next(chunk.content for chunk in chunks if chunk.content)
    chunks.close()
    return {"first": first}


def tools() -> dict[str, Any]:
    bound = longer.bind_tools([{"type": "function", "function": TOOL}], tool_choice=TOOL["name"])
    (call,) = bound.invoke(GIRL).tool_calls
    return {"name": call["name"], "arguments": json.dumps(call["args"])}


def schema() -> str:
    titled = {"title": "girl", "description": "A girl.", **SCHEMA}
    return json.dumps(longer.with_structured_output(titled, method="json_schema").invoke(GIRL))


def error() -> dict[str, Any]:
    try:
        chat(TOO_LONG)
    except openai.BadRequestError as refused:
        return {"status": refused.status_code, "message": str(refused)}
    raise AssertionError("it was not refused")


def two() -> list[str]:
    return [made.content for made in model.batch([GIRL, SEA])]


if __name__ == "__main__":
    harness.drive(
        {
            "models": models,
            "chat": chat,
            "other": lambda: chat(SEA),
            "stream": stream,
            "cancel": cancel,
            "tools": tools,
            "schema": schema,
            "error": error,
            "two": two,
        }
    )
