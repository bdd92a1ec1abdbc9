"""What watchers are told adds up to what happened, whenever they come and however slow they are."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from typing import TypeVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lowmoe
from lowmoe.api import Model
from lowmoe.server import watching
from lowmoe.server.asking import Ask, Sampling
from lowmoe.server.watching import TIERS, Frame, Rates, State, Watching, difference
from lowmoe.server.worker import Worker

T = TypeVar("T")
N_NEW = 24
ASK = Ask(prompt="Once upon a time", sampling=Sampling(temperature=0.0, max_new_tokens=N_NEW))

states = st.lists(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 5)), min_size=7, max_size=7),
    min_size=1,
    max_size=5,
)


def run(test: Callable[[], Awaitable[T]]) -> T:
    async def limited() -> T:
        return await asyncio.wait_for(test(), 30)

    return asyncio.run(limited())


@asynccontextmanager
async def watched_demo(**options: str | int) -> AsyncIterator[tuple[Model, Worker, Watching]]:
    model = lowmoe.load(gpu="none", threads=1, sequences=2, **options)  # type: ignore[arg-type]
    worker = Worker(model, name="demo")
    watching = Watching(model, worker)
    try:
        yield model, worker, watching
    finally:
        await worker.close()


async def answered(worker: Worker, ask: Ask = ASK) -> None:
    async with aclosing(worker.ask(ask)) as events:
        async for _ in events:
            pass


async def answered_at_last(worker: Worker) -> None:
    """Only when the thread has ended has what it does after an answer been done."""
    await answered(worker)
    await worker.close()


def sum_of(frames: Sequence[Frame]) -> tuple[np.ndarray, np.ndarray]:
    """Places and uses, as a watcher adds them up."""
    n_experts = frames[0].moved_at.size
    places, uses = np.full(n_experts, 9), np.zeros(n_experts, np.int64)
    for frame in frames:
        places[frame.moved_at] = frame.moved_to
        uses[frame.used_at] += frame.used_times
    return places, uses


@given(states)
def test_frames_add_up_to_where_things_stand(steps: list[list[tuple[int, int]]]) -> None:
    before, frames, uses = None, [], np.zeros(7, np.int64)
    for step in steps:
        uses = uses + [used for _, used in step]
        now = State(np.array([place for place, _ in step], np.uint8), uses, Rates())
        frames.append(difference(before, now))
        before = now
    assert before is not None
    places, added_up = sum_of(frames)
    np.testing.assert_array_equal(places, before.places)
    np.testing.assert_array_equal(added_up, before.uses)
    assert [frame.whole for frame in frames] == [True] + [False] * (len(frames) - 1)


def test_a_watcher_is_told_where_every_expert_is_and_how_often_it_was_used() -> None:
    async def test() -> None:
        async with watched_demo() as (model, worker, watching):
            frames: list[Frame] = []

            async def watch() -> None:
                async for frame in watching.frames():
                    frames.append(frame)

            watcher = asyncio.ensure_future(watch())
            store = model.runtime.store
            while not store.is_complete:  # reading goes on a while, beside answers and after them
                await answered(worker)
            await answered_at_last(worker)
            watching.close()
            await watcher
            assert store.uses is not None
            places, uses = sum_of(frames)
            assert frames[0].whole
            assert list(uses) == list(store.uses.counts)
            # 64 experts, of which a token uses 2 in each of 8 layers; a prompt more at once.
            assert uses.sum() >= 16 * N_NEW
            assert list(places) == [TIERS.index("ram")] * 64

    run(test)


def test_who_comes_late_is_told_the_whole_while_nothing_happens() -> None:
    async def test() -> None:
        async with watched_demo() as (model, worker, watching):
            store = model.runtime.store
            await answered_at_last(worker)
            async with aclosing(watching.frames()) as frames:
                first = await anext(frames)
            assert store.uses is not None
            assert list(first.used_times) == list(store.uses.counts)

    run(test)


def test_what_stays_on_disk_is_said_to_be_there() -> None:
    async def test() -> None:
        async with watched_demo(ram="24MiB", bits=6) as (model, worker, watching):
            store = model.runtime.store
            await answered_at_last(worker)
            async with aclosing(watching.frames()) as frames:
                first = await anext(frames)
            found = set(np.flatnonzero(first.moved_to == TIERS.index("ram")))
            # What was still being read when the last step was over came later.
            assert found <= {8 * layer + e for layer, e in store.in_memory()["ram"]}
            assert 0 < len(found) < 64
            assert watching.about.tiers == ("ram", "disk")

    run(test)


def test_what_is_told_of_an_answer_that_has_ended_is_its_own_statistics() -> None:
    async def test() -> None:
        async with watched_demo() as (_, worker, watching):
            await answered_at_last(worker)
            async with aclosing(watching.frames()) as frames:
                rates = (await anext(frames)).rates
            latest = worker.numbers().latest
            assert latest is not None
            assert rates.tokens_per_s == latest.decode_tokens_per_s
            assert rates.bytes_per_token == latest.bytes_per_token
            assert rates.n_context == latest.prompt_tokens + N_NEW
            assert (rates.n_answers, rates.n_waiting) == (0, 0)

    run(test)


def test_while_answers_are_made_their_speed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "EVERY_S", 0.0)

    async def test() -> None:
        async with watched_demo() as (_, worker, watched):
            rates: list[Rates] = []

            async def watch() -> None:
                async for frame in watched.frames():
                    rates.append(frame.rates)

            watcher = asyncio.ensure_future(watch())
            longer = replace(ASK, sampling=Sampling(max_new_tokens=200))
            await asyncio.gather(answered(worker, longer), answered(worker, longer))
            watched.close()
            await watcher
            under_way = [r for r in rates if r.n_answers]
            assert max(r.n_answers for r in under_way) == 2
            measured = [r for r in under_way if r.tokens_per_s and r.n_answers == 2]
            assert measured
            for r in measured:
                assert r.hit_rate.ram + r.hit_rate.disk == pytest.approx(1.0)
                assert r.predicted_tokens_per_s is None  # that is of an answer alone
                assert r.bound_tokens_per_s is not None

    run(test)


def test_nothing_is_written_down_while_nobody_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with watched_demo() as (_, worker, watched):
            written: list[int] = []
            uses = watched._uses
            monkeypatch.setattr(watched, "_uses", lambda: (written.append(1), uses())[1])
            await answered_at_last(worker)
            assert len(written) == 1  # once it was over

    run(test)


def test_a_watcher_who_goes_away_is_forgotten() -> None:
    async def test() -> None:
        async with watched_demo() as (_, worker, watched):
            async with aclosing(watched.frames()) as frames:
                await anext(frames)
                assert len(watched._wakes) == 1
            assert not watched._wakes
            await answered(worker)

    run(test)
