"""Drives Pydantic AI's agents."""

import asyncio
from typing import Annotated, Any, Literal

import harness
from harness import GIRL, LONG, MODEL, N_LONG, N_TOKENS, SEA, TOO_LONG, TOOL
from pydantic import BaseModel, Field
from pydantic_ai import Agent, ModelHTTPError, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel

model = OpenAIChatModel(MODEL)
exact = {"temperature": 0.0, "max_tokens": N_TOKENS}
agent: Agent[None, str] = Agent(model, model_settings=exact)  # type: ignore[call-overload]


class Weather(BaseModel):
    city: Literal["Paris", "Rome"]
    days: Annotated[int, Field(ge=1, le=3)]


class Girl(BaseModel):
    girl: Annotated[str, Field(max_length=12, pattern="^[A-Z][a-z]+$")]
    age: Annotated[int, Field(ge=3, le=12)]


def models() -> None:
    raise harness.Absent("lists no models")


def chat(text: str = GIRL) -> dict[str, Any]:
    made = agent.run_sync(text)
    return {
        "text": made.output,
        "finish": made.response.finish_reason,
        "n_new": made.usage.output_tokens,
    }


def stream() -> dict[str, Any]:
    async def all_of_it() -> dict[str, Any]:
        async with agent.run_stream(GIRL) as made:
            pieces = [piece async for piece in made.stream_text(delta=True, debounce_by=None)]
            return {"pieces": pieces, "n_new": made.usage.output_tokens}

    return asyncio.run(all_of_it())


def cancel() -> dict[str, Any]:
    async def first() -> dict[str, Any]:
        settings = {"max_tokens": N_LONG}
        async with Agent(model, model_settings=settings).run_stream(LONG) as made:  # type: ignore[call-overload]
            async for piece in made.stream_text(delta=True, debounce_by=None):
                await made.cancel()
                return {"first": piece}
        raise AssertionError("nothing came")

    return asyncio.run(first())


def tools() -> dict[str, Any]:
    forced = Agent(model, output_type=ToolOutput(Weather, name=TOOL["name"]))  # type: ignore[arg-type]
    return {"name": TOOL["name"], "arguments": forced.run_sync(GIRL).output.model_dump_json()}


def schema() -> str:
    return Agent(model, output_type=NativeOutput(Girl)).run_sync(GIRL).output.model_dump_json()


def error() -> dict[str, Any]:
    try:
        chat(TOO_LONG)
    except ModelHTTPError as refused:
        return {"status": refused.status_code, "message": str(refused.body)}
    raise AssertionError("it was not refused")


def two() -> list[str]:
    async def both() -> list[str]:
        made = await asyncio.gather(*(agent.run(text) for text in (GIRL, SEA)))
        return [one.output for one in made]

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
            "error": error,
            "two": two,
        }
    )
