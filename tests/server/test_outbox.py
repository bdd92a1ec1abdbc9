"""What a client does not read in time is put together, and is no less for it."""

import asyncio
import random
import threading
from collections.abc import Awaitable, Callable
from typing import TypeVar

import pytest

from lowmoe.server.asking import (
    CallArguments,
    CallBegan,
    ChosenToken,
    Ended,
    Event,
    Reading,
    Text,
    TokenChance,
)
from lowmoe.server.outbox import Outbox

T = TypeVar("T")


def run(test: Callable[[], Awaitable[T]]) -> T:
    async def limited() -> T:
        return await asyncio.wait_for(test(), 30)

    return asyncio.run(limited())


def taken(*events: Event) -> list[Event]:
    """What comes of these when nobody reads between them."""

    async def test() -> list[Event]:
        outbox = Outbox()
        assert all(outbox.put(event) for event in events)
        return list(await outbox.take())

    return run(test)


def chosen(text: str) -> ChosenToken:
    return ChosenToken(TokenChance(len(text), text, text.encode(), -0.5))


def end(answer: int) -> Ended:
    return Ended(answer=answer, reason="end", n_prompt=1, n_reused=0, n_new=1, n_thinking=0)


def test_texts_of_one_kind_are_put_together_across_other_answers() -> None:
    assert taken(
        Text(0, "thinking", "a"),
        Text(1, "answer", "x"),
        Text(0, "thinking", "b"),
        Text(0, "answer", "c", (chosen("c"),)),
        Text(0, "answer", "d", (chosen("d"),)),
        Text(1, "answer", "y"),
        end(1),
    ) == [
        Text(0, "thinking", "ab"),
        Text(1, "answer", "xy"),
        Text(0, "answer", "cd", (chosen("c"), chosen("d"))),
        end(1),
    ]


def test_nothing_moves_across_a_call() -> None:
    events = [
        Text(0, "answer", "a"),
        CallBegan(0, 0, "id", "name"),
        CallArguments(0, 0, "{"),
        CallArguments(0, 0, "}"),
        CallBegan(0, 1, "id2", "name"),
        CallArguments(0, 1, "{}"),
        Text(0, "answer", "b"),
    ]
    assert taken(*events) == [
        *events[:2],
        CallArguments(0, 0, "{}"),
        *events[4:],
    ]


def test_of_what_was_read_only_the_latest_counts() -> None:
    assert taken(Reading(1, 9, 0), Reading(5, 9, 0), Text(0, "answer", "a")) == [
        Reading(5, 9, 0),
        Text(0, "answer", "a"),
    ]


def test_so_much_may_wait_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowmoe.server.outbox.MOST_WAITING", 5)

    async def test() -> None:
        outbox = Outbox()
        assert outbox.put(Text(0, "answer", "123456"))
        assert not outbox.put(Text(0, "answer", "7"))
        assert not outbox.put(end(0))
        outbox.put_last(end(0))
        assert list(await outbox.take()) == [Text(0, "answer", "123456"), end(0)]
        assert outbox.put(Text(0, "answer", "8"))  # there is room again
        outbox.close()
        assert not outbox.put(Text(0, "answer", "9"))

    run(test)


def test_whatever_two_threads_do_each_text_comes_once_and_in_order() -> None:
    generator = random.Random(1)
    pieces = [(generator.randrange(3), str(i) + " ") for i in range(20_000)]

    async def test() -> dict[int, str]:
        outbox, found = Outbox(), dict.fromkeys(range(3), "")

        def put() -> None:
            for answer, text in pieces:
                outbox.put(Text(answer, "answer", text))
            outbox.put(end(0))

        thread = threading.Thread(target=put)
        thread.start()
        while True:
            for event in await outbox.take():
                if isinstance(event, Ended):
                    thread.join()
                    return found
                assert isinstance(event, Text)
                found[event.answer] += event.text

    found = run(test)
    for answer in range(3):
        assert found[answer] == "".join(text for which, text in pieces if which == answer)


def test_a_loop_that_is_gone_is_a_client_that_is_gone() -> None:
    async def made() -> Outbox:
        return Outbox()

    outbox = asyncio.run(made())
    outbox.put(Reading(0, 1, 0))
    assert not outbox.put(Reading(0, 1, 0))
