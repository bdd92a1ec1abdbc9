"""One thread owns the model: whose turn it is, what clients are told, what ends what."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

import pytest

import lowmoe
from lowmoe.decoder.decoder import Decoder
from lowmoe.engine.batch import Batch
from lowmoe.engine.constraint import JsonSchema, Regex
from lowmoe.engine.messages import Message, Tool, ToolChoice
from lowmoe.engine.sampling import Sampler
from lowmoe.engine.text_parts import TextParts
from lowmoe.engine.thinking import thinking_of
from lowmoe.errors import FolderError, LowMoeError, MemoryBudgetError, PromptError, UsageError
from lowmoe.experts.store import ExpertStore
from lowmoe.server.asked import AskedEvents
from lowmoe.server.asking import (
    Ask,
    CallArguments,
    CallBegan,
    Ended,
    Event,
    Failed,
    Overloaded,
    Reading,
    Sampling,
    Text,
)
from lowmoe.server.worker import Worker, chunk_tokens
from tests.engine.test_batch import prompt
from tests.talking_mixtral import CHAT_TEMPLATE, copy_of, learned_tokenizer

T = TypeVar("T")
GREEDY = Sampling(temperature=0.0, max_new_tokens=12)


class Held:
    """A worker whose thread stops before every step until it is told how many to take."""

    def __init__(self, worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
        self.worker, self._steps = worker, threading.Semaphore(0)
        self._taken = threading.Semaphore(0)
        step = Batch.step

        def held(batch: Batch) -> Any:
            self._steps.acquire()
            try:
                return step(batch)
            finally:
                self._taken.release()

        monkeypatch.setattr(Batch, "step", held)

    async def take(self, n_steps: int) -> None:
        """So many steps; returns when the last has been told of."""
        for _ in range(n_steps):
            self._steps.release()
            await asyncio.to_thread(self._taken.acquire)

    def let_go(self) -> None:
        """From now on it does not stop."""
        for _ in range(10_000):
            self._steps.release()


@asynccontextmanager
async def working(
    folder: Path, *, sequences: int = 4, n_waiting: int = 64, chunk: int | None = None
) -> AsyncIterator[Worker]:
    model = lowmoe.load(folder, sequences=sequences, threads=1)
    worker = Worker(model, name="tiny", n_waiting=n_waiting)
    if chunk is not None:
        worker._batch.chunk_tokens = chunk
    try:
        yield worker
    finally:
        await asyncio.wait_for(worker.close(), 30)


def ids_of(seed: int, n_tokens: int) -> tuple[int, ...]:
    return tuple(prompt(seed, n_tokens))


def to(seed: int, n_tokens: int = 9, **fields: Any) -> Ask:
    return Ask(prompt=ids_of(seed, n_tokens), **{"sampling": GREEDY, **fields})


async def all_of(events: AskedEvents) -> list[Event]:
    return [event async for event in events]


async def answer(worker: Worker, ask: Ask) -> list[Event]:
    return await all_of(worker.ask(ask))


def text_of(events: list[Event], which: int = 0) -> str:
    return "".join(e.text for e in events if isinstance(e, Text) and e.answer == which)


def end_of(events: list[Event], which: int = 0) -> Ended:
    (end,) = [e for e in events if isinstance(e, Ended) and e.answer == which]
    return end


def run(test: Callable[[], Awaitable[T]]) -> T:
    async def limited() -> T:
        return await asyncio.wait_for(test(), 30)

    return asyncio.run(limited())


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


# --- what ends an answer early


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


# --- forms, logprobs, tools, thinking

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
