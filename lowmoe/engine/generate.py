"""Runs prompts through a model and streams what comes out.

Knows:        streams of one answer or of several, which gives way to which, who is stopped.
Ignorant of:  how answers are decoded; where tokens are shown.
"""

from collections import deque
from collections.abc import Iterator, Sequence

from torch import Tensor

from lowmoe.engine.answer import Answer, Token
from lowmoe.engine.batch import Batch
from lowmoe.engine.constraint import Constraint
from lowmoe.engine.machine import new_pool, ram_read_bandwidth
from lowmoe.engine.options import SamplingOptions
from lowmoe.engine.run_clock import RunClock
from lowmoe.engine.runtime import Runtime
from lowmoe.engine.statistics import Bandwidths, RunStatistics
from lowmoe.errors import UsageError

CLOSED = "the model is closed. Load it again."


class Session:
    """A model and the tokens in its caches; a prompt that begins like one of them is not redone."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.batch = Batch(runtime)
        self._own = self.batch.take([])  # of `forward`
        self._own.taken = False
        self._ram_bandwidth: float | None = None
        self._latest: list[Answer] = []
        self._is_closed = False
        self.last_run: RunClock | None = None

    # --- tokens without an answer

    def rewind(self, ids: Sequence[int]) -> int:
        """Begin anew in a cache that no answer uses, and keep what it and ids have in common at the
        start; returns how many tokens.
        """
        self._make_room()
        self._own = self.batch.take(ids)
        self._own.taken = False
        return self._own.keep(ids)

    def forward(self, ids: Sequence[int]) -> Iterator[Tensor]:
        """Run ids through the model after what is cached; the last hidden state of each chunk,
        [T, H].
        """
        n_chunk = self.batch.chunk_tokens
        for first in range(0, len(ids), n_chunk):
            yield self.batch.run(self._own, list(ids[first : first + n_chunk]))

    def logits(self, hidden: Tensor) -> Tensor:
        """The scores of the next token, [T, V] float32.  hidden: [T, H] from `forward`."""
        with self.batch.computing():
            return self.runtime.decoder.logits(hidden)

    # --- answers

    def token_ids(
        self, prompt_ids: Sequence[int], options: SamplingOptions, *, heed_ends: bool = True
    ) -> Iterator[int]:
        """Token ids after the prompt, until a limit or `stop`, or with heed_ends an end token.

        Raises PromptError for an empty prompt or one that leaves no room in the context, and
        UsageError once this answer has given way to another.
        """
        ends = self.runtime.end_ids if heed_ends else set()
        answer = Answer(self.runtime, prompt_ids, options, end_ids=ends, spelled=False)
        self._latest = [answer]
        return (token.id for _, token in self._together([answer]) if token.id is not None)

    def stream(
        self,
        prompt_ids: Sequence[int],
        options: SamplingOptions,
        *,
        constraint: Constraint | None = None,
        n_logprobs: int | None = None,
    ) -> Iterator[Token]:
        """The same as tokens with their text, ended also by a stop text.

        A prompt that cannot be answered raises now, not at the first token; so does a constraint
        that cannot be kept to. n_logprobs: see Answer.
        """
        all_of_it = self.stream_all(
            [prompt_ids], [options], constraint=constraint, n_logprobs=n_logprobs
        )
        return (token for _, token in all_of_it)

    def stream_all(
        self,
        prompts: Sequence[Sequence[int]],
        options: Sequence[SamplingOptions],
        *,
        constraint: Constraint | None = None,
        n_logprobs: int | None = None,
    ) -> Iterator[tuple[int, Token]]:
        """Tokens of several answers as they come, each with which prompt's it is.

        As many are decoded together as the model was loaded for; as one ends, the next begins.
        options: one for each prompt; constraint, n_logprobs: the same for all.
        """
        form = None if constraint is None else self.runtime.forms.compile(constraint)
        answers = [
            Answer(
                self.runtime,
                ids,
                of_ids,
                end_ids=self.runtime.end_ids,
                constraint=form,
                n_logprobs=n_logprobs,
            )
            for ids, of_ids in zip(prompts, options, strict=True)
        ]
        self._latest = answers  # now: a stop before the first token is asked for counts
        return self._together(answers)

    def close(self) -> None:
        """Give everything back; answers under way raise UsageError at their next token."""
        self._is_closed = True
        self.runtime.close()

    def stop(self) -> None:
        """End what was asked for last at its next token; any thread or signal handler may call."""
        for answer in self._latest:
            answer.cancel()

    def _together(self, answers: list[Answer]) -> Iterator[tuple[int, Token]]:
        batch, waiting = self.batch, deque(answers)
        index = {id(answer): i for i, answer in enumerate(answers)}
        try:
            self._make_room()
            while True:
                for answer in answers:
                    for token in answer.take():
                        yield index[id(answer)], token
                    _raise_what_ended(answer)
                # Meanwhile another stream may have taken steps, which are steps of these too.
                if any(answer.has_new for answer in answers):
                    continue
                if all(answer.end is not None for answer in answers):
                    return
                if self._is_closed:
                    raise UsageError(CLOSED)
                while waiting and batch.n_free:
                    self.last_run = waiting[0].clock
                    batch.join(waiting.popleft())
                batch.step()
        finally:
            for answer in answers:
                batch.leave(answer)

    def _make_room(self) -> None:
        """The answer that began first gives way if there is no other room."""
        if not self.batch.n_free:
            self.batch.leave(self.batch.answers[0], "overtaken")

    # --- how it went

    def statistics(self) -> RunStatistics:
        """Of the answer that began last, as far as it came.  Raises UsageError before the first."""
        if self.last_run is None:
            raise UsageError("nothing has been generated yet, so there are no statistics.")
        return self.last_run.statistics(self.bandwidths())

    def bandwidths(self) -> Bandwidths:
        """Those of this machine, measured once."""
        gpu = self.runtime.gpu
        # Without threads beside it, a GPU has all that is read.
        from_ram = gpu is None or self.runtime.pool is not None
        return Bandwidths(
            gpu=None if gpu is None else gpu.read_bandwidth(),
            ram=self.ram_bandwidth() if from_ram else None,
        )

    def ram_bandwidth(self) -> float:
        """Bytes a second this machine reads from RAM, measured once."""
        if self._ram_bandwidth is None:
            pool = self.runtime.pool or new_pool()
            with self.batch.computing():
                self._ram_bandwidth = ram_read_bandwidth(pool, self.runtime.probe)
        return self._ram_bandwidth


def _raise_what_ended(answer: Answer) -> None:
    if answer.error is not None:
        raise answer.error
    if answer.end == "overtaken":
        raise UsageError(
            "this answer cannot go on: the model was asked something else since it began. "
            "Take all of an answer before the next, or load the model twice."
        )
