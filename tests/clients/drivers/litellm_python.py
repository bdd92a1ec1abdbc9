"""Drives LiteLLM."""

import asyncio
import os
from typing import Any

import harness
import litellm
from harness import GIRL, LONG, MODEL, N_LONG, N_TOKENS, SCHEMA, SEA, TOOL, refused, said

NAME = f"openai/{MODEL}"
exact = {"temperature": 0, "max_tokens": N_TOKENS, "num_retries": 0}


def models() -> list[str]:
    found = litellm.get_valid_models(
        check_provider_endpoint=True,
        custom_llm_provider="openai",
        api_base=os.environ["OPENAI_API_BASE"],  # which it reads for all else
    )
    return [name.removeprefix("openai/") for name in found]


def chat(text: str = GIRL) -> dict[str, Any]:
    made = litellm.completion(model=NAME, messages=said(text), **exact)
    return {
        "text": made.choices[0].message.content,
        "finish": made.choices[0].finish_reason,
        "n_new": made.usage.completion_tokens,
    }


def stream() -> dict[str, Any]:
    chunks = list(
        litellm.completion(
            model=NAME,
            messages=said(GIRL),
            stream=True,
            stream_options={"include_usage": True},
            **exact,
        )
    )
    told = [c.usage.completion_tokens for c in chunks if getattr(c, "usage", None)]
    pieces = [c.choices[0].delta.content for c in chunks if c.choices]
    return {"pieces": [p for p in pieces if p], "n_new": told[-1]}


def cancel() -> dict[str, Any]:
    async def first() -> dict[str, Any]:
        chunks = await litellm.acompletion(
            model=NAME, messages=said(LONG), max_tokens=N_LONG, stream=True
        )
        async for chunk in chunks:
            if piece := chunk.choices[0].delta.content:
                await chunks.aclose()
                return {"first": piece}
        raise AssertionError("nothing came")

    return asyncio.run(first())


def tools() -> dict[str, Any]:
    made = litellm.completion(
        model=NAME,
        messages=said(GIRL),
        tools=[{"type": "function", "function": TOOL}],
        tool_choice={"type": "function", "function": {"name": TOOL["name"]}},
    )
    (call,) = made.choices[0].message.tool_calls
    return {"name": call.function.name, "arguments": call.function.arguments}


def schema() -> str:
    form = {"type": "json_schema", "json_schema": {"name": "girl", "schema": SCHEMA}}
    made = litellm.completion(model=NAME, messages=said(GIRL), response_format=form)
    return made.choices[0].message.content


def two() -> list[str]:
    async def both() -> list[str]:
        asked = (
            litellm.acompletion(model=NAME, messages=said(text), **exact) for text in (GIRL, SEA)
        )
        return [made.choices[0].message.content for made in await asyncio.gather(*asked)]

    return asyncio.run(both())


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
            "error": lambda: refused(chat, litellm.BadRequestError),
            "two": two,
        }
    )
