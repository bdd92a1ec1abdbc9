"""/v1/chat/completions as OpenAI's own client sees it."""

import math
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from lowmoe.engine.messages import Message, ToolCall
from lowmoe.server.asking import Reading, Sampling, Text
from tests.server.fake_service import FakeService, Gate, chosen, reading, saying
from tests.server.openai_clients import HELLO, openai_client

USAGE = {
    "prompt_tokens": 7,
    "completion_tokens": 2,
    "total_tokens": 9,
    "prompt_tokens_details": {"cached_tokens": 3},
    "completion_tokens_details": {"reasoning_tokens": 0},
}


@pytest.fixture(scope="module")
def service() -> FakeService:
    """Says "Hello world" to everything."""
    return FakeService()


@pytest.fixture(scope="module")
def client(service: FakeService) -> Iterator[openai.OpenAI]:
    """Talks with it."""
    with openai_client(service) as client:
        yield client


def test_an_answer_arrives_whole(client: openai.OpenAI) -> None:
    made = client.chat.completions.create(model="demo", messages=HELLO)
    assert made.model == "demo"
    assert made.choices[0].message.content == "Hello world"
    assert made.choices[0].finish_reason == "stop"
    assert made.usage is not None
    assert made.usage.to_dict() == USAGE


def test_an_answer_arrives_in_pieces_as_they_come() -> None:
    gate = Gate()
    hello, world, ended = saying("Hello", " world")
    service = FakeService([[*reading(3, 7), hello, gate, world, ended]])
    with (
        openai_client(service) as client,
        client.chat.completions.create(
            model="demo", messages=HELLO, stream=True, stream_options={"include_usage": True}
        ) as stream,
    ):
        assert next(stream).choices[0].delta.role == "assistant"
        assert next(stream).choices[0].delta.content == "Hello"
        gate.open()  # had it not come, the client would have waited in vain
        assert next(stream).choices[0].delta.content == " world"
        last = next(stream)
        assert last.choices[0].finish_reason == "stop"
        assert last.usage is None
        costs = next(stream)
        assert costs.choices == []
        assert costs.usage is not None
        assert costs.usage.to_dict() == USAGE
        assert list(stream) == []


