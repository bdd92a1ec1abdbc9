"""The one thread that owns the model, and what the event loop may ask of it.

An ask waits for its turn, its answers are decoded together with those of others, and what comes of
them goes back as events. The same seed gives the same answer, whatever else is or was asked: what a
seeded answer reuses of a cache is what reading its prompt anew would compute. Without a seed
everything is reused, and a turn reads only what is new.

Knows:        the thread, who waits, what happens when something goes wrong, how it all ends.
Ignorant of:  HTTP and dialects; how tokens are computed and chosen.
"""

import asyncio
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable

from lowmoe.api import Model
from lowmoe.engine.answer import Answer
from lowmoe.engine.run_clock import placement
from lowmoe.engine.runtime import Runtime
from lowmoe.engine.statistics import RunStatistics
from lowmoe.errors import LowMoeError, TextError
from lowmoe.experts.store import ExpertStore
from lowmoe.plan.of_run import keep_run
from lowmoe.server.asked import Asked, AskedEvents, Told, offered
from lowmoe.server.asking import Ask, ModelCard, Overloaded, shutting_down
from lowmoe.server.numbers import Numbers, Speed
from lowmoe.server.preparation import Preparation, takes_long
from lowmoe.server.turns import Turns
from lowmoe.settings import read_settings

DEFAULT_WAITING = 64
# Reads at 91 to 94 % of the speed of chunks of 512, each in half the time; 128 at 78 to 83 % (two
# layers of OLMoE-1B-7B's shape, and the demo model, on two cores).
SHORT_CHUNK = 256
MOST_KEPT = 5  # runs of one server, among the RUNS_KEPT (plan/memo.py) of all models

log = logging.getLogger("lowmoe.server")


