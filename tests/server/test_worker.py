"""One thread owns the model: whose turn it is, what clients are told."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import lowmoe
from lowmoe.engine.runtime import Runtime
from lowmoe.engine.statistics import RunStatistics
from lowmoe.errors import PromptError, UsageError
from lowmoe.experts.store import ExpertStore
from lowmoe.server import worker as worker_module
from lowmoe.server.asking import (
    Ask,
    Ended,
    Event,
    Overloaded,
    Reading,
    Sampling,
    Text,
)
from lowmoe.server.worker import chunk_tokens
from lowmoe.settings import Settings
from tests.server.working import (
    GREEDY,
    Held,
    all_of,
    answer,
    end_of,
    ids_of,
    run,
    text_of,
    to,
    working,
)

# --- what is told


def test_an_answer_is_the_one_that_the_model_streams(model_folder: Path) -> None:
    ask = Ask(prompt="Once upon a time", sampling=GREEDY)
    with lowmoe.load(model_folder) as model:
        wanted = model.generate("Once upon a time", temperature=0.0, max_new_tokens=12)
        n_prompt = model.statistics().prompt_tokens

    async def test() -> list[Event]:
        async with working(model_folder) as worker:
            return await answer(worker, ask)

    events = run(test)
    assert text_of(events) == wanted
    assert end_of(events) == Ended(
        answer=0, reason="length", n_prompt=n_prompt, n_reused=0, n_new=12, n_thinking=0
    )
    assert events[-1] == end_of(events)


def test_a_prompt_is_told_of_as_it_is_read(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> list[Event]:
        async with working(model_folder, chunk=10) as worker:
            held = Held(worker, monkeypatch)
            events = worker.ask(to(1, 36))
            found = []
            for _ in range(4):
                found.append(await anext(events))
                await held.take(1)
            found.append(await anext(events))
            held.let_go()
            return found

    assert run(test) == [Reading(n, 36, 0) for n in (0, 10, 20, 30, 36)]


def test_the_next_turn_reads_only_what_is_new(model_folder: Path) -> None:
    async def test() -> tuple[Ended, Ended, list[Event]]:
        async with working(model_folder) as worker:
            first = await answer(worker, to(1, 40))
            # A random model's text need not be its tokens again; these are the prompt's.
            longer = Ask(prompt=(*ids_of(1, 40), *ids_of(2, 10)), sampling=GREEDY)
            second = await answer(worker, longer)
            return end_of(first), end_of(second), second

    first, second, events = run(test)
    assert (first.n_reused, second.n_reused, second.n_prompt) == (0, 40, 50)
    assert events[0] == Reading(40, 50, 40) or events[0] == Reading(50, 50, 40)


def test_a_seeded_answer_reuses_whole_chunks_only(model_folder: Path) -> None:
    seeded = replace(GREEDY, seed=7)

    async def test() -> list[int]:
        async with working(model_folder, chunk=16) as worker:
            found = [await answer(worker, to(1, 40, sampling=seeded)) for _ in range(2)]
            found.append(await answer(worker, to(1, 40)))
            return [end_of(events).n_reused for events in found]

    assert run(test) == [0, 32, 39]


def test_a_turn_counts_its_tokens_without_reading_them(model_folder: Path) -> None:
    async def test() -> tuple[int, int]:
        async with working(model_folder) as worker:
            ask = Ask(prompt="Who is there?", sampling=GREEDY)
            return await worker.count_tokens(ask), end_of(await answer(worker, ask)).n_prompt

    counted, read = run(test)
    assert counted == read > 0


def test_several_answers_have_seeds_that_follow_each_other(model_folder: Path) -> None:
    sampling = Sampling(temperature=1.5, seed=5, max_new_tokens=10)

    async def test() -> tuple[list[str], list[str]]:
        async with working(model_folder, sequences=2) as worker:
            together = await answer(worker, to(1, sampling=sampling, n=3))
            alone = [
                await answer(worker, to(1, sampling=replace(sampling, seed=5 + i)))
                for i in range(3)
            ]
            return [text_of(together, i) for i in range(3)], [text_of(events) for events in alone]

    together, alone = run(test)
    assert together == alone
    assert len(set(together)) == 3


def test_several_answers_are_told_of_one_prompt(model_folder: Path) -> None:
    async def test() -> list[Event]:
        async with working(model_folder) as worker:
            return await answer(worker, to(1, n=3))

    events = run(test)
    first_text = next(i for i, e in enumerate(events) if isinstance(e, Text))
    assert not any(isinstance(e, Reading) for e in events[first_text:])
    assert sorted(e.answer for e in events if isinstance(e, Ended)) == [0, 1, 2]
    assert [end_of(events, i).n_reused for i in range(3)] == [0, 8, 8]  # copied


# --- whose turn it is


def order_of_ends(
    folder: Path, monkeypatch: pytest.MonkeyPatch, callers: str, *, sequences: int
) -> str:
    """By whom an answer ended, asked in the order of `callers`."""

    async def test() -> str:
        async with working(folder, sequences=sequences) as worker:
            held, ended = Held(worker, monkeypatch), []

            async def one(caller: str, number: int) -> None:
                await answer(worker, to(number, caller=caller))
                ended.append(caller)

            tasks = []
            for number, caller in enumerate(callers):
                tasks.append(asyncio.ensure_future(one(caller, number)))
                await asyncio.sleep(0)  # so that they ask in this order
            held.let_go()
            await asyncio.gather(*tasks)
            return "".join(ended)

    return run(test)


def test_callers_take_turns_and_each_is_served_in_order(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert order_of_ends(model_folder, monkeypatch, "aaaabbc", sequences=1) == "abcabaa"


def test_an_ask_that_no_place_is_left_for_is_refused_at_once(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        async with working(model_folder, sequences=2, n_waiting=1) as worker:
            held = Held(worker, monkeypatch)
            taken = [worker.ask(to(i)) for i in range(3)]
            with pytest.raises(Overloaded, match="3 requests are under way or waiting"):
                worker.ask(to(3))
            await taken[2].aclose()  # the one that waits leaves its place at once
            last = worker.ask(to(4))
            held.let_go()
            for events in (*taken[:2], last):
                assert end_of(await all_of(events)).n_new == 12
            assert worker.numbers().refused == 1

    run(test)


def test_what_cannot_be_answered_is_refused_at_once(model_folder: Path) -> None:
    async def test() -> None:
        async with working(model_folder) as worker:
            for ask, error, why in (
                (Ask(prompt=()), PromptError, "is empty"),
                (Ask(prompt="  "), PromptError, "is empty"),
                (Ask(prompt=(5, 99999)), PromptError, "token id 99999"),
                (to(1, 400), PromptError, "400 tokens, but the context holds 384"),
                (to(1, n=9), UsageError, "n is 9"),
                (to(1, n_logprobs=21), UsageError, "n_logprobs is 21"),
                (to(1, sampling=Sampling(temperature=-1.0)), UsageError, "temperature"),
                (to(1, sampling=Sampling(max_new_tokens=0)), UsageError, "max_new_tokens"),
            ):
                with pytest.raises(error, match=why):
                    worker.ask(ask)
            assert worker.numbers().asked == 0

    run(test)


def test_what_takes_long_to_prepare_is_refused_with_the_first_event(model_folder: Path) -> None:
    async def test() -> None:
        async with working(model_folder, sequences=1, n_waiting=0) as worker:
            long = worker.ask(Ask(prompt="Who is there? " * 2000))
            with pytest.raises(Overloaded):  # its place is taken from the beginning
                worker.ask(to(1))
            with pytest.raises(PromptError, match="tokens, but the context holds 384"):
                await anext(long)
            await long.aclose()
            gone = worker.ask(Ask(prompt="Who is there? " * 2000))
            await gone.aclose()
            while worker.numbers().n_open:
                await asyncio.sleep(0.001)
            assert end_of(await answer(worker, to(1))).n_new == 12

    run(test)


@pytest.mark.parametrize(("fits", "wanted"), [(True, 256), (False, 384)])
def test_prompts_are_read_in_short_chunks_where_that_reads_nothing_twice(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, fits: bool, wanted: int
) -> None:
    monkeypatch.setattr(ExpertStore, "has_room_for_all", fits)
    with lowmoe.load(model_folder) as model:
        assert chunk_tokens(model.runtime) == wanted


# --- who watches


def test_numbers_say_what_was_done(model_folder: Path) -> None:
    async def test() -> None:
        async with working(model_folder) as worker:
            seen: list[int] = []
            worker.on_step(lambda: seen.append(worker.numbers().n_under_way))
            await asyncio.gather(*(answer(worker, to(i, 20)) for i in range(3)))
            await answer(worker, to(0, 20))
            numbers = worker.numbers()
            assert (numbers.asked, numbers.failed, numbers.refused) == (4, 0, 0)
            assert numbers.ended == {"length": 4}
            assert (numbers.prompt_tokens, numbers.reused_tokens) == (80, 19)
            assert numbers.new_tokens == 4 * 12
            assert (numbers.n_under_way, numbers.n_waiting) == (0, 0)
            assert max(seen) == 3
            assert numbers.latest is not None
            assert numbers.latest.new_tokens == 12
            traffic = numbers.traffic
            assert traffic.ram_requests + traffic.disk_requests > 0
            assert numbers.placement.ram > 0

    run(test)


def offered_runs(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, keep: Callable[[], bool]
) -> int:
    """How many of eight answers, two of them together, were offered to learn from."""
    offered: list[RunStatistics] = []

    def keeping(runtime: Runtime, run: RunStatistics, settings: Settings) -> bool:
        offered.append(run)
        return keep()

    monkeypatch.setattr(worker_module, "keep_run", keeping)

    async def test() -> None:
        async with working(model_folder) as worker:
            for seed in range(6):
                assert end_of(await answer(worker, to(seed))).n_new == 12
            found = await asyncio.gather(answer(worker, to(6)), answer(worker, to(7)))
            assert [end_of(events).n_new for events in found] == [12, 12]
            assert worker.numbers().n_open == 0

    run(test)
    assert all(run.new_tokens == 12 for run in offered)
    return len(offered)


def test_answers_are_offered_to_learn_from_until_enough_were_kept(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert offered_runs(model_folder, monkeypatch, lambda: False) == 8
    assert offered_runs(model_folder, monkeypatch, lambda: True) == worker_module.MOST_KEPT


def test_where_no_run_can_be_kept_answers_end_all_the_same(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing() -> bool:
        raise PermissionError("the home")

    assert offered_runs(model_folder, monkeypatch, failing) == 1
    assert "PermissionError: the home" in caplog.text
