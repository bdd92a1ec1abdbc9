"""Whatever comes of an ask, OpenAI's client puts it together from a stream as it comes whole."""

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowmoe.server.asking import CallArguments, CallBegan, Ended, Event, Reading, Text
from tests.server.fake_service import FakeService, chosen
from tests.server.openai_clients import HELLO, lenient, openai_client

EXAMPLES = settings(max_examples=80, deadline=None, derandomize=True)
# What a client's own lines, frames and JSON might be cut at, among all other characters.
PIECES = st.text(max_size=4) | st.sampled_from(["", "\n\n", "data: [DONE]", '"', "\\", "\u2028"])
TOKENS = st.lists(
    st.builds(
        chosen,
        st.text(max_size=3),
        st.floats(max_value=0),
        st.lists(st.tuples(st.text(max_size=3), st.floats(max_value=0)), max_size=2),
    ),
    max_size=2,
)


@pytest.fixture(scope="module")
def service() -> FakeService:
    """Says what the example is."""
    return FakeService()


@pytest.fixture(scope="module")
def client(service: FakeService) -> Iterator[openai.OpenAI]:
    """Talks with it."""
    with openai_client(service) as client:
        yield client


@st.composite
def one_answer(draw: st.DrawFn, answer: int, *, calls: bool = True) -> list[Event]:
    events: list[Event] = []
    for _ in range(draw(st.integers(0, 2))):
        events.append(Text(answer, "thinking", draw(PIECES), draw(TOKENS)))
    n_calls = 0
    for _ in range(draw(st.integers(0, 4))):
        if not calls or draw(st.booleans()):
            events.append(Text(answer, "answer", draw(PIECES), draw(TOKENS)))
            continue
        events.append(CallBegan(answer, n_calls, f"call_{answer}_{n_calls}", "add"))
        for json in draw(st.sampled_from([["{}"], ['{"a"', ":1}"], ["{", "", "}"]])):
            events.append(CallArguments(answer, n_calls, json))
        n_calls += 1
    reason = draw(st.sampled_from(["end", "stop", "length", *(["calls"] if n_calls else [])]))
    n_new = draw(st.integers(0, 9))
    ended = Ended(
        answer=answer,
        reason=reason,
        n_prompt=7,
        n_reused=draw(st.integers(0, 7)),
        n_new=n_new,
        n_thinking=draw(st.integers(0, n_new)),
    )
    return [*events, ended]


@st.composite
def several_answers(draw: st.DrawFn, n: int, *, calls: bool = True) -> list[Event]:
    """Answers mixed, after a prompt is read."""
    answers = [draw(one_answer(index, calls=calls)) for index in range(n)]
    turns = draw(st.permutations([i for i, events in enumerate(answers) for _ in events]))
    nexts = [iter(events) for events in answers]
    return [Reading(7, 7, 0), *(next(nexts[i]) for i in turns)]


def n_answers(script: list[Event]) -> int:
    return sum(isinstance(event, Ended) for event in script)


@EXAMPLES
@given(script=st.integers(1, 3).flatmap(several_answers))
def test_chats_are_the_same_whole_and_streamed(
    client: openai.OpenAI, service: FakeService, script: list[Event]
) -> None:
    service.scripts, n = [script], n_answers(script)
    options: Any = {"model": "demo", "messages": HELLO, "n": n, "logprobs": True}
    whole = client.chat.completions.create(**options)
    with client.chat.completions.stream(
        **options, stream_options={"include_usage": True}
    ) as stream:
        stream.until_done()
        # The final completion would be the same, but not be given for an answer that was cut.
        streamed = stream.current_completion_snapshot
    assert [chat(choice) for choice in whole.choices] == [chat(c) for c in streamed.choices]
    assert whole.usage == streamed.usage


def chat(choice: Any) -> Any:
    """What one choice says; no text is "" in a stream, and null beside calls."""
    message, logprobs = choice.message, choice.logprobs
    return (
        choice.index,
        choice.finish_reason,
        message.content or "",
        message.to_dict().get("reasoning_content"),
        [(c.id, c.type, c.function.name, c.function.arguments) for c in message.tool_calls or ()],
        [token.to_dict() for token in logprobs.content] if logprobs else [],
    )


@EXAMPLES
@given(script=st.integers(1, 3).flatmap(lambda n: several_answers(n, calls=False)))
def test_completions_are_the_same_whole_and_streamed(
    client: openai.OpenAI, service: FakeService, script: list[Event]
) -> None:
    service.scripts, n = [script], n_answers(script)
    options: Any = {"model": "demo", "prompt": "Once", "n": n, "logprobs": 1}
    whole = client.completions.create(**options)
    texts, ends, usage = [""] * n, [""] * n, None
    chances: list[dict[str, list[Any]]] = [{} for _ in range(n)]
    for chunk in lenient(client).completions.create(
        **options, stream=True, stream_options={"include_usage": True}
    ):
        usage = chunk.usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            ends[choice.index] = choice.finish_reason
            for name, values in choice.logprobs.to_dict().items() if choice.logprobs else ():
                chances[choice.index].setdefault(name, []).extend(values)
    assert [choice.text for choice in whole.choices] == texts
    assert [choice.finish_reason for choice in whole.choices] == ends
    assert [c.logprobs.to_dict() if c.logprobs else {} for c in whole.choices] == chances
    assert whole.usage == usage


@EXAMPLES
@given(script=several_answers(1))
def test_responses_are_the_same_whole_and_streamed(
    client: openai.OpenAI, service: FakeService, script: list[Event]
) -> None:
    service.scripts = [script]
    whole: Any = client.responses.create(model="demo", input="Hi", top_logprobs=1)
    pieces: dict[int, str] = {}
    done: list[Any] = []
    with client.responses.stream(model="demo", input="Hi", top_logprobs=1) as stream:
        events: list[Any] = list(stream)
    for event in events:
        if event.type.endswith(".delta"):
            pieces[event.output_index] = pieces.get(event.output_index, "") + event.delta
        if event.type == "response.output_item.done":
            assert event.output_index == len(done)
            done.append(event.item)
    last = events[-1].response
    assert events[-1].type == f"response.{whole.status}"
    assert [item(one) for one in last.output] == [item(one) for one in whole.output]
    assert [item(one) for one in done] == [item(one) for one in whole.output]
    assert [pieces.get(i, "") for i in range(len(done))] == [item(one)[1] for one in done]
    assert last.usage == whole.usage
    assert last.incomplete_details == whole.incomplete_details


def item(one: Any) -> Any:
    """What one item says."""
    if one.type == "function_call":
        return (one.type, one.arguments, one.call_id, one.name, one.status)
    (part,) = one.content
    logprobs = [token.to_dict() for token in getattr(part, "logprobs", None) or ()]
    return (one.type, part.text, logprobs, one.status)
