"""What ends an answer before its time, and how a worker ends."""

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import pytest

from lowmoe.decoder.decoder import Decoder
from lowmoe.engine.answer import Answer, Token
from lowmoe.engine.batch import Batch
from lowmoe.engine.sampling import Sampler
from lowmoe.errors import FolderError, LowMoeError, MemoryBudgetError, UsageError
from lowmoe.server.asked import Asked, Told
from lowmoe.server.asking import (
    Ask,
    Ended,
    Event,
    Failed,
    Overloaded,
)
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


@pytest.mark.parametrize("n_steps", [0, 1, 3, 4, 5, 9])
def test_a_client_that_goes_away_stops_its_answer_within_one_step(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, n_steps: int
) -> None:
    """Of 15 steps, in 4 of which a prompt is read; another answer goes on undisturbed."""

    async def test() -> None:
        async with working(model_folder, sequences=2, chunk=10) as worker:
            wanted = text_of(await answer(worker, to(2)))
            held = Held(worker, monkeypatch)
            other, leaving = worker.ask(to(2)), worker.ask(to(1, 36))
            await held.take(1)
            await held.take(n_steps)
            n_before = worker.numbers().new_tokens
            await leaving.aclose()
            await held.take(1)
            while worker.numbers().n_under_way == 2:  # the step's end is told a moment later
                await asyncio.sleep(0.001)
            # The other's own token, and one more where the step had begun.
            assert worker.numbers().new_tokens - n_before <= 2
            held.let_go()
            assert text_of(await all_of(other)) == wanted
            with pytest.raises(StopAsyncIteration):
                await anext(leaving)
            assert worker.numbers().closed == 1

    run(test)


