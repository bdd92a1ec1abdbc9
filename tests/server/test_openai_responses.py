"""/v1/responses as OpenAI's own client sees it."""

import math
from collections.abc import Iterator
from typing import Any

import openai
import pydantic
import pytest

from lowmoe.engine.constraint import Constraint, JsonSchema
from lowmoe.engine.messages import Message, Tool, ToolCall, ToolChoice
from lowmoe.server.asking import Sampling, Text
from tests.server.fake_service import FakeService, calling, chosen, reading, saying
from tests.server.openai_clients import openai_client

ADD: Any = {
    "type": "function",
    "name": "add",
    "description": "Adds.",
    "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    "strict": True,
}


class Point(pydantic.BaseModel):
    """A place."""

    x: int
    y: int


@pytest.fixture(scope="module")
def service() -> FakeService:
    """Says "Hello world" to everything."""
    return FakeService()


@pytest.fixture(scope="module")
def client(service: FakeService) -> Iterator[openai.OpenAI]:
    """Talks with it."""
    with openai_client(service) as client:
        yield client


def test_a_response_arrives_whole(client: openai.OpenAI, service: FakeService) -> None:
    made = client.responses.create(
        model="demo",
        input="Hi",
        instructions="Be brief.",
        max_output_tokens=9,
        temperature=0,
        metadata={"a": "b"},
        store=True,
    )
    assert made.output_text == "Hello world"
    assert (made.status, made.error, made.incomplete_details) == ("completed", None, None)
    assert (made.instructions, made.max_output_tokens, made.temperature) == ("Be brief.", 9, 0)
    assert made.metadata == {"a": "b"}
    assert made.to_dict()["store"] is False
    assert made.usage is not None
    assert made.usage.to_dict() == {
        "input_tokens": 7,
        "input_tokens_details": {"cached_tokens": 3, "cache_write_tokens": 0},
        "output_tokens": 2,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 9,
    }
    assert service.asks[-1].prompt == (
        Message(role="system", content="Be brief."),
        Message(role="user", content="Hi"),
    )
    assert service.asks[-1].sampling == Sampling(temperature=0, max_new_tokens=9)


def test_a_response_is_told_event_by_event() -> None:
    script = [*reading(3, 7), *saying("Hel", "lo", thinking=["Hm", "."])]
    with openai_client(FakeService([script])) as client:
        events = list(client.responses.create(model="demo", input="Hi", stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))  # type: ignore[union-attr]
    # Source: the sequence that OpenAI's reference of streaming events gives for each kind of item.
    assert [event.type for event in events] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.reasoning_text.delta",
        "response.reasoning_text.delta",
        "response.reasoning_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]


def test_what_is_streamed_adds_up_to_the_response(client: openai.OpenAI) -> None:
    scripts = [saying("Hello", thinking=["Hm"]), calling(("add", '{"a": 1}'), before="Wait.")]
    with openai_client(FakeService([script for script in scripts for _ in "12"])) as client:
        for _ in scripts:
            made = client.responses.create(model="demo", input="Hi", tools=[ADD])
            with client.responses.stream(model="demo", input="Hi", tools=[ADD]) as stream:
                pieces: dict[int, str] = {}
                for event in stream:
                    if event.type.endswith(".delta"):
                        pieces.setdefault(event.output_index, "")  # type: ignore[union-attr]
                        pieces[event.output_index] += event.delta  # type: ignore[union-attr, operator]
                streamed = stream.get_final_response()
            assert told(streamed) == told(made)
            assert list(pieces.values()) == [text for _, text in told(made)]


def told(response: Any) -> list[tuple[str, str]]:
    """Each item's type and text."""
    texts = []
    for item in response.output:
        text = item.arguments if item.type == "function_call" else item.content[0].text
        texts.append((item.type, text))
    return texts