class Worker:
    """Answers asks with one model, which it closes in the end.  A Service.

    n_waiting: asks that may wait beside as many as the model was loaded for.
    """

    def __init__(self, model: Model, *, name: str, n_waiting: int = DEFAULT_WAITING) -> None:
        session = model.session
        assert session is not None
        self._model, self._session, self._batch = model, session, session.batch
        self._runtime, self._preparation = model.runtime, Preparation(model)
        self.model = card_of(model, name)
        self._n_most = self._runtime.n_sequences + n_waiting
        self._batch.chunk_tokens = chunk_tokens(self._runtime)
        self._changed = threading.Condition()  # guards what follows
        self._turns: Turns[Asked] = Turns()
        self._open = 0  # asks that are not over
        self._closing = self._cancelling = False
        self._under_way: list[tuple[Asked, Told]] = []  # the thread's own
        self._callbacks: list[Callable[[], None]] = []
        self._counts: Counter[str] = Counter()
        self._ended: Counter[str] = Counter()
        self._speed = Speed()
        self._placement = placement(self._runtime)
        self._bandwidths, self._settings = session.bandwidths(), read_settings()
        self._latest: RunStatistics | None = None
        self._n_kept = 0
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    # --- on the event loop

    def ask(self, ask: Ask) -> AskedEvents:
        """Begin to answer; see Service.  What takes long to prepare is prepared on another thread,
        and what is wrong with it raised with the first event.
        """
        self._require_room()
        asked = Asked(ask)
        if takes_long(ask):
            with self._changed:
                self._open += 1
            preparing = asyncio.ensure_future(self._prepare(asked))
            # Also if nobody waits for it: an error that nobody heard would be complained of.
            preparing.add_done_callback(lambda task: task.cancelled() or task.exception())
            return AskedEvents(asked, self._close, preparing)
        asked.prepared = self._preparation.now(ask)
        with self._changed:
            self._open += 1
            self._line_up(asked)
        return AskedEvents(asked, self._close)

    async def count_tokens(self, ask: Ask) -> int:
        """Tokens of its prompt; see Service."""
        return await self._preparation.count_tokens(ask)

    async def _prepare(self, asked: Asked) -> None:
        prepared = None
        try:
            prepared = asked.prepared = await self._preparation.beside(
                asked.ask, is_wanted=lambda: not asked.cancelled
            )
        finally:
            with self._changed:
                if prepared is None or asked.cancelled:
                    self._open -= 1
                else:
                    self._line_up(asked)
                    if self._closing:  # and the thread has ended, maybe
                        self._turn_away()

    def _line_up(self, asked: Asked) -> None:
        """With the lock."""
        self._counts["asked"] += 1
        self._turns.add(asked.ask.caller, asked)
        self._changed.notify()

    async def close(self, grace_s: float = 0.0) -> None:
        """Take no more asks, fail those that have not begun, give the others so many seconds, then
        cancel them; at the end the model is closed.
        """
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._preparation.close()
        await asyncio.to_thread(self._thread.join, grace_s)
        self.cancel_all()
        await asyncio.to_thread(self._thread.join)
        self._model.close()

    def cancel_all(self) -> None:
        """End every answer, and whatever begins, within one token; any thread may call it."""
        self._cancelling = True
        for asked, _ in list(self._under_way):
            asked.stop()

    def _require_room(self) -> None:
        with self._changed:
            full = self._open >= self._n_most
            self._counts["refused"] += self._closing or full
            if self._closing:
                raise shutting_down()
            if full:
                raise Overloaded(
                    f"{self._open} requests are under way or waiting, as many as this server "
                    "takes. Ask again later."
                )

    def _close(self, asked: Asked) -> None:
        """Its client is gone."""
        asked.cancel()
        with self._changed:
            if self._turns.remove(asked.ask.caller, asked):
                self._let_go(asked)

    def _let_go(self, asked: Asked, *, n_answers: int = 0) -> None:
        """So many of its answers are under way no more, or it waits no more.  With the lock."""
        asked.n_under_way -= n_answers
        if asked.n_under_way or self._turns.holds(asked.ask.caller, asked):
            return
        self._open -= 1
        self._counts["closed"] += asked.cancelled
        self._counts["failed"] += asked.error is not None and not asked.cancelled

    def _turn_away(self) -> None:
        """All that wait.  With the lock."""
        for asked in self._turns.remove_all():
            asked.fail(shutting_down())
            self._let_go(asked)
            asked.tell_end()

    # --- for who watches

    def on_step(self, callback: Callable[[], None]) -> None:
        """Call it after every step, on the model's thread, which waits for it; no more once it has
        failed.
        """
        self._callbacks.append(callback)

    def numbers(self) -> Numbers:
        """Now; any thread may call it."""
        under_way, tally = list(self._under_way), self._batch.tally
        with self._changed:
            counts, n_open, n_waiting = dict(self._counts), self._open, len(self._turns)
        longest = max((len(told.answer.context) for _, told in under_way), default=None)
        predict = self._runtime.predict
        return Numbers(
            n_sequences=self._runtime.n_sequences,
            is_closing=self._closing or not self._thread.is_alive(),
            n_open=n_open,
            n_waiting=n_waiting,
            n_under_way=len(under_way),
            n_reading=sum(not told.is_read for _, told in under_way),
            asked=counts.get("asked", 0),
            refused=counts.get("refused", 0),
            failed=counts.get("failed", 0),
            closed=counts.get("closed", 0),
            ended=dict(self._ended),
            prompt_tokens=counts.get("prompt_tokens", 0),
            reused_tokens=counts.get("reused_tokens", 0),
            new_tokens=tally.tokens,
            steps=tally.steps,
            traffic=tally.whole,
            of_steps=tally.traffic,
            tokens_per_s=self._speed.tokens_per_s(),
            predicted_tokens_per_s=None
            if predict is None
            else predict(self._runtime.n_context // 2 if longest is None else longest),
            placement=self._placement,
            latest=self._latest,
        )

    # --- on the model's thread

    def _run(self) -> None:
        while self._wait():
            try:
                self._begin()
                if self._under_way:
                    self._step()
            except Exception as error:
                self._fail_all(_as_told(error))
            self._tell_watchers()

    def _wait(self) -> bool:
        """For something to do; False once there will be nothing more."""
        if self._under_way and not self._closing:
            return True
        with self._changed:
            while not (self._under_way or self._turns or self._closing):
                self._speed.rest()
                self._changed.wait()
            if self._closing:
                self._turn_away()
            return bool(self._under_way) or not self._closing

    def _begin(self) -> None:
        """Let answers join while there is room."""
        while self._turns and self._batch.n_free:
            with self._changed:
                asked = self._turns.next(lambda asked: asked.may_begin)
                if asked is None:
                    return
                asked.n_under_way += 1
                if len(asked.told) == asked.ask.n - 1:
                    self._turns.remove(asked.ask.caller, asked)
            try:
                self._join(asked)
            except Exception as error:
                asked.fail(_as_told(error))
                self._end(asked)

    def _join(self, asked: Asked) -> None:
        prepared, tools = asked.prepared, offered(asked.ask)
        options = prepared.options[len(asked.told)]
        answer = Answer(
            self._runtime,
            prepared.prompt_ids,
            options,
            end_ids=self._runtime.end_ids,
            reuse="any" if options.seed is None else "exact",
            constraint=prepared.form,
            n_logprobs=asked.ask.n_logprobs,
            calls=self._preparation.tool_format.splitter(tools) if tools else None,
        )
        self._batch.join(answer)
        self._under_way.append((asked, asked.begun(answer)))
        if self._cancelling:
            asked.stop()
        self._counts["prompt_tokens"] += answer.n_prompt
        self._counts["reused_tokens"] += answer.n_reused

    def _step(self) -> None:
        self._batch.step()
        self._speed.at(self._batch.tally.tokens)
        for asked, told in list(self._under_way):
            try:
                asked.tell(told)
            except Exception as error:
                asked.fail(_as_told(error))
            if told.has_ended:
                self._leave(asked, told)

    def _tell_watchers(self) -> None:
        for callback in list(self._callbacks):
            try:
                callback()
            except Exception as error:  # which is no answer's fault
                self._callbacks.remove(callback)
                _as_told(error)

    def _leave(self, asked: Asked, told: Told) -> None:
        self._under_way.remove((asked, told))
        self._ended[told.outcome] += 1
        run = told.answer.clock.statistics(self._bandwidths) if told.answer.n_new else None
        if run is not None:
            self._latest, self._placement = run, run.placement
        self._end(asked, told)
        if run is not None:
            self._learn_from(run)

    def _learn_from(self, run: RunStatistics) -> None:
        """Let the first answers that tell something of this machine correct what is predicted."""
        if self._n_kept == MOST_KEPT:
            return
        try:
            self._n_kept += keep_run(self._runtime, run, self._settings)
        except Exception as error:  # which is no answer's fault
            self._n_kept = MOST_KEPT
            _as_told(error)

    def _end(self, asked: Asked, told: Told | None = None) -> None:
        """One of its answers is under way no more."""
        with self._changed:
            if asked.error is not None:
                self._turns.remove(asked.ask.caller, asked)
            self._let_go(asked, n_answers=1)
        asked.tell_end(told)

    def _fail_all(self, error: LowMoeError) -> None:
        """What went wrong was nobody's own: the next asks begin anew."""
        for asked, told in list(self._under_way):
            asked.fail(error)
            try:
                self._batch.leave(told.answer)
            except Exception as another:  # its place is free all the same
                _as_told(another)
            self._leave(asked, told)


def _as_told(error: Exception) -> LowMoeError:
    """What a client may be told; the rest is a bug, and for the log."""
    if isinstance(error, LowMoeError):
        return error
    log.error("the model's thread failed", exc_info=error)
    return LowMoeError(f"{type(error).__name__}: this is a bug of lowmoe; its log says where.")


def chunk_tokens(runtime: Runtime) -> int:
    """Of a prompt at once: others wait for so much between two of their tokens. A client that is
    gone is noticed as late, or between two layers where experts are still read.
    """
    most = runtime.decoder.computation.max_tokens
    store = runtime.store
    if isinstance(store, ExpertStore) and store.has_room_for_all:
        return min(most, SHORT_CHUNK)
    # Where experts come from disk, a chunk takes about as long as reading them, however short it
    # is; and a GPU is quick.
    return most


def card_of(model: Model, name: str) -> ModelCard:
    """What clients are told of a model.  Reads its tokenizer and template now, on one thread."""
    runtime = model.runtime
    folder = None if runtime.folder is None else runtime.folder.path
    return ModelCard(
        name=name,
        created=int(time.time() if folder is None else folder.stat().st_mtime),
        n_context=runtime.n_context,
        can_chat=_has(lambda: (runtime.text.tokenizer, runtime.text.chat_template)),
        can_call_tools=runtime.text.tool_calls is not None,
        thinks=runtime.text.thinking is not None,
    )


def _has(read: Callable[[], object]) -> bool:
    try:
        read()
    except TextError:
        return False
    return True
