"""What takes long to prepare holds up nothing that does not wait for it."""

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lowmoe.engine.constraint import Constraint, Regex
from lowmoe.engine.forms import Form, Forms
from lowmoe.engine.messages import Message, ToolCall
from lowmoe.engine.text_parts import TextParts
from lowmoe.server.asking import Ask, Event, Failed, Overloaded
from lowmoe.server.preparation import LONG_CHARS, N_COMPILING
from tests.server.working import GREEDY, answer, end_of, run, to, working

N_FORMS = 40  # more than the event loop's own threads, however many processors there are


class Slow:
    """Forms that are compiled when a test says so; asked: those that were begun."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go_on, self.begun = threading.Event(), threading.Semaphore(0)
        self.asked: list[Constraint] = []
        compile_ = Forms.compile

        def slow(forms: Forms, constraint: Constraint) -> Form:
            self.asked.append(constraint)
            self.begun.release()
            assert self.go_on.wait(20)
            return compile_(forms, constraint)

        monkeypatch.setattr(Forms, "compile", slow)

    async def all_begun(self) -> None:
        for _ in range(N_COMPILING):
            await asyncio.to_thread(self.begun.acquire)


def formed(i: int) -> Ask:
    return to(i, constraint=Regex("a{5}b?"), sampling=GREEDY)


def test_forms_wait_for_each_other_and_nothing_else_does(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Slow(monkeypatch)

    async def test() -> None:
        async with working(model_folder) as worker:
            waiting = [asyncio.ensure_future(answer(worker, formed(i))) for i in range(N_FORMS)]
            await slow.all_begun()
            try:
                assert await asyncio.wait_for(worker.count_tokens(Ask(prompt="Who?")), 5) > 0
                long = Ask(prompt=" " * LONG_CHARS + "Who?", sampling=GREEDY)
                events = await asyncio.wait_for(_first(worker.ask(long)), 5)
            finally:
                slow.go_on.set()
            assert events
            for events in await asyncio.gather(*waiting):
                assert end_of(events).n_new > 0

    run(test)


async def _first(events: Any) -> str:
    """What comes first: an event, or that the prompt is too long for a tiny model."""
    try:
        return repr(await anext(events))
    except Exception as error:
        return repr(error)
    finally:
        await events.aclose()


def test_at_the_end_no_form_is_begun_any_more(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Slow(monkeypatch)

    async def one(worker: Any, i: int) -> Sequence[Event | Exception]:
        try:
            return await answer(worker, formed(i))
        except Overloaded as error:
            return [error]

    async def test() -> list[Sequence[Event | Exception]]:
        async with working(model_folder) as worker:
            waiting = [asyncio.ensure_future(one(worker, i)) for i in range(N_FORMS)]
            await slow.all_begun()
            await worker.close()
            slow.go_on.set()
            found = await asyncio.gather(*waiting)
            assert worker.numbers().n_open == 0
            return found

    for events in run(test):
        (last,) = events
        error = last.error if isinstance(last, Failed) else last
        assert "shutting down" in str(error)
    assert len(slow.asked) == N_COMPILING


def test_who_has_gone_has_no_form_compiled(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Slow(monkeypatch)

    async def test() -> None:
        async with working(model_folder) as worker:
            waiting = [worker.ask(formed(i)) for i in range(N_FORMS)]
            await slow.all_begun()
            for events in waiting:
                await events.aclose()
            slow.go_on.set()
            while worker.numbers().n_open:
                await asyncio.sleep(0.001)
            assert end_of(await answer(worker, to(1))).n_new == 12

    run(test)
    assert len(slow.asked) == N_COMPILING


CALL = ToolCall(id="abcdefghi", name="f", arguments={"a": "long " * LONG_CHARS})


@pytest.mark.parametrize(
    "prompt",
    [
        "long " * LONG_CHARS,
        (Message(role="user", content="long " * LONG_CHARS),),
        (Message(role="user"), Message(role="assistant", calls=(CALL,)), Message(role="user")),
        tuple(Message(role=role, content="?") for role in ("user", "assistant") * 500),
    ],
    ids=["a text", "a message", "arguments of a call", "many messages"],
)
def test_the_event_loop_writes_nothing_long_down(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, prompt: Any
) -> None:
    threads: list[threading.Thread] = []
    encode = TextParts.encode

    def watched(text: TextParts, *prompt: Any, **rest: Any) -> list[int]:
        threads.append(threading.current_thread())
        return encode(text, *prompt, **rest)

    async def test() -> None:
        async with working(model_folder) as worker:
            monkeypatch.setattr(TextParts, "encode", watched)
            await _first(worker.ask(Ask(prompt=prompt)))

    run(test)
    assert len(threads) == 1
    assert threads[0] is not threading.main_thread()