def test_thoughts_are_an_item_before_the_answer() -> None:
    with openai_client(FakeService([saying("4", thinking=["2 and", " 2"])])) as client:
        made = client.responses.create(model="demo", input="Hi", reasoning={"effort": "low"})
        summed: Any = client.responses.create(
            model="demo", input="Hi", reasoning={"summary": "auto"}
        )
        with client.responses.stream(
            model="demo", input="Hi", reasoning={"summary": "auto"}
        ) as stream:
            types = [event.type for event in stream]
            streamed: Any = stream.get_final_response()
    assert told(made) == [("reasoning", "2 and 2"), ("message", "4")]
    assert made.output_text == "4"
    for one in (summed, streamed):
        thought, answer = one.output
        assert thought.summary[0].text == "2 and 2"
        assert answer.content[0].text == "4"
    assert types[3:8] == [
        "response.reasoning_summary_part.added",
        "response.reasoning_summary_text.delta",
        "response.reasoning_summary_text.delta",
        "response.reasoning_summary_text.done",
        "response.reasoning_summary_part.done",
    ]


@pytest.mark.parametrize(
    ("given", "think"),
    [
        ({}, None),
        ({"reasoning": None}, None),
        ({"reasoning": {}}, None),
        ({"reasoning": {"effort": "none"}}, False),
        ({"reasoning": {"effort": "high", "summary": "auto"}}, True),
    ],
)
def test_a_model_thinks_if_it_is_told_to(
    client: openai.OpenAI, service: FakeService, given: dict[str, Any], think: bool | None
) -> None:
    client.responses.create(model="demo", input="Hi", **given)
    assert service.asks[-1].think is think


def test_an_answer_that_was_cut_is_incomplete() -> None:
    with openai_client(FakeService([saying("Hel", reason="length")])) as client:
        made = client.responses.create(model="demo", input="Hi")
        *_, done, last = client.responses.create(model="demo", input="Hi", stream=True)
    assert made.status == "incomplete"
    assert made.incomplete_details is not None
    assert made.incomplete_details.reason == "max_output_tokens"
    assert made.output[0].status == "incomplete"  # type: ignore[union-attr]
    assert last.type == "response.incomplete"
    assert done.type == "response.output_item.done"
    assert done.item.status == "incomplete"  # type: ignore[union-attr]


def test_calls_and_their_results_go_back_and_forth() -> None:
    first = [*saying(thinking=["Hm."])[:1], *calling(("add", '{"a": 1}'), ("add", '{"a": 2}'))]
    service = FakeService([first, saying("3")])
    with openai_client(service) as client:
        made = client.responses.create(model="demo", input="Hi", tools=[ADD])
        calls = [item for item in made.output if item.type == "function_call"]
        assert [(call.call_id, call.name) for call in calls] == [
            ("call_0", "add"),
            ("call_1", "add"),
        ]
        results = [
            {"type": "function_call_output", "call_id": call.call_id, "output": call.arguments}
            for call in calls
        ]
        said: Any = [{"role": "user", "content": "Hi"}, *made.output, *results]
        client.responses.create(model="demo", input=said, tools=[ADD])
    assert service.asks[0].tools == (
        Tool(name="add", description="Adds.", parameters=ADD["parameters"]),
    )
    assert service.asks[1].prompt == (
        Message(role="user", content="Hi"),
        Message(
            role="assistant",
            thinking="Hm.",
            calls=(
                ToolCall(id="call_0", name="add", arguments={"a": 1}),
                ToolCall(id="call_1", name="add", arguments={"a": 2}),
            ),
        ),
        Message(role="tool", content='{"a": 1}', call_id="call_0", name="add"),
        Message(role="tool", content='{"a": 2}', call_id="call_1", name="add"),
    )


def test_every_item_that_answers_have_can_be_sent_back() -> None:
    service = FakeService([saying("4", thinking=["Hm."])])
    with openai_client(service) as client:
        for summary in (None, "auto"):
            made = client.responses.create(
                model="demo", input="Hi", reasoning={"summary": summary}, include=None
            )
            for kept in (made.output, [item.to_dict() for item in made.output]):
                more: Any = [*kept, {"role": "user", "content": "Sure?"}]
                client.responses.create(model="demo", input=more)
                assert service.asks[-1].prompt == (
                    Message(role="assistant", content="4", thinking="Hm."),
                    Message(role="user", content="Sure?"),
                )


