"""What OpenAI's own client hears when there is no answer, and who stops when it is gone."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest

from lowmoe.errors import ContextError, LowMoeError, PromptError, TextError
from lowmoe.server.asking import Ended, Failed, Overloaded, Text
from lowmoe.server.fields import MAX_TOKENS
from tests.server.fake_service import FakeService, Gate, Script, saying
from tests.server.openai_clients import HELLO, lenient, openai_client


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    """Talks with a server that would say "Hello world" to everything."""
    with openai_client(FakeService()) as client:
        yield client


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("frequency_penalty", 0.5),
        ("presence_penalty", -1),
        ("logit_bias", {"5": 1}),
        ("functions", [{"name": "f"}]),
        ("function_call", "auto"),
        ("modalities", ["text", "audio"]),
        ("audio", {"voice": "x"}),
        ("prediction", {"type": "content", "content": ""}),
        ("web_search_options", {}),
        ("verbosity", "low"),
        ("best_of", 2),
        ("min_tokens", 1),
        ("temperature", -0.1),
        ("temperature", 1e9),
        ("temperature", "hot"),
        ("temperature", True),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("seed", -1),
        ("seed", 2**63),
        ("seed", 1.5),
        ("n", 0),
        ("n", 9),
        ("max_tokens", 0),
        ("max_tokens", MAX_TOKENS + 1),
        ("max_completion_tokens", -1),
        ("stop", [""]),
        ("stop", ["x"] * 17),
        ("stop", "x" * 257),
        ("stop", 3),
        ("top_logprobs", 5),  # without logprobs
        ("stream_options", {"include_usage": True}),  # without stream
        ("reasoning_effort", "enormous"),
        ("chat_template_kwargs", {"chat_template": "{{ 1 }}"}),
        ("messages", []),
        ("messages", "Hi"),
    ],
)
def test_what_is_not_supported_is_refused_by_its_name(
    client: openai.OpenAI, field: str, value: Any
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="demo", messages=HELLO, extra_body={field: value})
    param = caught.value.param or ""
    assert param.split(".")[0] == field
    assert param in caught.value.message
    assert caught.value.type == "invalid_request_error"


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file"])
def test_what_is_no_text_is_refused_by_its_name(client: openai.OpenAI, kind: str) -> None:
    content: Any = [{"type": "text", "text": "What is this?"}, {"type": kind, kind: {}}]
    with pytest.raises(openai.BadRequestError, match=f"part of type '{kind}'") as caught:
        client.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": content}]
        )
    assert caught.value.param == "messages.0.content"


@pytest.mark.parametrize(
    "content",
    [None, 3, [3], ["text"], [{"type": "text"}], [{"text": "x"}], [{"type": "text", "text": 3}]],
)
def test_content_that_is_no_text_is_refused(client: openai.OpenAI, content: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": content}]
        )
    assert caught.value.param == "messages.0.content"


@pytest.mark.parametrize("name", ["demo", "DEMO", "lowmoe", ""])
def test_the_model_goes_by_these_names(client: openai.OpenAI, name: str) -> None:
    assert client.chat.completions.create(model=name, messages=HELLO).model == "demo"


def test_another_model_is_not_found(client: openai.OpenAI) -> None:
    for ask in (
        lambda: client.chat.completions.create(model="gpt-5", messages=HELLO),
        lambda: client.completions.create(model="gpt-5", prompt="Once"),
        lambda: client.responses.create(model="gpt-5", input="Hi"),
        lambda: client.models.retrieve("gpt-5"),
    ):
        with pytest.raises(openai.NotFoundError, match="gpt-5 is not served here, demo is") as e:
            ask()
        assert (e.value.code, e.value.param) == ("model_not_found", "model")


def test_the_model_is_listed(client: openai.OpenAI) -> None:
    (listed,) = client.models.list()
    assert (listed.id, listed.owned_by, listed.created) == ("demo", "lowmoe", 1_700_000_000)
    assert client.models.retrieve("demo") == listed


def test_what_no_language_model_does_is_said_to_be_so(client: openai.OpenAI) -> None:
    with pytest.raises(openai.InternalServerError, match="Embeddings is nothing") as caught:
        client.embeddings.create(model="demo", input="x")
    assert (caught.value.status_code, caught.value.code) == (501, "not_implemented")


FAILURES: Any = [
    (PromptError("the prompt has 9 tokens"), 400, "the prompt has 9 tokens"),
    (TextError("no template"), 400, "no template"),
    (Overloaded("64 wait"), 503, "64 wait"),
    (LowMoeError("/home/me/model is damaged"), 500, "The server failed"),
    (RuntimeError("a bug at 0x7f"), 500, "The server failed"),
]


@pytest.mark.parametrize(("error", "status", "words"), FAILURES)
@pytest.mark.parametrize("stream", [False, True])
def test_an_ask_that_is_refused_has_a_status_of_its_own(
    error: Exception, status: int, words: str, stream: bool
) -> None:
    with openai_client(FakeService([[error]])) as client:  # type: ignore[list-item]
        for ask in (
            lambda: client.chat.completions.create(model="demo", messages=HELLO, stream=stream),
            lambda: client.completions.create(model="demo", prompt="Once", stream=stream),
            lambda: client.responses.create(model="demo", input="Hi", stream=stream),
        ):
            with pytest.raises(openai.APIStatusError, match=words) as caught:
                ask()
            assert caught.value.status_code == status
            assert "0x7f" not in caught.value.message
            assert "/home" not in caught.value.message


def test_a_prompt_that_is_too_long_is_known_by_its_code() -> None:
    long = ContextError("the prompt has 9 tokens, but the context holds 8")
    with openai_client(FakeService([[long]])) as client:
        with pytest.raises(openai.BadRequestError, match="9 tokens") as caught:
            client.chat.completions.create(model="demo", messages=HELLO)
        with pytest.raises(openai.BadRequestError, match="9 tokens") as of_responses:
            client.responses.create(model="demo", input="Hi", stream=True)
    # Source: the code that OpenAI's own API answers with, and codex looks for.
    assert caught.value.code == of_responses.value.code == "context_length_exceeded"


def breaking_off(failure: Any) -> Script:
    return [Text(0, "answer", "Hel"), failure]


@pytest.mark.parametrize(("error", "status", "words"), FAILURES)
def test_a_whole_answer_that_fails_has_a_status_of_its_own(
    error: Exception, status: int, words: str
) -> None:
    failed = Failed(error) if isinstance(error, LowMoeError) else error
    with openai_client(FakeService([breaking_off(failed)])) as client:
        for ask in (
            lambda: client.chat.completions.create(model="demo", messages=HELLO),
            lambda: client.completions.create(model="demo", prompt=["Once", "Twice"]),
            lambda: client.responses.create(model="demo", input="Hi"),
        ):
            with pytest.raises(openai.APIStatusError, match=words) as caught:
                ask()
            assert caught.value.status_code == status


@pytest.mark.parametrize(("error", "status", "words"), FAILURES)
def test_a_stream_that_fails_says_so_and_does_not_end_well(
    error: Exception, status: int, words: str
) -> None:
    failed = Failed(error) if isinstance(error, LowMoeError) else error
    with openai_client(FakeService([breaking_off(failed)])) as client:
        chat = client.chat.completions.create(model="demo", messages=HELLO, stream=True)
        assert [next(chat).choices[0].delta.content for _ in range(2)] == ["", "Hel"]
        with pytest.raises(openai.APIError, match=words):
            next(chat)
        completion = lenient(client).completions.create(model="demo", prompt="Once", stream=True)
        with pytest.raises(openai.APIError, match=words):
            list(completion)
        *_, last = client.responses.create(model="demo", input="Hi", stream=True)
        assert last.type == "response.failed"
        assert last.response.error is not None
        assert words in last.response.error.message
        with client.chat.completions.with_streaming_response.create(
            model="demo", messages=HELLO, stream=True
        ) as raw:
            assert "[DONE]" not in raw.read().decode()


def test_a_response_that_fails_after_a_silence_is_created_all_the_same() -> None:
    gate = Gate()
    with (
        openai_client(FakeService([[gate, LowMoeError("late")]])) as client,
        client.responses.create(model="demo", input="Hi", stream=True) as stream,
    ):
        gate.open()  # headers have come, so it is too late for a status of its own
        types = [event.type for event in stream]
    assert types == ["response.created", "response.in_progress", "response.failed"]


def test_a_server_that_shuts_down_says_so() -> None:
    service = FakeService([saying("Hello", reason="cancelled")])
    with openai_client(service) as client:
        with pytest.raises(openai.InternalServerError, match="shuts down") as caught:
            client.chat.completions.create(model="demo", messages=HELLO)
        assert caught.value.status_code == 503
        assert caught.value.response.headers["retry-after"]
        with pytest.raises(openai.APIError, match="shuts down"):
            list(client.chat.completions.create(model="demo", messages=HELLO, stream=True))


@pytest.mark.parametrize("face", ["chat", "completions", "responses"])
def test_an_answer_ends_when_its_reader_is_gone(face: str) -> None:
    service = FakeService([[Text(0, "answer", "Hel"), Gate()]])
    with openai_client(service) as client:
        stream: Any
        if face == "chat":
            stream = client.chat.completions.create(model="demo", messages=HELLO, stream=True)
        elif face == "completions":
            stream = lenient(client).completions.create(
                model="demo", prompt=["A", "B"], stream=True
            )
        else:
            stream = client.responses.create(model="demo", input="Hi", stream=True)
        next(stream)
        stream.close()
        for _ in service.asks:
            service.cancelled.get(timeout=5)
    assert all(tape.cancelled for tape in service.tapes)


@pytest.mark.parametrize("face", ["chat", "completions", "responses"])
def test_a_whole_answer_ends_when_nobody_waits_for_it(face: str) -> None:
    gate = Gate()
    service = FakeService([[gate]])
    with openai_client(service) as client:
        hasty = client.with_options(timeout=0.2)
        asks: dict[str, Callable[[], object]] = {
            "chat": lambda: hasty.chat.completions.create(model="demo", messages=HELLO),
            "completions": lambda: hasty.completions.create(model="demo", prompt=["A", "B"]),
            "responses": lambda: hasty.responses.create(model="demo", input="Hi"),
        }
        with pytest.raises(openai.APITimeoutError):
            asks[face]()
        for _ in service.asks:
            service.cancelled.get(timeout=5)
    assert all(tape.cancelled for tape in service.tapes)


def test_of_several_prompts_none_is_answered_if_one_is_refused() -> None:
    refused: Script = [Overloaded("64 wait")]
    service = FakeService([[Gate()], refused])
    with openai_client(service) as client, pytest.raises(openai.InternalServerError):
        client.completions.create(model="demo", prompt=["A", "B"])
    assert [tape.cancelled for tape in service.tapes] == [True, False]


def test_a_stream_is_ascii_so_that_no_client_cuts_its_lines_elsewhere() -> None:
    text = "a\u2028b\x85c\r\nd\x0ce\u2029é"
    service = FakeService([saying(text)])
    with (
        openai_client(service) as client,
        client.chat.completions.with_streaming_response.create(
            model="demo", messages=HELLO, stream=True
        ) as raw,
    ):
        lines = raw.read().decode("ascii").splitlines()
    said = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert said[1]["choices"][0]["delta"]["content"] == text
    assert all(line == "" or line.startswith("data: ") for line in lines)


def test_an_end_is_told_for_every_reason_there_is() -> None:
    reasons: Any = Ended.__annotations__["reason"].__args__
    for reason in set(reasons) - {"cancelled"}:
        with openai_client(FakeService([saying("x", reason=reason)])) as client:
            made = client.chat.completions.create(model="demo", messages=HELLO)
            assert made.choices[0].finish_reason
