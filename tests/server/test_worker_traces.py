"""Whatever is asked at the same time, each has the answer it has alone.

Campaign: 500 traces of requests that come, share the beginnings of their prompts, wait, are read
slowly and go away, each seeded one beside what a worker of its own answers.
"""

import asyncio
import random
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from lowmoe.server.asking import Ask, Ended, Failed, Sampling, Text
from lowmoe.server.worker import Worker
from tests.engine.test_batch import prompt
from tests.server.working import working

N_TRACES, N_IN_CAMPAIGN = 12, 500
LIVENESS_S = 30.0


@dataclass(frozen=True, slots=True)
class Request:
    """Of a trace.  after: requests that are asked before; n_read: events that are read before the
    client goes away, None for all; is_slow: it reads when others have had their turn.
    """

    ask: Ask
    after: int
    n_read: int | None
    is_slow: bool


def request_at_random(generator: random.Random, n_requests: int) -> Request:
    letters = [chr(ord("a") + i) for i in range(26)]
    common = prompt(generator.randrange(3), generator.choice([0, 20, 70]))
    sampling = Sampling(
        temperature=generator.choice([0.0, 0.8, 1.5]),
        top_k=generator.choice([None, 5]),
        repetition_penalty=generator.choice([None, 1.3]),
        seed=generator.randrange(1000),
        stop=tuple(generator.sample(letters, generator.choice([0, 0, 2]))),
        max_new_tokens=generator.choice([1, 2, 6, 20, None]),
    )
    own = prompt(generator.randrange(10**6), generator.choice([1, 3, 12, 40]))
    return Request(
        ask=Ask(
            prompt=tuple(common + own),
            sampling=sampling,
            n=generator.choice([1, 1, 1, 3]),
            caller=generator.choice("ab"),
        ),
        after=generator.randrange(n_requests),
        n_read=generator.choice([None, None, None, 0, 1, 3]),
        is_slow=generator.random() < 0.2,
    )


async def answered(worker: Worker, request: Request) -> list[tuple[str, str, int]] | None:
    """Of each answer its text, what ended it and how many tokens it has; None if nobody waited."""
    texts, ends = [""] * request.ask.n, dict[int, Ended]()
    n_left = request.n_read
    async with aclosing(worker.ask(request.ask)) as events:
        if n_left == 0:
            await asyncio.sleep(0)
            return None
        async for event in events:
            assert not isinstance(event, Failed), event
            if isinstance(event, Text):
                texts[event.answer] += event.text
            if isinstance(event, Ended):
                ends[event.answer] = event
            if n_left is not None:
                n_left -= 1
                if n_left == 0:
                    return None
            if request.is_slow:
                await asyncio.sleep(0.002)
    return [(text, ends[i].reason, ends[i].n_new) for i, text in enumerate(texts)]


async def traced(worker: Worker, trace: list[Request]) -> list[list[tuple[str, str, int]] | None]:
    begun = 0
    more = asyncio.Condition()

    async def one(request: Request) -> list[tuple[str, str, int]] | None:
        nonlocal begun
        async with more:
            await more.wait_for(lambda: begun >= request.after)
            begun += 1
            more.notify_all()
        return await answered(worker, request)

    in_order = sorted(range(len(trace)), key=lambda i: trace[i].after)
    begun_in_order = [replace(trace[i], after=place) for place, i in enumerate(in_order)]
    found = await asyncio.gather(*map(one, begun_in_order))
    by_request = dict(zip(in_order, found, strict=True))
    return [by_request[i] for i in range(len(trace))]


def check_traces(folder: Path, seeds: range) -> int:
    """How many answers were compared with those of a worker that was asked nothing else."""

    async def test() -> int:
        n_compared = 0
        async with working(folder, sequences=3, chunk=16) as together:
            for seed in seeds:
                generator = random.Random(seed)
                n_requests = generator.choice([2, 5, 9])
                trace = [request_at_random(generator, n_requests) for _ in range(n_requests)]
                found = await asyncio.wait_for(traced(together, trace), LIVENESS_S)
                # One of each trace, for the sake of time, by a worker whose caches are empty.
                waited = [i for i, answers in enumerate(found) if answers is not None]
                if not waited:
                    continue
                chosen = generator.choice(waited)
                async with working(folder, sequences=1, chunk=16) as alone:
                    request = replace(trace[chosen], n_read=None, is_slow=False)
                    wanted = await asyncio.wait_for(answered(alone, request), LIVENESS_S)
                assert found[chosen] == wanted, f"request {chosen} of trace {seed}"
                n_compared += 1
            numbers = together.numbers()
            assert (numbers.n_waiting, numbers.failed) == (0, 0)
            assert numbers.closed > 0
            assert numbers.reused_tokens > 0
        return n_compared

    return asyncio.run(test())


def test_traces_of_requests_have_the_answers_they_have_alone(model_folder: Path) -> None:
    assert check_traces(model_folder, range(N_TRACES)) >= N_TRACES * 0.8


@pytest.mark.campaign
def test_many_traces_of_requests_have_the_answers_they_have_alone(model_folder: Path) -> None:
    assert check_traces(model_folder, range(N_IN_CAMPAIGN)) >= N_IN_CAMPAIGN * 0.8