def test_input_of_a_coding_agent_is_understood(client: openai.OpenAI, service: FakeService) -> None:
    """As codex 0.169 sends it: parts, developer messages, ids of its own, nulls."""
    text = {"type": "input_text", "text": "List the files."}
    client.responses.create(
        model="demo",
        instructions="You are an agent.",
        input=[
            {"type": "message", "role": "developer", "content": [{**text, "text": "No root."}]},  # type: ignore[list-item]
            {"type": "message", "role": "user", "content": [text]},  # type: ignore[list-item]
            {
                "type": "reasoning",
                "id": "rs_1",
                "summary": [{"type": "summary_text", "text": "?"}],
                "content": None,  # type: ignore[typeddict-item]
                "encrypted_content": None,
            },
            {
                "type": "function_call",
                "name": "shell",
                "arguments": '{"command":["ls"]}',
                "call_id": "c1",
            },
            {"type": "function_call_output", "call_id": "c1", "output": [{**text, "text": "a"}]},  # type: ignore[list-item, typeddict-item]
            {
                "type": "message",
                "role": "assistant",
                "content": [{"type": "output_text", "text": "One: a"}],  # type: ignore[list-item]
            },
        ],
        tools=[{**ADD, "name": "shell"}],
        tool_choice="auto",
        parallel_tool_calls=False,
        reasoning={"effort": "medium", "summary": "auto"},
        store=False,
        include=["reasoning.encrypted_content"],
        prompt_cache_key="k",
        text={"verbosity": "medium"},
        extra_body={"client_metadata": {"session_id": "s"}},
    )
    ask = service.asks[-1]
    assert ask.tool_choice == ToolChoice(parallel=False)
    assert ask.prompt == (
        Message(role="system", content="You are an agent.\n\nNo root."),
        Message(role="user", content="List the files."),
        Message(
            role="assistant",
            thinking="?",
            calls=(ToolCall(id="c1", name="shell", arguments={"command": ["ls"]}),),
        ),
        Message(role="tool", content="a", call_id="c1", name="shell"),
        Message(role="assistant", content="One: a"),
    )


def test_functions_of_a_namespace_are_called_by_their_names_there() -> None:
    space = {"type": "namespace", "name": "files", "description": "Of files.", "tools": [ADD]}
    service = FakeService([calling(("files__add", "{}")), saying("Done")])
    with openai_client(service) as client:
        made: Any = client.responses.create(model="demo", input="Hi", tools=[space, ADD])  # type: ignore[list-item]
        (call,) = made.output
        assert (call.namespace, call.name) == ("files", "add")
        result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "3"}
        client.responses.create(model="demo", input=[call, result], tools=[space])  # type: ignore[list-item]
    assert [tool.name for tool in service.asks[0].tools] == ["files__add", "add"]
    assert service.asks[1].prompt == (
        Message(role="assistant", calls=(ToolCall(id="call_0", name="files__add", arguments={}),)),
        Message(role="tool", content="3", call_id="call_0", name="files__add"),
    )


def test_a_namespace_and_a_name_that_are_too_long_together_are_refused(
    client: openai.OpenAI,
) -> None:
    space = {"type": "namespace", "name": "n" * 125, "tools": [ADD]}
    with pytest.raises(openai.BadRequestError, match="a name of 130 characters, but 128") as caught:
        client.responses.create(model="demo", input="Hi", tools=[space])  # type: ignore[list-item]
    assert caught.value.param == "tools"


@pytest.mark.parametrize(
    ("choice", "asked"),
    [
        ("none", ToolChoice(mode="none")),
        ("required", ToolChoice(mode="required")),
        (
            {"type": "function", "name": "add"},
            ToolChoice(mode="required", name="add", parallel=False),
        ),
    ],
)
def test_the_client_says_which_tool_must_be_called(
    client: openai.OpenAI, service: FakeService, choice: Any, asked: ToolChoice
) -> None:
    made = client.responses.create(model="demo", input="Hi", tools=[ADD], tool_choice=choice)
    assert service.asks[-1].tool_choice == asked
    assert made.to_dict()["tool_choice"] == choice