def test_usage_comes_only_to_who_asks_for_it(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(model="demo", messages=HELLO, stream=True)
    assert all("usage" not in chunk.to_dict() and chunk.choices for chunk in stream)


def test_the_first_bytes_come_before_the_prompt_is_read() -> None:
    gate = Gate()
    service = FakeService([[Reading(1, 7, 0), gate, *saying("Hello")]])
    with (
        openai_client(service) as client,
        client.chat.completions.with_streaming_response.create(
            model="demo", messages=HELLO, stream=True
        ) as response,
    ):
        lines = response.iter_lines()
        assert next(lines) == ": 1 of 7 tokens read"
        gate.open()
        assert list(lines)[-2] == "data: [DONE]"


@pytest.mark.parametrize(
    ("given", "sampling"),
    [
        ({}, Sampling()),
        ({"temperature": 0, "top_p": 0.5}, Sampling(temperature=0, top_p=0.5)),
        ({"max_tokens": 5}, Sampling(max_new_tokens=5)),
        ({"max_completion_tokens": 6, "max_tokens": 5}, Sampling(max_new_tokens=6)),
        ({"seed": 2**40}, Sampling(seed=2**40)),
        ({"stop": "x"}, Sampling(stop=("x",))),
        ({"stop": ["x", "\n\n"]}, Sampling(stop=("x", "\n\n"))),
        ({"stop": None, "temperature": None, "seed": None}, Sampling()),
        ({"extra_body": {"top_k": 40}}, Sampling(top_k=40)),
        ({"extra_body": {"top_k": -1}}, Sampling(top_k=0)),
        ({"extra_body": {"min_p": 0.1}}, Sampling(min_p=0.1)),
        ({"extra_body": {"repetition_penalty": 1.1}}, Sampling(repetition_penalty=1.1)),
    ],
)
def test_sampling_is_what_was_asked_for(
    client: openai.OpenAI, service: FakeService, given: dict[str, Any], sampling: Sampling
) -> None:
    client.chat.completions.create(model="demo", messages=HELLO, **given)
    assert service.asks[-1].sampling == sampling


@pytest.mark.parametrize(
    ("given", "think"),
    [
        ({}, None),
        ({"reasoning_effort": "none"}, False),
        ({"reasoning_effort": "low"}, True),
        ({"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}}, False),
        ({"extra_body": {"chat_template_kwargs": {"thinking": True}}}, True),
        ({"extra_body": {"chat_template_kwargs": {}}}, None),
    ],
)
def test_a_model_thinks_if_it_is_told_to(
    client: openai.OpenAI, service: FakeService, given: dict[str, Any], think: bool | None
) -> None:
    client.chat.completions.create(model="demo", messages=HELLO, **given)
    assert service.asks[-1].think is think


@pytest.mark.parametrize(
    "given",
    [
        {"user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "auto"},
        {"prompt_cache_key": "k", "safety_identifier": "s"},
        {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}},
        {"modalities": ["text"], "verbosity": "medium"},
        {"extra_body": {"functions": [], "function_call": None, "audio": None}},
    ],
)
def test_what_asks_for_nothing_is_accepted(client: openai.OpenAI, given: dict[str, Any]) -> None:
    assert client.chat.completions.create(model="demo", messages=HELLO, **given).choices


def test_messages_reach_the_model_turn_by_turn(client: openai.OpenAI, service: FakeService) -> None:
    text = {"type": "text", "text": "What is"}
    client.chat.completions.create(
        model="demo",
        messages=[
            {"role": "system", "content": "Be brief."},
            {"role": "developer", "content": "Be kind."},
            {"role": "user", "content": [text, {"type": "text", "text": " this?"}], "name": "ann"},
            {"role": "assistant", "content": "A test.", "reasoning_content": "Hm."},  # type: ignore[typeddict-unknown-key]
            {"role": "user", "content": ""},
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
            {"role": "developer", "content": "Go on."},
        ],
    )
    assert service.asks[-1].prompt == (
        Message(role="system", content="Be brief.\n\nBe kind."),
        Message(role="user", content="What is this?"),
        Message(role="assistant", content="A test.", thinking="Hm."),
        Message(role="user", content=""),
        Message(role="assistant", content="No."),
        Message(role="system", content="Go on."),
    )


def test_thoughts_have_a_field_of_their_own() -> None:
    service = FakeService([saying("4", thinking=["2 and", " 2"])])
    with openai_client(service) as client:
        made = client.chat.completions.create(model="demo", messages=HELLO)
        with client.chat.completions.stream(model="demo", messages=HELLO) as stream:
            streamed = stream.get_final_completion()
        pieces = [
            chunk.choices[0].delta.to_dict()
            for chunk in client.chat.completions.create(model="demo", messages=HELLO, stream=True)
        ]
    for one in (made.choices[0].message, streamed.choices[0].message):
        assert one.content == "4"
        assert one.to_dict()["reasoning_content"] == "2 and 2"
    assert pieces == [
        {"role": "assistant", "content": ""},
        {"reasoning_content": "2 and"},
        {"reasoning_content": " 2"},
        {"content": "4"},
        {},
    ]
    assert made.usage is not None
    assert made.usage.completion_tokens_details is not None
    assert made.usage.completion_tokens_details.reasoning_tokens == 2


def test_what_was_answered_can_be_sent_back_as_it_is() -> None:
    service = FakeService([saying("4", thinking=["2 and 2"])])
    with openai_client(service) as client:
        first = client.chat.completions.create(model="demo", messages=HELLO).choices[0].message
        more: Any = [*HELLO, first, {"role": "user", "content": "Sure?"}]
        client.chat.completions.create(model="demo", messages=more)
    assert service.asks[-1].prompt == (
        Message(role="user", content="Hi"),
        Message(role="assistant", content="4", thinking="2 and 2"),
        Message(role="user", content="Sure?"),
    )


@pytest.mark.parametrize(
    ("reason", "told"), [("end", "stop"), ("stop", "stop"), ("length", "length")]
)
def test_the_client_hears_why_an_answer_ended(reason: Any, told: str) -> None:
    with openai_client(FakeService([saying("Hello", reason=reason)])) as client:
        made = client.chat.completions.create(model="demo", messages=HELLO)
    assert made.choices[0].finish_reason == told


def test_several_answers_come_mixed_and_are_told_apart() -> None:
    a, b = saying("1", "2"), saying("3", answer=1, n_reused=7)
    service = FakeService([[b[0], a[0], a[1], b[1], a[2]]])
    with openai_client(service) as client:
        made = client.chat.completions.create(model="demo", messages=HELLO, n=2, seed=1)
        with client.chat.completions.stream(
            model="demo", messages=HELLO, n=2, stream_options={"include_usage": True}
        ) as stream:
            streamed = stream.get_final_completion()
    assert service.asks[0].n == 2
    for one in (made, streamed):
        assert [choice.index for choice in one.choices] == [0, 1]
        assert [choice.message.content for choice in one.choices] == ["12", "3"]
        assert one.usage is not None
        # The prompt counts once; what its own first answer left in the cache was not there before.
        assert one.usage.to_dict() == {
            **USAGE,
            "completion_tokens": 3,
            "total_tokens": 10,
        }


def test_chances_stand_beside_their_tokens() -> None:
    first = chosen("Hé", -0.5, [("Hé", -0.5), ("Ho", -1.5)])
    second = chosen("!", -math.inf)
    script = [Text(0, "thinking", "?", [chosen("?")]), Text(0, "answer", "", [first])]
    service = FakeService([[*script, Text(0, "answer", "Hé!", [second]), saying()[0]]])
    with openai_client(service) as client:
        made = client.chat.completions.create(
            model="demo", messages=HELLO, logprobs=True, top_logprobs=2
        )
        with client.chat.completions.stream(
            model="demo", messages=HELLO, logprobs=True, top_logprobs=2
        ) as stream:
            streamed = stream.get_final_completion()
    assert service.asks[0].n_logprobs == 2
    other = {"token": "Ho", "bytes": [72, 111], "logprob": -1.5}
    same = {"token": "Hé", "bytes": [72, 195, 169], "logprob": -0.5}
    for one in (made, streamed):
        logprobs = one.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.content is not None
        assert [token.to_dict() for token in logprobs.content] == [
            {**same, "top_logprobs": [same, other]},
            {"token": "!", "bytes": [33], "logprob": -9999.0, "top_logprobs": []},
        ]


def test_chances_alone_come_without_others(client: openai.OpenAI, service: FakeService) -> None:
    client.chat.completions.create(model="demo", messages=HELLO, logprobs=True)
    assert service.asks[-1].n_logprobs == 0
    client.chat.completions.create(model="demo", messages=HELLO)
    assert service.asks[-1].n_logprobs is None


def test_what_a_tool_gave_back_is_told_by_the_name_of_the_tool(
    client: openai.OpenAI, service: FakeService
) -> None:
    function = {"name": "add", "arguments": '{"a": 1}'}
    client.chat.completions.create(
        model="demo",
        messages=[
            *HELLO,
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "c1", "type": "function", "function": function}],
            },
            {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "2"}]},
        ],
    )
    assert service.asks[-1].prompt[1:] == (
        Message(role="assistant", calls=(ToolCall(id="c1", name="add", arguments={"a": 1}),)),
        Message(role="tool", content="2", call_id="c1", name="add"),
    )
