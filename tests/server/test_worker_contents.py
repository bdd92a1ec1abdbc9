"""Forms, logprobs, tools and thinking, as a worker tells of them."""

import json
from pathlib import Path
from typing import Any, TypeGuard

import pytest

import lowmoe
from lowmoe.engine.constraint import JsonSchema, Regex
from lowmoe.engine.messages import Message, Tool, ToolChoice
from lowmoe.engine.sampling import Sampler
from lowmoe.engine.text_parts import TextParts
from lowmoe.engine.thinking import thinking_of
from lowmoe.errors import UsageError
from lowmoe.server.asking import (
    Ask,
    CallArguments,
    CallBegan,
    Event,
    Sampling,
    Text,
)
from tests.server.working import answer, end_of, run, text_of, to, working
from tests.talking_mixtral import CHAT_TEMPLATE, copy_of, learned_tokenizer

HELLO = (Message(role="user", content="Hello"),)
WEATHER = Tool(
    name="weather",
    parameters={
        "type": "object",
        "properties": {"city": {"enum": ["Rome", "Oslo"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
)


# Its tools stand in few words, for a context of a few hundred tokens.
TOOL_TEMPLATE = (
    "{% if tools %}<|system|>Call {{ tools[0].function.name }} in <tool_call>"
    '{"name": "", "arguments": {}}</tool_call><|end|>{% endif %}' + CHAT_TEMPLATE
)


@pytest.fixture(scope="module")
def calling_folder(talking_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("calling")
    checkpoint = copy_of(talking_checkpoint, home / "checkpoint")
    (checkpoint / "chat_template.jinja").write_text(TOOL_TEMPLATE)
    lowmoe.quantize(checkpoint, home / "model", bits=2)
    return home / "model"


def answered(folder: Path, ask: Ask) -> list[Event]:
    async def test() -> list[Event]:
        async with working(folder) as worker:
            events = await answer(worker, ask)
            assert worker.numbers().ended == {end_of(events).reason: 1}
            return events

    return run(test)


def calls_of(events: list[Event]) -> list[tuple[str, Any]]:
    """Names and arguments, read."""
    names = {e.call: e.name for e in events if isinstance(e, CallBegan)}
    return [
        (name, json.loads("".join(e.json for e in events if is_of(e, call))))
        for call, name in names.items()
    ]


def is_of(event: Event, call: int) -> TypeGuard[CallArguments]:
    return isinstance(event, CallArguments) and event.call == call


def saying(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the model answer so, whatever it computes."""
    ids = learned_tokenizer().encode(text).ids

    def pick(sampler: Sampler, scores: Any, context: list[int], *rest: Any) -> int:
        said = next(n for n in range(len(ids), -1, -1) if context[len(context) - n :] == ids[:n])
        return ids[said] if said < len(ids) else 0

    monkeypatch.setattr(Sampler, "pick", pick)


def test_an_answer_has_the_form_it_must_have(model_folder: Path) -> None:
    form = JsonSchema({"enum": ["yes", "no", {"why": "not"}]})
    sampling = Sampling(seed=1, max_new_tokens=50)
    events = answered(model_folder, Ask(prompt="Well?", constraint=form, sampling=sampling))
    assert json.loads(text_of(events)) in form.schema["enum"]


def test_each_token_is_told_with_its_chances(model_folder: Path) -> None:
    events = answered(model_folder, to(1, n_logprobs=2))
    tokens = [token for e in events if isinstance(e, Text) for token in e.tokens]
    assert len(tokens) == 12
    assert all(len(token.others) == 2 for token in tokens)
    assert all(token.chance == token.others[0] for token in tokens)  # it is greedy
    raw = b"".join(token.chance.raw for token in tokens)
    assert raw.decode("utf-8", "replace") == text_of(events)


def test_which_stop_text_ended_it_is_told(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saying("One, two, three", monkeypatch)
    events = answered(model_folder, Ask(prompt="Count", sampling=Sampling(stop=("four", ", th"))))
    assert text_of(events) == "One, two"
    assert (end_of(events).reason, end_of(events).stop) == ("stop", ", th")


def test_a_call_that_must_come_comes(calling_folder: Path) -> None:
    choice = ToolChoice(mode="required", parallel=False)  # a random model would not end
    sampling = Sampling(seed=1, max_new_tokens=200)
    ask = Ask(prompt=HELLO, tools=(WEATHER,), tool_choice=choice, sampling=sampling)
    events = answered(calling_folder, ask)
    assert end_of(events).reason == "calls"
    found = calls_of(events)
    assert found
    assert all(name == "weather" and set(called) == {"city"} for name, called in found)


@pytest.mark.parametrize(("parallel", "n_calls"), [(True, 2), (False, 1)])
def test_calls_are_told_from_text(
    calling_folder: Path, monkeypatch: pytest.MonkeyPatch, parallel: bool, n_calls: int
) -> None:
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "%s"}}\n</tool_call>'
    saying(f"I look.\n{call % 'Rome'}\n{call % 'Oslo'}", monkeypatch)
    choice = ToolChoice(parallel=parallel)
    events = answered(calling_folder, Ask(prompt=HELLO, tools=(WEATHER,), tool_choice=choice))
    wanted = [("weather", {"city": "Rome"}), ("weather", {"city": "Oslo"})]
    assert calls_of(events) == wanted[:n_calls]
    assert text_of(events).strip() == "I look."
    assert end_of(events).reason == "calls"
    ids = [e.id for e in events if isinstance(e, CallBegan)]
    assert len(set(ids)) == n_calls


def test_a_call_that_breaks_off_is_not_told_as_one_to_make(
    calling_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saying('<tool_call>\n{"name": "weather", "arguments": {"city": "Ro', monkeypatch)
    events = answered(calling_folder, Ask(prompt=HELLO, tools=(WEATHER,)))
    assert [e.name for e in events if isinstance(e, CallBegan)] == ["weather"]
    assert end_of(events).reason == "length"


def test_no_tool_is_called_that_may_not_be(
    calling_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
    saying(text, monkeypatch)
    ask = Ask(prompt=HELLO, tools=(WEATHER,), tool_choice=ToolChoice(mode="none"))
    events = answered(calling_folder, ask)
    assert text_of(events) == text
    assert end_of(events).reason == "end"


def test_a_form_and_tools_do_not_go_together(calling_folder: Path) -> None:
    async def test() -> None:
        async with working(calling_folder) as worker:
            ask = Ask(prompt=HELLO, tools=(WEATHER,), constraint=Regex("a+"))
            with pytest.raises(UsageError, match="1 tools are offered, and the answer must have"):
                await answer(worker, ask)

    run(test)


def test_thinking_is_told_from_the_answer_and_marks_are_not_told(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TextParts, "thinking", thinking_of("</think>"))
    saying("<think>\nHm, why?\n</think>\n\nBecause.", monkeypatch)
    events = answered(model_folder, Ask(prompt=HELLO))
    texts = [e for e in events if isinstance(e, Text)]
    assert "".join(e.text for e in texts if e.kind == "thinking") == "Hm, why?\n"
    assert "".join(e.text for e in texts if e.kind == "answer") == "Because."
    end = end_of(events)
    n_answer = len(learned_tokenizer().encode("Because.").ids)
    # The end token is counted too; what divides the two is the thinking's.
    assert end.n_new - end.n_thinking == n_answer + 1
