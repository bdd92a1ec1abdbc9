"""/v1/messages as Anthropic's own client sees it."""

import contextlib
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
from anthropic.types import Message as Answer

from lowmoe.engine.constraint import JsonSchema
from lowmoe.engine.messages import Message, Tool, ToolCall, ToolChoice
from lowmoe.server.anthropic.blocks import TurnFields, read_turns
from lowmoe.server.app import ServerOptions
from lowmoe.server.asking import Ask, CallArguments, CallBegan, Ended, Overloaded, Sampling
from tests.server.fake_service import FakeService, Script, calling, reading, saying
from tests.server.serving import serving

HELLO = [{"role": "user", "content": "Hi"}]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"name": "weather", "description": "Of a city.", "input_schema": SCHEMA}
CLOCK = {"name": "clock", "input_schema": {"type": "object"}}
CALL = {"type": "tool_use", "id": "call_0", "name": "weather", "input": {"city": "Ulm"}}


@contextlib.contextmanager
def client_of(service: FakeService) -> Iterator[anthropic.Anthropic]:
    """A client that tries once, and whatever comes back must have the shape of its own types."""
    with (
        serving(service, ServerOptions(api_key="a-key")) as url,
        anthropic.Anthropic(
            base_url=url,
            api_key="a-key",
            max_retries=0,
            timeout=10,
            _strict_response_validation=True,
        ) as client,
    ):
        yield client


def create(script: Script, **fields: Any) -> Answer:
    with client_of(FakeService([script])) as client:
        return client.messages.create(
            **{"model": "demo", "max_tokens": 9, "messages": HELLO} | fields
        )


def events(script: Script, **fields: Any) -> list[dict[str, Any]]:
    """Everything of a stream but pings, which the client drops."""
    with client_of(FakeService([script])) as client:
        asked = {"model": "demo", "max_tokens": 9, "messages": HELLO, "stream": True} | fields
        return [event.to_dict() for event in client.messages.create(**asked)]


def streamed(script: Script, **fields: Any) -> Answer:
    """What the client puts together from a stream."""
    with (
        client_of(FakeService([script])) as client,
        client.messages.stream(
            **{"model": "demo", "max_tokens": 9, "messages": HELLO} | fields
        ) as stream,
    ):
        return stream.get_final_message()


def asked(**fields: Any) -> Ask:
    """What the service is asked, which must be the same for the counting of its tokens."""
    service = FakeService()
    with client_of(service) as client:
        client.messages.create(**{"model": "demo", "max_tokens": 9, "messages": HELLO} | fields)
    return service.asks[0]


def refusal(**fields: Any) -> anthropic.APIStatusError:
    service = FakeService()
    with client_of(service) as client, pytest.raises(anthropic.APIStatusError) as caught:
        client.messages.create(**{"model": "demo", "max_tokens": 9, "messages": HELLO} | fields)
    assert service.asks == []
    return caught.value


SCRIPTS: dict[str, Script] = {
    "text": [*reading(3, 7), *saying("Hello", " world")],
    "thinking": [*reading(7), *saying("Hello", thinking=["Hm", "m."])],
    "a call": [*reading(7), *calling(("weather", '{"city": "Ulm"}'))],
    "text and calls": calling(
        ("weather", '{"city": "Ulm"}'), ("clock", "{}"), before="Let me see."
    ),
    "nothing": [*reading(7), *saying()],
    "a stop text": saying("Hello", reason="stop", stop="END"),
    "a length": saying("Hello", reason="length"),
}


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_a_streamed_answer_is_the_one_in_one_piece(script: Script) -> None:
    whole, pieces = create(script), streamed(script)

    assert whole.id.startswith("msg_")
    # The client adds fields that are None to what it puts together.
    told = [answer.model_dump(exclude_none=True, exclude={"id"}) for answer in (whole, pieces)]
    assert told[0] == told[1]


def test_an_answer_is_text_and_what_it_cost() -> None:
    answer = create(SCRIPTS["text"])

    assert (answer.type, answer.role, answer.model) == ("message", "assistant", "demo")
    assert [block.to_dict() for block in answer.content] == [
        {"type": "text", "text": "Hello world"}
    ]
    assert (answer.stop_reason, answer.stop_sequence) == ("end_turn", None)
    usage = answer.usage
    assert (usage.input_tokens, usage.cache_read_input_tokens, usage.output_tokens) == (4, 3, 2)


