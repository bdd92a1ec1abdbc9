"""Tools through /v1/chat/completions, as OpenAI's own client offers them and reads their calls."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pydantic
import pytest

from lowmoe.engine.messages import Message, Tool, ToolCall, ToolChoice
from tests.server.fake_service import FakeService, calling, saying
from tests.server.openai_clients import HELLO, openai_client


class add(pydantic.BaseModel):
    """Adds two numbers."""

    a: int
    b: int


ADD = openai.pydantic_function_tool(add)
NOW: Any = {"type": "function", "function": {"name": "now"}}


@pytest.fixture(scope="module")
def service() -> FakeService:
    """Says "Hello world" to everything."""
    return FakeService()


@pytest.fixture(scope="module")
def client(service: FakeService) -> Iterator[openai.OpenAI]:
    """Talks with it."""
    with openai_client(service) as client:
        yield client


def test_tools_reach_the_model_as_they_are_described(
    client: openai.OpenAI, service: FakeService
) -> None:
    client.chat.completions.create(model="demo", messages=HELLO, tools=[ADD, NOW])
    first, second = service.asks[-1].tools
    assert (first.name, first.description) == ("add", "Adds two numbers.")
    assert first.parameters == ADD["function"]["parameters"]
    assert second == Tool(name="now")


@pytest.mark.parametrize(
    ("given", "choice"),
    [
        ({}, ToolChoice()),
        ({"tool_choice": "auto"}, ToolChoice()),
        ({"tool_choice": "none"}, ToolChoice(mode="none")),
        ({"tool_choice": "required"}, ToolChoice(mode="required")),
        (
            {"tool_choice": {"type": "function", "function": {"name": "now"}}},
            ToolChoice(mode="required", name="now", parallel=False),
        ),
        ({"parallel_tool_calls": False}, ToolChoice(parallel=False)),
    ],
)
def test_the_client_says_which_tool_must_be_called(
    client: openai.OpenAI, service: FakeService, given: dict[str, Any], choice: ToolChoice
) -> None:
    client.chat.completions.create(model="demo", messages=HELLO, tools=[ADD, NOW], **given)
    assert service.asks[-1].tool_choice == choice


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [ADD], "tool_choice": NOW}, "tool_choice"),
        ({"tools": [ADD], "tool_choice": "sometimes"}, "tool_choice.mode"),
        ({"tools": [ADD], "tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        ({"tools": [ADD, ADD]}, "tools"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools.0"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        ({"tools": [ADD], "response_format": {"type": "json_object"}}, "tools"),
    ],
)
def test_tools_that_make_no_sense_are_refused_by_their_field(
    client: openai.OpenAI, given: dict[str, Any], field: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="demo", messages=HELLO, **given)
    assert caught.value.param == field


def test_an_answer_of_some_form_may_know_tools_that_must_not_be_called(
    client: openai.OpenAI, service: FakeService
) -> None:
    client.chat.completions.create(
        model="demo",
        messages=HELLO,
        tools=[ADD],
        tool_choice="none",
        response_format={"type": "json_object"},
    )
    assert service.asks[-1].tools == ()
    assert service.asks[-1].constraint is not None


def test_calls_come_back_parsed_and_their_results_are_answered() -> None:
    calls = calling(("add", '{"a": 1, "b": 2}'), ("add", '{"a": 3, "b": 4}'), before="Let me see.")
    service = FakeService([calls, calls, saying("3 and 7")])
    with openai_client(service) as client:
        made = client.chat.completions.parse(model="demo", messages=HELLO, tools=[ADD])
        with client.chat.completions.stream(model="demo", messages=HELLO, tools=[ADD]) as stream:
            streamed = stream.get_final_completion()
        for one in (made, streamed):
            assert one.choices[0].finish_reason == "tool_calls"
            message = one.choices[0].message
            assert message.content == "Let me see."
            assert message.tool_calls is not None
            assert [call.id for call in message.tool_calls] == ["call_0", "call_1"]
            parsed = [call.function.parsed_arguments for call in message.tool_calls]
            assert parsed == [add(a=1, b=2), add(a=3, b=4)]
        results: Any = [
            {"role": "tool", "tool_call_id": call.id, "content": str(number)}
            for call, number in zip(made.choices[0].message.tool_calls or [], (3, 7), strict=True)
        ]
        # Both ways in which clients keep what was answered: the object itself, its fields.
        first = made.choices[0].message
        for kept in (first, first.to_dict()):
            said: Any = [*HELLO, kept, *results]
            client.chat.completions.create(model="demo", messages=said, tools=[ADD])
            assert service.asks[-1].prompt == (
                Message(role="user", content="Hi"),
                Message(
                    role="assistant",
                    content="Let me see.",
                    calls=(
                        ToolCall(id="call_0", name="add", arguments={"a": 1, "b": 2}),
                        ToolCall(id="call_1", name="add", arguments={"a": 3, "b": 4}),
                    ),
                ),
                Message(role="tool", content="3", call_id="call_0", name="add"),
                Message(role="tool", content="7", call_id="call_1", name="add"),
            )


def test_a_call_without_a_word_has_no_content() -> None:
    with openai_client(FakeService([calling(("now", "{}"))])) as client:
        made = client.chat.completions.create(model="demo", messages=HELLO, tools=[NOW])
    assert made.choices[0].message.content is None


def test_arguments_are_told_as_the_model_writes_them() -> None:
    service = FakeService([calling(("add", '{"a": 1, "b": 2}'))])
    with openai_client(service) as client:
        chunks = list(
            client.chat.completions.create(model="demo", messages=HELLO, tools=[ADD], stream=True)
        )
    deltas = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert deltas[0].to_dict() == {
        "index": 0,
        "id": "call_0",
        "type": "function",
        "function": {"name": "add", "arguments": ""},
    }
    assert all(delta.id is None and delta.index == 0 for delta in deltas[1:])
    pieces = [delta.function.arguments for delta in deltas if delta.function]
    assert pieces == ["", '{"a": 1,', ' "b": 2}']
    assert json.loads("".join(piece or "" for piece in pieces)) == {"a": 1, "b": 2}


@pytest.mark.parametrize(
    ("said", "field"),
    [
        ([{"role": "tool", "tool_call_id": "c1", "content": "2"}], "messages.0.tool_call_id"),
        ([{"role": "tool", "content": "2"}], "messages.0.tool_call_id"),
        (
            [{"role": "user", "content": "2", "tool_calls": [{"id": "c", "function": {}}]}],
            "messages.0.tool_calls.0.function.name",
        ),
        ([{"role": "assistant", "content": None}], "messages.0.content"),
        ([{"role": "assistant", "content": "", "function_call": {}}], "messages.0.function_call"),
        ([{"role": "function", "name": "now", "content": "2"}], "messages.0.role"),
    ],
)
def test_messages_that_do_not_belong_together_are_refused_by_their_number(
    client: openai.OpenAI, said: Any, field: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="demo", messages=said)
    assert caught.value.param == field


@pytest.mark.parametrize("arguments", ["{", "[]", "3", '{"a": NaN}', '{"a": "\\ud800"}', "[" * 999])
def test_arguments_that_are_no_json_object_are_refused(
    client: openai.OpenAI, arguments: str
) -> None:
    function = {"name": "add", "arguments": arguments}
    said: Any = [{"role": "assistant", "tool_calls": [{"id": "c", "function": function}]}]
    with pytest.raises(openai.BadRequestError, match="must be a JSON object") as caught:
        client.chat.completions.create(model="demo", messages=said)
    assert caught.value.param == "messages.0.tool_calls.0.function.arguments"
