"""Answers that are decoded together come, go and end without being noticed by each other."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lowmoe.engine.answer import Answer, Token
from lowmoe.engine.batch import Batch
from lowmoe.engine.generate import Session
from lowmoe.engine.load import load_folder
from lowmoe.engine.load_options import LoadOptions
from lowmoe.engine.options import SamplingOptions
from lowmoe.engine.runtime import Runtime
from lowmoe.errors import FolderError, LowMoeError, UsageError
from tests.talking_mixtral import VOCABULARY

GREEDY = SamplingOptions(temperature=0.0, max_new_tokens=12)
N_TRACES = 500


@pytest.fixture(scope="module")
def runtime(model_folder: Path) -> Iterator[Runtime]:
    runtime = load_folder(model_folder, LoadOptions(sequences=4, threads=1))
    yield runtime
    runtime.close()


@pytest.fixture
def batch(runtime: Runtime) -> Batch:
    return Batch(runtime)


def prompt(seed: int, n_tokens: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(VOCABULARY) for _ in range(n_tokens)]


def answer_to(
    runtime: Runtime,
    ids: list[int],
    options: SamplingOptions = GREEDY,
    *,
    ends: set[int] | None = None,
    **how: Any,
) -> Answer:
    return Answer(runtime, ids, options, end_ids=ends or set(), **how)


def all_of(batch: Batch, *answers: Answer) -> list[list[Token]]:
    """Every token of these, which join as there is room."""
    waiting, found = list(answers), [list[Token]() for _ in answers]
    while waiting or batch.answers:
        while waiting and batch.n_free:
            batch.join(waiting.pop(0))
        batch.step()
        for of_answer, answer in zip(found, answers, strict=True):
            of_answer += answer.take()
    return found


# --- together as alone


@dataclass(frozen=True, slots=True)
class Asked:
    """Of a trace: when an answer is asked for, and after how many tokens it is cancelled."""

    ids: list[int]
    options: SamplingOptions
    at_step: int
    n_until_cancelled: int | None


def asked_at_random(generator: random.Random) -> Asked:
    letters = [chr(ord("a") + i) for i in range(26)]
    return Asked(
        ids=prompt(generator.randrange(10**6), generator.choice([1, 2, 3, 9, 20, 40])),
        options=SamplingOptions(
            temperature=generator.choice([0.0, 0.8, 1.5]),
            repetition_penalty=generator.choice([1.0, 1.3]),
            seed=generator.randrange(1000),
            stop=tuple(generator.sample(letters, generator.choice([0, 2]))),
            max_new_tokens=generator.choice([1, 4, 15]),
        ),
        at_step=generator.randrange(20),
        n_until_cancelled=generator.choice([None, None, 0, 3]),
    )


def ends_of(asked: Asked) -> set[int]:
    return set(prompt(asked.at_step, 8))


def traced(runtime: Runtime, trace: list[Asked], n_chunk: int) -> list[tuple[list[Token], Any]]:
    """Tokens of each, and what ended it, with all of them in one batch."""
    batch = Batch(runtime)
    batch.chunk_tokens = n_chunk
    answers = [answer_to(runtime, a.ids, a.options, ends=ends_of(a), reuse="none") for a in trace]
    found = [list[Token]() for _ in answers]
    waiting = sorted(range(len(trace)), key=lambda i: trace[i].at_step)
    step = 0
    while waiting or batch.answers:
        while waiting and batch.n_free and trace[waiting[0]].at_step <= step:
            batch.join(answers[waiting.pop(0)])
        for answer in batch.step():
            which = answers.index(answer)
            found[which] += answer.take()
        for asked, answer in zip(trace, answers, strict=True):
            if asked.n_until_cancelled is not None and answer.n_new >= asked.n_until_cancelled:
                answer.cancel()
        step += 1
    assert batch.n_free == runtime.n_sequences
    return [(tokens, answer.end) for tokens, answer in zip(found, answers, strict=True)]


def test_traces_of_answers_that_come_and_go_have_the_tokens_they_have_alone(
    runtime: Runtime,
) -> None:
    reasons = set()
    for seed in range(N_TRACES):
        generator = random.Random(seed)
        trace = [asked_at_random(generator) for _ in range(generator.choice([2, 5, 9]))]
        n_chunk = generator.choice([7, 64])
        found = traced(runtime, trace, n_chunk)
        chosen = generator.randrange(len(trace))  # one of each trace, for the sake of time
        (wanted,) = traced(runtime, [trace[chosen]], n_chunk)
        assert found[chosen] == wanted, f"answer {chosen} of trace {seed}"
        reasons |= {end for _, end in found}
    assert reasons == {"end", "stop", "length", "cancelled"}


@pytest.mark.parametrize("n_together", [2, 4])
def test_scores_are_the_same_bits(
    runtime: Runtime, n_together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[int, list[Tensor]] = {}
    go_on = Answer.go_on

    def seeing(answer: Answer, scores: Tensor, *rest: Any) -> None:
        seen.setdefault(id(answer), []).append(scores.clone())
        go_on(answer, scores, *rest)

    monkeypatch.setattr(Answer, "go_on", seeing)
    found: list[list[Tensor]] = []
    for n in (n_together, 1):
        answers = [answer_to(runtime, prompt(i, 5 * i + 1)) for i in range(n_together)]
        for group in [answers] if n > 1 else [[answer] for answer in answers]:
            all_of(Batch(runtime), *group)
        found += [torch.stack(seen[id(answer)]) for answer in answers]
    for i in range(n_together):
        assert torch.equal(found[i], found[n_together + i])


def test_whoever_waits_for_room_has_the_answer_it_has_at_once(runtime: Runtime) -> None:
    prompts = [prompt(i, 6) for i in range(9)]
    session = Session(runtime)
    found: list[list[Token]] = [[] for _ in prompts]
    order = []
    for index, token in session.stream_all(prompts, [GREEDY] * 9):
        found[index].append(token)
        order.append(index)
    assert found == [list(Session(runtime).stream(p, GREEDY)) for p in prompts]
    assert order != sorted(order)  # they came together
    assert order.index(4) > order.index(3)


# --- whose turn it is


def test_a_long_prompt_holds_the_others_up_for_one_chunk_a_token(runtime: Runtime) -> None:
    batch = Batch(runtime)
    batch.chunk_tokens = 10
    first, second = answer_to(runtime, prompt(1, 4)), answer_to(runtime, prompt(2, 41))
    batch.join(first)
    assert batch.step() == [first]
    batch.join(second)
    n_made = []
    while second.n_new == 0:
        batch.step()
        n_made.append((first.n_new, len(second.missing)))
    # Chunks of 10 of the 40 tokens before the last; the last goes with the step after them.
    assert n_made == [(2, 30), (3, 20), (4, 10), (5, 0)]


def test_prompts_are_read_in_the_order_they_came(runtime: Runtime) -> None:
    batch = Batch(runtime)
    batch.chunk_tokens = 10
    answers = [answer_to(runtime, prompt(i, 21)) for i in range(3)]
    for answer in answers:
        batch.join(answer)
    begun: list[list[bool]] = []
    for _ in range(6):
        batch.step()
        begun.append([answer.n_new > 0 for answer in answers])
    no, yes = False, True
    assert begun == [
        [no, no, no],
        [yes, no, no],
        [yes, no, no],
        [yes, yes, no],
        [yes, yes, no],
        [yes, yes, yes],
    ]


def test_a_short_prompt_passes_a_long_one_that_goes_on_all_the_same(runtime: Runtime) -> None:
    batch = Batch(runtime)
    batch.chunk_tokens = 10
    long, other, short = (answer_to(runtime, prompt(i, n)) for i, n in enumerate((101, 71, 11)))
    for answer in (long, other, short):
        batch.join(answer)
    left = []
    for _ in range(4):
        batch.step()
        left.append((len(long.missing), len(other.missing), short.n_new > 0))
    assert left == [(90, 70, False), (90, 70, True), (80, 70, True), (80, 60, True)]


def test_there_is_room_for_so_many_and_no_more(runtime: Runtime, batch: Batch) -> None:
    answers = [answer_to(runtime, prompt(i, 3)) for i in range(5)]
    for answer in answers[:4]:
        batch.join(answer)
    assert batch.n_free == 0
    with pytest.raises(UsageError, match=r"4 answers are under way, .*\. Wait for one to end"):
        batch.join(answers[4])
    batch.leave(answers[2])
    assert (answers[2].end, batch.n_free) == ("cancelled", 1)
    batch.join(answers[4])
    assert len(all_of(batch)) == 0
    assert [a.end for a in answers] == ["length", "length", "cancelled", "length", "length"]


# --- what is kept


def test_a_prompt_goes_on_where_most_of_it_is(runtime: Runtime, batch: Batch) -> None:
    talks = [prompt(i, 30) for i in range(4)]
    all_of(batch, *[answer_to(runtime, ids) for ids in talks])
    for ids in reversed(talks):
        again = answer_to(runtime, [*ids[:28], 1, 2, 3])
        all_of(batch, again)
        assert again.n_reused == 28


def test_however_long_the_next_turn_is_it_goes_on_from_the_last(
    runtime: Runtime, batch: Batch
) -> None:
    first = answer_to(runtime, prompt(1, 20))
    all_of(batch, first, answer_to(runtime, prompt(2, 20)))
    second = answer_to(runtime, [*first.context, *prompt(3, 200)])
    all_of(batch, second)
    assert second.n_reused == 20 + 11


def test_a_prompt_that_shares_little_takes_the_place_used_longest_ago(
    runtime: Runtime, batch: Batch
) -> None:
    talks = [prompt(i, 30) for i in range(4)]
    for ids in talks:
        all_of(batch, answer_to(runtime, ids))
    other = answer_to(runtime, [*talks[3][:5], *prompt(9, 20)])
    all_of(batch, other)
    assert other.n_reused == 5  # copied; the first talk is no longer there
    assert max(c.n_common(talks[0]) for c in batch._conversations) == 0
    kept = [batch.take(ids).n_common(ids) for ids in talks[1:]]
    assert kept == [30, 30, 30]


def test_what_an_answer_said_is_kept_for_the_next_turn(runtime: Runtime, batch: Batch) -> None:
    first = answer_to(runtime, prompt(1, 20))
    all_of(batch, first)
    second = answer_to(runtime, [*first.context, 5, 6])
    all_of(batch, second)
    # All but the token that ended it, which was never run.
    assert (second.n_reused, second.n_prompt) == (20 + 11, 20 + 12 + 2)
    fresh = answer_to(runtime, [*first.context, 5, 6], reuse="none")
    all_of(batch, fresh)
    assert fresh.n_reused == 0


@pytest.mark.parametrize("n_more", [0, 3])
def test_a_short_question_does_not_take_the_place_of_a_long_conversation(
    runtime: Runtime, batch: Batch, n_more: int
) -> None:
    long, other = prompt(1, 200), prompt(2, 200)
    all_of(batch, answer_to(runtime, long), answer_to(runtime, other))
    for i in range(2 + n_more):  # more than there is room for beside the two
        all_of(batch, answer_to(runtime, prompt(10 + i, 20)))
    for ids in (long, other):
        again = answer_to(runtime, [*ids, 1, 2])
        all_of(batch, again)
        assert again.n_reused == 200


def test_a_question_about_the_beginning_leaves_the_end_of_a_long_conversation(
    runtime: Runtime, batch: Batch
) -> None:
    long = prompt(1, 200)
    all_of(batch, answer_to(runtime, long))
    branch = answer_to(runtime, [*long[:60], 1, 2, 3])
    all_of(batch, branch)
    again = answer_to(runtime, [*long, 1, 2])
    all_of(batch, again)
    assert again.n_reused == 200


def test_what_several_prompts_begin_with_is_read_once_and_copied(
    runtime: Runtime, batch: Batch
) -> None:
    common = prompt(1, 120)
    first, *others = (answer_to(runtime, [*common, *prompt(10 + i, 9)]) for i in range(4))
    batch.join(first)
    batch.step()
    for other in others:  # while the first is under way
        batch.join(other)
    found = all_of(batch)
    assert found == []
    assert [answer.n_reused for answer in others] == [120, 120, 120]
    alone = [answer_to(runtime, [*common, *prompt(10 + i, 9)]) for i in range(4)]
    for answer in alone:
        all_of(Batch(runtime), answer)
    assert [a.context for a in (first, *others)] == [a.context for a in alone]


def test_who_asks_the_same_again_goes_on_in_the_same_cache(runtime: Runtime, batch: Batch) -> None:
    for n_reused in (0, 19, 19):
        answer = answer_to(runtime, prompt(1, 20))
        all_of(batch, answer)
        assert answer.n_reused == n_reused
    assert sorted(c.n_tokens for c in batch._conversations) == [0, 0, 0, 31]


def test_a_conversation_that_nobody_comes_back_to_gives_way_in_the_end(
    runtime: Runtime, batch: Batch
) -> None:
    all_of(batch, answer_to(runtime, prompt(1, 200)))
    for i in range(40):
        all_of(batch, answer_to(runtime, prompt(10 + i, 20)))
    again = answer_to(runtime, [*prompt(1, 200), 1, 2])
    all_of(batch, again)
    assert again.n_reused == 0


def test_where_only_what_is_exact_is_reused_what_was_said_before_changes_no_bit(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prompt(1, 50)
    batch = Batch(runtime)
    batch.chunk_tokens = 20
    said = answer_to(runtime, first)
    all_of(batch, said)
    ids = [*said.context, *prompt(2, 30)]
    seen: list[list[Tensor]] = []
    go_on = Answer.go_on

    def seeing(answer: Answer, scores: Tensor, *rest: Any) -> None:
        seen[-1].append(scores.clone())
        go_on(answer, scores, *rest)

    monkeypatch.setattr(Answer, "go_on", seeing)
    fresh = Batch(runtime)
    fresh.chunk_tokens = 20
    n_reused = []
    for where, reuse in ((fresh, "none"), (batch, "exact"), (batch, "exact"), (batch, "any")):
        seen.append([])
        answer = answer_to(runtime, ids, reuse=reuse)
        all_of(where, answer)
        n_reused.append(answer.n_reused)
    # Two chunks of the first prompt; four of the second, which the first "exact" one has read.
    assert n_reused == [0, 40, 80, 91]
    assert all(
        torch.equal(a, b) for again in seen[1:3] for a, b in zip(seen[0], again, strict=True)
    )


def test_the_same_prompt_has_the_same_answer_in_the_cache_or_not_alone_or_not(
    runtime: Runtime,
) -> None:
    ids = prompt(3, 20)
    (wanted,) = all_of(Batch(runtime), answer_to(runtime, ids))
    batch = Batch(runtime)
    for n_others in (0, 1, 3):
        others = [answer_to(runtime, prompt(10 + i, 7)) for i in range(n_others)]
        same = answer_to(runtime, ids)
        found = all_of(batch, same, *others)
        assert found[0] == wanted
        assert same.n_reused == (19 if n_others else 0)


# --- how it ends


def test_each_ends_for_its_own_reason(runtime: Runtime, batch: Batch) -> None:
    ids = prompt(1, 9)
    plain = answer_to(runtime, ids)
    (tokens,) = all_of(batch, plain)
    text = "".join(t.text for t in tokens)
    third = plain.context[len(ids) + 2]
    n_before = plain.context[len(ids) :].index(third)
    ended = answer_to(runtime, ids, ends={third})
    stopped = answer_to(runtime, ids, replace(GREEDY, stop=(text[3:6],)))
    short = answer_to(runtime, ids, replace(GREEDY, max_new_tokens=4))
    found = all_of(batch, ended, stopped, short)
    assert [a.end for a in (plain, ended, stopped, short)] == ["length", "end", "stop", "length"]
    assert [t.id for t in found[0] if t.id is not None] == plain.context[9 : 9 + n_before]
    assert "".join(t.text for t in found[1]) == text[: text.find(text[3:6])]
    assert short.n_new == 4
    assert ended.n_new == n_before + 1


def test_a_full_context_ends_one_and_not_the_others(runtime: Runtime, batch: Batch) -> None:
    long = answer_to(runtime, prompt(1, runtime.n_context - 3), replace(GREEDY, max_new_tokens=9))
    other = answer_to(runtime, prompt(2, 5), replace(GREEDY, max_new_tokens=9))
    all_of(batch, long, other)
    assert (long.n_new, long.end) == (3, "length")
    assert (other.n_new, other.end) == (9, "length")


def test_a_cancelled_answer_has_no_further_token(runtime: Runtime, batch: Batch) -> None:
    batch.chunk_tokens = 5
    waiting, running = answer_to(runtime, prompt(1, 30)), answer_to(runtime, prompt(2, 2))
    batch.join(running)
    batch.step()
    batch.join(waiting)
    batch.step()
    n_read = len(waiting.missing)
    waiting.cancel()
    running.cancel()
    assert set(map(id, batch.step())) == {id(waiting), id(running)}
    assert (waiting.n_new, running.n_new) == (0, 2)
    assert len(waiting.missing) == n_read
    assert (waiting.end, running.end, batch.n_free) == ("cancelled", "cancelled", 4)


def test_what_goes_wrong_with_one_ends_that_one(
    runtime: Runtime, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad = answer_to(runtime, prompt(1, 5)), answer_to(runtime, prompt(2, 5))
    (wanted,) = all_of(Batch(runtime), answer_to(runtime, prompt(1, 5)))

    def broken(*_: object) -> int:
        raise LowMoeError("320 of the model's 320 logits are NaN")

    monkeypatch.setattr(bad._sampler, "pick", broken)
    assert all_of(batch, good, bad) == [wanted, []]
    assert bad.end == "error"
    with pytest.raises(LowMoeError, match="are NaN"):
        raise bad.error or AssertionError
    assert good.end == "length"


def test_a_step_that_failed_is_tried_again(
    runtime: Runtime, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = [answer_to(runtime, prompt(i, 5 + i)) for i in range(3)]
    wanted = all_of(Batch(runtime), *[answer_to(runtime, prompt(i, 5 + i)) for i in range(3)])
    failing = Failing(runtime)
    monkeypatch.setattr(type(runtime.decoder), "_run", lambda *given: failing.run(*given))
    monkeypatch.setattr(type(runtime.decoder), "logits", lambda *given: failing.logits(*given))
    found = [list[Token]() for _ in answers]
    for answer in answers:
        batch.join(answer)
    n_failed = 0
    while batch.answers:
        try:
            batch.step()
        except FolderError:
            n_failed += 1
        for of_answer, answer in zip(found, answers, strict=True):
            of_answer += answer.take()
    assert found == wanted
    assert n_failed > 6


class Failing:
    """Every third pass fails at its end, every fourth when its scores are asked for."""

    def __init__(self, runtime: Runtime) -> None:
        self._run: Callable[..., Tensor] = type(runtime.decoder)._run
        self._logits: Callable[..., Tensor] = type(runtime.decoder).logits
        self._n = 0

    def run(self, *arguments: Any) -> Tensor:
        return self._or_fail(self._run, 3, arguments)

    def logits(self, *arguments: Any) -> Tensor:
        return self._or_fail(self._logits, 4, arguments)

    def _or_fail(self, work: Callable[..., Tensor], nth: int, arguments: Any) -> Tensor:
        self._n += 1
        done = work(*arguments)
        if self._n % nth == 0:
            raise FolderError("the disk is gone")
        return done


# --- what is counted


def test_what_is_read_for_several_is_shared_among_their_tokens(runtime: Runtime) -> None:
    all_of(Batch(runtime), answer_to(runtime, [7]))  # from now on its experts are in RAM
    batch, session = Batch(runtime), Session(runtime)
    answers = [answer_to(runtime, [7]) for _ in range(4)]  # the same, so their experts are too
    all_of(batch, *answers)
    # Two experts of two layers, and what is dense, for four tokens at once.
    step_bytes = runtime.dense_bytes_per_token + 4 * runtime.store.expert_bytes
    for answer in answers:
        s = answer.clock.statistics(session.bandwidths())
        assert s.bytes_per_token.ram == step_bytes / 4
        assert s.bound_tokens_per_s == pytest.approx(session.ram_bandwidth() / step_bytes)
    assert (batch.tally.steps, batch.tally.tokens) == (12, 48)


def test_a_prompt_that_is_read_meanwhile_is_not_put_down_to_decoding(runtime: Runtime) -> None:
    batch, session = Batch(runtime), Session(runtime)
    first = answer_to(runtime, [7])
    batch.join(first)
    batch.step()
    late = answer_to(runtime, prompt(1, 200), replace(GREEDY, max_new_tokens=1))
    batch.join(late)
    all_of(batch)
    read = first.clock.statistics(session.bandwidths()).bytes_per_token.ram
    # Of 11 steps one had a second token, with four experts of its own at most.
    most = 11 * runtime.dense_bytes_per_token + (11 * 4 + 4) * runtime.store.expert_bytes
    assert read <= most / 12 + 1  # a rounding


def test_speed_is_predicted_of_an_answer_that_is_alone(runtime: Runtime) -> None:
    predicting = replace(runtime, predict=lambda n_cached: 100.0 + n_cached)
    batch, session = Batch(predicting), Session(predicting)

    def predicted(answer: Answer) -> float | None:
        return answer.clock.statistics(session.bandwidths()).predicted_tokens_per_s

    alone, *together = (answer_to(predicting, [7]) for _ in range(3))
    all_of(batch, alone)
    assert predicted(alone) == 100 + 1 + 6  # in the middle of 12 tokens
    all_of(batch, *together)
    assert [predicted(answer) for answer in together] == [None, None]
    first, late = answer_to(predicting, [7]), answer_to(predicting, prompt(1, 200))
    batch.join(first)
    batch.step()
    batch.join(late)
    batch.step()  # a chunk of a prompt took its time
    assert predicted(first) is None