def test_why_an_answer_ended_is_told() -> None:
    assert create(SCRIPTS["a length"]).stop_reason == "max_tokens"
    assert create(SCRIPTS["a call"]).stop_reason == "tool_use"
    stopped = create(SCRIPTS["a stop text"])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "END")


def test_thinking_comes_before_the_answer_in_a_block_of_its_own() -> None:
    thinking, text = create(SCRIPTS["thinking"]).content

    assert thinking.to_dict() == {"type": "thinking", "thinking": "Hmm.", "signature": ""}
    assert text.to_dict() == {"type": "text", "text": "Hello"}


def test_thinking_that_nobody_wants_to_read_is_not_told() -> None:
    omitted = {"thinking": {"type": "adaptive", "display": "omitted"}}
    for answer in (
        create(SCRIPTS["thinking"], **omitted),
        streamed(SCRIPTS["thinking"], **omitted),
    ):
        assert answer.content[0].to_dict() == {"type": "thinking", "thinking": "", "signature": ""}


def test_calls_are_blocks_with_their_arguments_read() -> None:
    blocks = [block.to_dict() for block in create(SCRIPTS["text and calls"]).content]

    assert blocks == [
        {"type": "text", "text": "Let me see."},
        CALL,
        {"type": "tool_use", "id": "call_1", "name": "clock", "input": {}},
    ]


def test_a_call_that_was_cut_off_is_told_as_far_as_it_came() -> None:
    script: Script = [
        CallBegan(0, 0, "call_0", "weather"),
        CallArguments(0, 0, '{"city": "Ulm", "da'),
        Ended(answer=0, reason="length", n_prompt=7, n_reused=0, n_new=9, n_thinking=0),
    ]
    answer = create(script)
    assert answer.content[0].to_dict() == CALL
    assert answer.stop_reason == "max_tokens"


def test_a_stream_tells_of_blocks_in_the_order_of_the_api() -> None:
    script: Script = [
        *reading(3, 7),
        *saying("Let me ", "see.", thinking=["Hm"])[:-1],
        *calling(("weather", '{"city": "Ulm"}'), ("clock", "{}")),
    ]
    told = events(script)

    assert [(event["type"], event.get("index")) for event in told] == [
        ("message_start", None),
        ("content_block_start", 0),
        ("content_block_delta", 0),
        ("content_block_stop", 0),
        ("content_block_start", 1),
        ("content_block_delta", 1),
        ("content_block_delta", 1),
        ("content_block_stop", 1),
        ("content_block_start", 2),
        ("content_block_delta", 2),
        ("content_block_delta", 2),
        ("content_block_stop", 2),
        ("content_block_start", 3),
        ("content_block_delta", 3),
        ("content_block_delta", 3),
        ("content_block_stop", 3),
        ("message_delta", None),
        ("message_stop", None),
    ]
    deltas = [e["delta"]["type"] for e in told if e["type"] == "content_block_delta"]
    assert deltas == ["thinking_delta", "text_delta", "text_delta"] + 4 * ["input_json_delta"]
    assert told[0]["message"]["usage"]["input_tokens"] == 4
    assert told[-2]["usage"]["output_tokens"] == 20
    assert told[-2]["delta"]["stop_reason"] == "tool_use"


def test_a_context_of_which_all_is_kept_may_be_asked_for() -> None:
    keep = {"type": "clear_thinking_20251015", "keep": "all"}  # as Claude Code does
    assert asked(extra_body={"context_management": {"edits": [keep]}}) == asked()
    for edit in ({**keep, "keep": {"type": "thinking_turns", "value": 1}}, {"type": "compact"}):
        error = refusal(extra_body={"context_management": {"edits": [edit]}})
        assert "context_management: is not supported. Leave it out" in str(error)


def test_what_a_client_wants_of_an_answer_is_asked_so() -> None:
    ask = asked(
        max_tokens=17,
        stop_sequences=["END", "STOP"],
        extra_body={"temperature": 0.5, "top_k": 3, "top_p": 0.9},
        metadata={"user_id": "somebody"},
        service_tier="auto",
    )
    assert ask.sampling == Sampling(
        temperature=0.5, top_k=3, top_p=0.9, stop=("END", "STOP"), max_new_tokens=17
    )
    assert ask.caller == "127.0.0.1 somebody"
    assert asked().caller == "127.0.0.1"