def test_an_answer_is_parsed_as_the_type_that_was_asked_for() -> None:
    service = FakeService([saying('{"x": 1, ', '"y": 2}')])
    with openai_client(service) as client:
        made = client.responses.parse(model="demo", input="Hi", text_format=Point)
        with client.responses.stream(model="demo", input="Hi", text_format=Point) as stream:
            streamed = stream.get_final_response()
        more: Any = [*made.output, {"role": "user", "content": "Sure?"}]
        client.responses.create(model="demo", input=more)
    assert made.output_parsed == streamed.output_parsed == Point(x=1, y=2)
    constraint = service.asks[0].constraint
    assert isinstance(constraint, JsonSchema)
    assert constraint.schema["properties"].keys() == {"x", "y"}


@pytest.mark.parametrize(
    ("form", "constraint"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, JsonSchema({"type": "object"})),
        ({"type": "json_schema", "name": "n", "schema": {}}, JsonSchema({})),
    ],
)
def test_every_form_is_one_of_nobodys_dialect(
    client: openai.OpenAI, service: FakeService, form: Any, constraint: Constraint | None
) -> None:
    made = client.responses.create(model="demo", input="Hi", text={"format": form})
    assert service.asks[-1].constraint == constraint
    assert made.to_dict()["text"] == {"format": form}


def test_chances_stand_beside_their_tokens() -> None:
    token = chosen("Hé", -math.inf, [("Ho", -1.5)])
    script = [Text(0, "answer", "", [token]), Text(0, "answer", "Hé"), saying()[0]]
    service = FakeService([script])
    with openai_client(service) as client:
        made: Any = client.responses.create(
            model="demo", input="Hi", include=["message.output_text.logprobs"], top_logprobs=1
        )
        with client.responses.stream(model="demo", input="Hi", top_logprobs=1) as stream:
            streamed: Any = stream.get_final_response()
    assert [ask.n_logprobs for ask in service.asks] == [1, 1]
    for one in (made, streamed):
        (chance,) = one.output[0].content[0].logprobs
        assert chance.to_dict() == {
            "token": "Hé",
            "bytes": [72, 195, 169],
            "logprob": -9999.0,
            "top_logprobs": [{"token": "Ho", "bytes": [72, 111], "logprob": -1.5}],
        }


def test_the_tokens_of_an_input_are_counted(client: openai.OpenAI, service: FakeService) -> None:
    counted = client.responses.input_tokens.count(
        model="demo", input="Hi", instructions="Be brief.", tools=[ADD]
    )
    assert counted.input_tokens == 7
    assert service.counted[-1].prompt[0] == Message(role="system", content="Be brief.")
    assert service.counted[-1].tools[0].name == "add"


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "c"}, "conversation"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"max_tool_calls": 1}, "max_tool_calls"),
        ({"include": ["web_search_call.results"]}, "include.0"),
        ({"tools": [{"type": "web_search"}]}, "tools.0"),
        ({"tools": [ADD, ADD]}, "tools"),
        ({"tool_choice": {"type": "file_search"}}, "tool_choice"),
        ({"tools": [ADD], "text": {"format": {"type": "json_object"}}}, "tools"),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"input": []}, "input"),
        ({"input": 3}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0"),
        (
            {"input": [{"type": "function_call_output", "call_id": "c", "output": ""}]},
            "input.0.call_id",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input.0.message.content",
        ),
        (
            {"input": [{"type": "reasoning", "summary": [], "encrypted_content": "x"}]},
            "input.0.reasoning.encrypted_content",
        ),
        ({"stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
        ({"metadata": {"a": 1}}, "metadata.a"),
    ],
)
def test_what_is_not_supported_is_refused_by_its_name(
    client: openai.OpenAI, given: dict[str, Any], field: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model="demo", extra_body={"input": "Hi", **given})
    assert caught.value.param == field


def test_what_was_answered_is_not_kept(client: openai.OpenAI) -> None:
    made = client.responses.create(model="demo", input="Hi", store=True)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)
