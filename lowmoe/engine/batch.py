"""Decodes several answers together: every expert that any of them goes to is read once a token.

Knows:        which answers are under way, in which cache each goes on, whose turn a prompt has.
Ignorant of:  how tokens are chosen, what is done with them; how weights are kept and multiplied.
"""

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from torch import Tensor

from lowmoe.engine.answer import Answer, EndReason
from lowmoe.engine.conversation import Conversation, Reuse, step
from lowmoe.engine.gpu import gpu_failures
from lowmoe.engine.run_clock import Tally
from lowmoe.engine.runtime import Runtime
from lowmoe.errors import UsageError
from lowmoe.experts.lender import NoLongerWanted

# What copying a token from another cache costs of reading it: bytes beside arithmetic. A token's
# 128 KiB in Mixtral-8x7B take some 20 us at the speed of memory, reading it a millisecond or more.
COPY_COST = 1 / 64


class Batch:
    """Up to n_sequences answers at once; they join and leave between any two steps.

    One thread at a time, but for Answer.cancel. Alone or together, an answer's tokens are the same
    where native code computes, bit for bit; see Decoder.step.
    """

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.chunk_tokens = runtime.decoder.computation.max_tokens  # of a prompt, at once
        self.tally = Tally(whole=runtime.store.traffic())
        self._answers: list[Answer] = []
        self._conversations = [Conversation(runtime) for _ in range(runtime.n_sequences)]
        self._turns, self._chunks = itertools.count(1), itertools.count()
        self._one_call = threading.Lock()

    @property
    def answers(self) -> tuple[Answer, ...]:
        """Those under way, in the order they joined."""
        return tuple(self._answers)

    @property
    def n_free(self) -> int:
        """How many more may join."""
        return sum(not c.taken for c in self._conversations)

    def join(self, answer: Answer) -> None:
        """Take part from the next step on.  Raises UsageError if there is no room."""
        conversation = self.take(answer.context, answer.reuse)
        try:
            with self.computing():
                self._copy_what_helps(conversation, answer)
                answer.begin(conversation)
        except BaseException:
            conversation.taken = False
            raise
        self._answers.append(answer)

    def leave(self, answer: Answer, reason: EndReason = "cancelled") -> None:
        """Take no more part; what was computed stays to be gone on from.

        An answer that has not ended ends for this reason.
        """
        if answer in self._answers:
            self._answers.remove(answer)
            answer.conversation.taken = False
        if answer.end is None:
            answer.finish(reason)

    def take(self, ids: Sequence[int], reuse: Reuse = "any") -> Conversation:
        """A cache that nobody uses, the one where ids cost the least; set its `taken` back.

        They cost what is to be copied, and the tokens that are lost with what the cache has beyond,
        which count the less the longer nobody came back to it: a short question between the turns
        of a long conversation is read where a short one was.
        """
        free = [c for c in self._conversations if not c.taken]
        if not free:
            raise UsageError(
                f"{len(self._conversations)} answers are under way, as many as the model was "
                "loaded for. Wait for one to end, or load it for more sequences."
            )
        turn = next(self._turns)

        n_most = max(c.n_common(ids, reuse) for c in self._conversations)

        def cost(c: Conversation) -> float:
            n_kept = c.n_common(ids, reuse)
            copied = n_most * COPY_COST if n_kept < n_most else 0.0
            lost = 0 if c.is_continued_by(ids) else c.n_tokens - n_kept
            return copied + lost / (turn - c.last_taken)

        conversation = min(free, key=lambda c: (cost(c), c.last_taken))
        conversation.taken, conversation.last_taken = True, turn
        return conversation

    def _copy_what_helps(self, conversation: Conversation, answer: Answer) -> None:
        """The beginning of its prompt, where another cache has more of it."""
        ids, reuse = answer.context[:-1], answer.reuse
        donor = max(self._conversations, key=lambda c: c.n_common(ids, reuse))
        n_common = donor.n_common(ids, reuse)
        if n_common - conversation.n_common(ids, reuse) > n_common * COPY_COST:
            conversation.copy_from(donor, n_common)

    def step(self) -> list[Answer]:
        """A chunk of a prompt, then one token of every answer whose prompt is read.

        Returns the answers that have something to `take` or have ended; the latter have left.
        Raises what reading raises; another step tries the same again.
        """
        ended = self._leave_cancelled()
        for answer in self._answers:
            answer.settle()
        joining = self._next_to_read()
        if joining is not None:
            self._read(joining)
            ended += self._leave_cancelled()
        running = [answer for answer in self._answers if answer.is_read]
        if running:
            self._decode(running)
        return ended + running

    def _next_to_read(self) -> Answer | None:
        """The prompt that has waited longest and the one that has the least left take turns, so
        that a short question passes a long text, and none waits for ever.
        """
        unread = [answer for answer in self._answers if not answer.is_read]
        if len(unread) > 1 and next(self._chunks) % 2:
            return min(unread, key=lambda answer: len(answer.missing))
        return unread[0] if unread else None

    def _read(self, answer: Answer) -> None:
        """A chunk of its prompt, or less where it is cancelled meanwhile."""
        ids = answer.missing[: self.chunk_tokens]
        with contextlib.suppress(NoLongerWanted):
            self.run(answer.conversation, ids, is_wanted=lambda: not answer.is_cancelled)

    def run(
        self,
        conversation: Conversation,
        ids: Sequence[int],
        *,
        is_wanted: Callable[[], bool] = lambda: True,
    ) -> Tensor:
        """Tokens of a prompt, chunk_tokens at most.  Returns the last hidden state, [T, H].

        Raises NoLongerWanted before a layer that is_wanted says no of, if experts may be on disk.
        """
        with self.computing(), self.runtime.store.while_wanted(is_wanted):
            try:
                return conversation.forward(ids, whole_chunk=len(ids) == self.chunk_tokens)
            finally:
                whole = self.runtime.store.traffic()
                prompts = self.tally.prompts + (whole - self.tally.whole)
                self.tally = replace(self.tally, whole=whole, prompts=prompts)

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """Threads and scratch serve one call at a time.

        Raises UsageError for a second one, and what gpu_failures raises.
        """
        if not self._one_call.acquire(blocking=False):
            raise UsageError(
                "the model is computing for another thread. Ask from one thread at a time, or load "
                "it twice."
            )
        try:
            with gpu_failures():
                yield
        finally:
            self._one_call.release()

    def _decode(self, running: list[Answer]) -> None:
        decoder = self.runtime.decoder
        with self.computing():
            hidden = step(decoder, [a.conversation for a in running], [a.context for a in running])
            scores = decoder.logits(hidden)  # until they are there, a GPU computes
        self.tally = Tally(
            steps=self.tally.steps + 1,
            tokens=self.tally.tokens + len(running),
            whole=self.runtime.store.traffic(),
            prompts=self.tally.prompts,
        )
        for answer, of_answer in zip(running, scores.unbind(), strict=True):
            answer.go_on(of_answer, self.tally)
            if answer.end is not None:
                self.leave(answer)

    def _leave_cancelled(self) -> list[Answer]:
        cancelled = [answer for answer in self._answers if answer.is_cancelled]
        for answer in cancelled:
            self.leave(answer)
        return cancelled