@pytest.mark.parametrize(
    ("thinking", "think"),
    [
        ({"type": "enabled", "budget_tokens": 1024}, True),
        ({"type": "disabled"}, False),
        ({"type": "adaptive"}, None),
    ],
    ids=str,
)
def test_thinking_is_asked_for(thinking: dict[str, Any], think: bool | None) -> None:
    assert asked(thinking=thinking).think is think
    assert asked().think is None


@pytest.mark.parametrize(
    ("choice", "meant"),
    [
        ({"type": "auto"}, ToolChoice()),
        ({"type": "any"}, ToolChoice(mode="required")),
        (
            {"type": "tool", "name": "clock"},
            ToolChoice(mode="required", name="clock", parallel=False),
        ),
        ({"type": "none"}, ToolChoice(mode="none")),
        ({"type": "auto", "disable_parallel_tool_use": True}, ToolChoice(parallel=False)),
        (
            {"type": "any", "disable_parallel_tool_use": True},
            ToolChoice(mode="required", parallel=False),
        ),
    ],
    ids=str,
)
def test_tools_are_asked_with(choice: dict[str, Any], meant: ToolChoice) -> None:
    ask = asked(tools=[WEATHER, CLOCK], tool_choice=choice)

    assert ask.tools == (
        Tool(name="weather", description="Of a city.", parameters=SCHEMA),
        Tool(name="clock", parameters={"type": "object"}),
    )
    assert ask.tool_choice == meant


def test_a_form_is_asked_for() -> None:
    form = {"format": {"type": "json_schema", "schema": SCHEMA}}
    assert asked(output_config=form).constraint == JsonSchema(SCHEMA)


def test_a_conversation_is_read_into_turns() -> None:
    ask = asked(
        system=[{"type": "text", "text": "Be brief."}, {"type": "text", "text": "Be kind."}],
        messages=[
            {"role": "user", "content": "Weather?"},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "Look it up.", "signature": "x"},
                    {"type": "text", "text": "Let me see."},
                    CALL,
                    {**CALL, "id": "call_1", "input": {"city": "Bonn"}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "call_1", "content": "rain"},
                    {
                        "type": "tool_result",
                        "tool_use_id": "call_0",
                        "content": [{"type": "text", "text": "no such city"}],
                        "is_error": True,
                    },
                    {"type": "text", "text": "Well?", "cache_control": {"type": "ephemeral"}},
                ],
            },
            {"role": "user", "content": "Say."},
        ],
        tools=[WEATHER],
    )
    calls = tuple(
        ToolCall(id=f"call_{i}", name="weather", arguments={"city": city})
        for i, city in enumerate(("Ulm", "Bonn"))
    )
    assert ask.prompt == (
        Message(role="system", content="Be brief.\n\nBe kind."),
        Message(role="user", content="Weather?"),
        Message(role="assistant", content="Let me see.", thinking="Look it up.", calls=calls),
        Message(role="tool", content="rain", call_id="call_1", name="weather"),
        Message(role="tool", content="Error: no such city", call_id="call_0", name="weather"),
        # One turn, as the API takes turns of one role that follow each other.
        Message(role="user", content="Well?\n\nSay."),
    )


def test_a_conversation_of_very_many_blocks_is_read_in_its_length() -> None:
    # Joined one by one they would be copied 100 000 times, 80 GB.
    block = {"type": "text", "text": "x" * 14}
    turns = 100 * [TurnFields.model_validate({"role": "user", "content": 1000 * [block]})]

    (message,) = read_turns([], turns)

    assert message.content == "\n\n".join(100_000 * ["x" * 14])


def test_an_answer_can_be_sent_back_as_it_came() -> None:
    first = create(SCRIPTS["text and calls"])
    result = {"type": "tool_result", "tool_use_id": "call_0", "content": "rain"}
    ask = asked(
        messages=[
            *HELLO,
            {"role": "assistant", "content": first.content},
            {"role": "user", "content": [result]},
        ],
        tools=[WEATHER, CLOCK],
    )
    assert isinstance(ask.prompt, tuple)
    told = ask.prompt[1]
    assert isinstance(told, Message)
    assert (told.content, [call.name for call in told.calls]) == (
        "Let me see.",
        ["weather", "clock"],
    )