def test_one_that_waits_can_go_away(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with working(model_folder, sequences=1) as worker:
            held = Held(worker, monkeypatch)
            first, waiting = worker.ask(to(1)), worker.ask(to(2))
            await held.take(2)
            assert worker.numbers().n_waiting == 1
            await waiting.aclose()
            assert worker.numbers().n_waiting == 0
            held.let_go()
            await all_of(first)
            assert worker.numbers().prompt_tokens == 9  # the other's were never read

    run(test)


def test_a_client_that_does_not_read_holds_nobody_up_and_fills_no_memory(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowmoe.server.outbox.MOST_WAITING", 20)

    async def test() -> tuple[list[Event], list[Event]]:
        async with working(model_folder) as worker:
            long = replace(GREEDY, max_new_tokens=200)
            unread, read = worker.ask(to(1, sampling=long)), worker.ask(to(2))
            good = await all_of(read)
            return good, await all_of(unread)

    good, bad = run(test)
    assert end_of(good).n_new == 12
    assert isinstance(bad[-1], Failed)
    assert "wait to be read" in str(bad[-1].error)
    assert len(bad) < 10  # put together


def test_what_goes_wrong_with_one_answer_fails_that_one(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pick = Sampler.pick

    def broken(sampler: Sampler, scores: Any, context: list[int]) -> int:
        if context[:3] == list(ids_of(1, 3)):
            raise LowMoeError("320 of the model's 320 logits are NaN")
        return pick(sampler, scores, context)

    async def test() -> tuple[list[Event], list[Event]]:
        async with working(model_folder) as worker:
            monkeypatch.setattr(Sampler, "pick", broken)
            found = await asyncio.gather(answer(worker, to(1, n=2)), answer(worker, to(2)))
            return found[0], found[1]

    bad, good = run(test)
    assert isinstance(bad[-1], Failed)
    assert "are NaN" in str(bad[-1].error)
    assert end_of(good).reason == "length"


def test_answers_of_one_ask_that_fail_in_the_same_step_are_told_of_once() -> None:
    async def test() -> None:
        asked = Asked(Ask(prompt="Once", n=2))
        failed = [cast(Answer, FailedAnswer(LowMoeError("all are NaN"))) for _ in range(2)]
        asked.told.extend(Told(number, answer) for number, answer in enumerate(failed))
        for told in asked.told:
            asked.tell(told)
        for told in asked.told:
            asked.tell_end(told)
        ends = [e for e in await asked.outbox.take() if isinstance(e, (Ended, Failed))]
        assert [type(end) for end in ends] == [Failed]

    asyncio.run(test())


@dataclass
class FailedAnswer:
    error: LowMoeError
    end: str = "error"
    n_prompt: int = 0
    n_reused: int = 0
    n_new: int = 3

    def take(self) -> list[Token]:
        return []

    def cancel(self) -> None:
        pass


@pytest.mark.parametrize("kind", [FolderError, MemoryBudgetError])
def test_what_goes_wrong_with_the_machine_fails_those_under_way_and_no_later_one(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, kind: type[LowMoeError]
) -> None:
    run_layers: Callable[..., Any] = Decoder._run
    passes: list[int] = []

    def failing(decoder: Decoder[Any], *rest: Any) -> Any:
        passes.append(1)
        if len(passes) == 5:
            raise kind("the disk is gone")
        return run_layers(decoder, *rest)

    async def test() -> None:
        async with working(model_folder) as worker:
            wanted = [text_of(await answer(worker, to(i))) for i in (1, 2)]
            monkeypatch.setattr(Decoder, "_run", failing)
            for events in await asyncio.gather(*(answer(worker, to(i)) for i in (1, 2))):
                failed = events[-1]
                assert isinstance(failed, Failed)
                assert type(failed.error) is kind
            found = await asyncio.gather(*(answer(worker, to(i)) for i in (1, 2)))
            assert [text_of(events) for events in found] == wanted
            assert worker.numbers().failed == 2
            assert worker.numbers().n_under_way == 0

    run(test)


def test_a_bug_is_logged_and_the_thread_lives_on(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    step = Batch.step

    def broken(batch: Batch) -> Any:
        raise ZeroDivisionError("37 of 0")

    async def test() -> None:
        async with working(model_folder) as worker:
            monkeypatch.setattr(Batch, "step", broken)
            (*_, failed) = await answer(worker, to(1))
            assert isinstance(failed, Failed)
            assert "ZeroDivisionError" in str(failed.error)
            assert "37" not in str(failed.error)
            monkeypatch.setattr(Batch, "step", step)
            assert end_of(await answer(worker, to(1))).n_new == 12

    run(test)
    assert "ZeroDivisionError: 37 of 0" in caplog.text


def test_who_watches_and_fails_disturbs_nobody(
    model_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[int] = []

    def broken() -> None:
        seen.append(1)
        raise ZeroDivisionError("37 of 0")

    async def test() -> None:
        async with working(model_folder) as worker:
            worker.on_step(broken)
            assert end_of(await answer(worker, to(1))).n_new == 12
            assert worker.numbers().failed == 0

    run(test)
    assert len(seen) == 1
    assert "ZeroDivisionError: 37 of 0" in caplog.text


def test_who_watches_hears_that_all_have_failed(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(batch: Batch) -> Any:
        raise FolderError("the disk is gone")

    async def test() -> list[int]:
        async with working(model_folder) as worker:
            seen: list[int] = []
            worker.on_step(lambda: seen.append(worker.numbers().n_under_way))
            monkeypatch.setattr(Batch, "step", broken)
            await answer(worker, to(1))
            await worker.close()
            return seen

    assert run(test)[-1:] == [0]


# --- the end


def test_at_the_end_those_under_way_have_their_time_and_others_are_refused(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        async with working(model_folder, sequences=1) as worker:
            held = Held(worker, monkeypatch)
            first, waiting = worker.ask(to(1)), worker.ask(to(2))
            await held.take(2)
            assert not worker.numbers().is_closing
            closing = asyncio.ensure_future(worker.close(grace_s=20))
            await asyncio.sleep(0)
            assert worker.numbers().is_closing
            with pytest.raises(Overloaded, match="shutting down"):
                worker.ask(to(3))
            held.let_go()
            assert end_of(await all_of(first)).reason == "length"
            (failed,) = await all_of(waiting)
            assert isinstance(failed, Failed)
            assert isinstance(failed.error, Overloaded)
            await closing

    run(test)


def test_whoever_takes_longer_is_cancelled_and_told_so(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        async with working(model_folder, sequences=1) as worker:
            held = Held(worker, monkeypatch)
            first = worker.ask(to(1, sampling=replace(GREEDY, max_new_tokens=300)))
            await held.take(3)
            closing = asyncio.ensure_future(worker.close())
            while not worker._cancelling:
                await asyncio.sleep(0)
            held.let_go()
            end = end_of(await all_of(first))
            assert (end.reason, end.n_new) in {("cancelled", 3), ("cancelled", 4)}
            await closing
            with pytest.raises(UsageError, match="is closed"):
                worker._model.logits([1])

    run(test)


def test_closing_an_idle_worker_leaves_no_thread(model_folder: Path) -> None:
    before = threading.active_count()

    async def test() -> None:
        async with working(model_folder):
            assert threading.active_count() == before + 1

    run(test)
    assert not [t for t in threading.enumerate() if t.name == "model"]