def test_tokens_are_counted_of_the_same_conversation() -> None:
    service = FakeService(n_prompt=42)
    with client_of(service) as client:
        fields: dict[str, Any] = {"system": "Be brief.", "messages": HELLO, "tools": [WEATHER]}
        counted = client.messages.count_tokens(model="demo", **fields)
        client.messages.create(model="demo", max_tokens=9, **fields)
    assert counted.input_tokens == 42
    assert service.counted[0].prompt == service.asks[0].prompt
    assert service.counted[0].tools == service.asks[0].tools


IMAGE = {"type": "image", "source": {"type": "url", "url": "http://169.254.169.254/"}}
STRAY = {"type": "tool_result", "tool_use_id": "call_7", "content": "rain"}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"extra_body": {"mirostat": 2}}, "mirostat is not supported here"),
        ({"extra_body": {"container": "c"}}, "container: is not supported"),
        ({"max_tokens": 0}, "max_tokens: "),
        ({"extra_body": {"temperature": 1.5}}, "temperature: "),
        ({"extra_body": {"top_p": -1}}, "top_p: "),
        ({"stop_sequences": [""]}, "stop_sequences.0: "),
        ({"stop_sequences": 17 * ["x"]}, "stop_sequences: "),
        ({"messages": []}, "messages: "),
        ({"messages": [{"role": "user", "content": []}]}, "messages.0.content: "),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role: "),
        (
            {"messages": [{"role": "user", "content": [IMAGE]}]},
            "messages.0.content.0: is of type image",
        ),
        (
            {"messages": [{"role": "user", "content": [STRAY]}]},
            "messages.0.content.0.tool_use_id: ",
        ),
        ({"messages": [{"role": "user", "content": [CALL]}]}, "a tool_use block does not belong"),
        ({"messages": [*HELLO, {"role": "assistant", "content": "So"}]}, "messages: the last is"),
        ({"system": [IMAGE]}, "system.0: is of type image"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools.0.type: "),
        ({"tools": [WEATHER, WEATHER]}, "tools: two are called weather"),
        ({"tools": [{"name": "a b", "input_schema": {}}]}, "tools.0.name: "),
        ({"tool_choice": {"type": "any"}}, "tool_choice: demands a call"),
        (
            {"tools": [CLOCK], "tool_choice": {"type": "tool", "name": "weather"}},
            "tool_choice: weather is none of tools",
        ),
        (
            {"tools": [CLOCK], "output_config": {"format": {"type": "json_schema", "schema": {}}}},
            "output_config.format: cannot be together",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_done_is_refused_by_name(fields: dict[str, Any], named: str) -> None:
    error = refusal(**fields)

    assert isinstance(error, anthropic.BadRequestError)
    assert isinstance(error.body, dict)
    assert error.body["error"]["type"] == "invalid_request_error"
    assert named in error.body["error"]["message"]


def test_another_model_is_not_found() -> None:
    error = refusal(model="claude-another")
    assert isinstance(error, anthropic.NotFoundError)
    assert "claude-another is not served here, demo is" in str(error)


def test_errors_are_the_clients_own() -> None:
    with serving(FakeService(), ServerOptions(api_key="a-key")) as url:
        client = anthropic.Anthropic(base_url=url, api_key="wrong", max_retries=0)
        with pytest.raises(anthropic.AuthenticationError, match="authentication_error"):
            client.messages.count_tokens(model="demo", messages=[{"role": "user", "content": "Hi"}])
    with pytest.raises(anthropic.InternalServerError, match="overloaded_error"):
        create([Overloaded("too many wait. Ask again later.")])
    with pytest.raises(anthropic.InternalServerError, match="its log says why"):
        create([RuntimeError("0x7f8efc208d68")])


def test_a_stream_that_fails_raises_in_the_client() -> None:
    with pytest.raises(anthropic.APIStatusError, match="its log says why"):
        events([*saying("Hel")[:1], RuntimeError("0x7f8efc208d68")])


def test_an_answer_that_a_shutdown_cut_off_is_no_whole_one() -> None:
    with pytest.raises(anthropic.APIStatusError, match="shuts down"):
        create(saying("Hel", reason="cancelled"))
    with pytest.raises(anthropic.APIStatusError, match="shuts down"):
        events(saying("Hel", reason="cancelled"))
