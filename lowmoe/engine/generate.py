"""Runs prompts through a model and streams what comes out.

Knows:        prefill and decode, when to stop, what is in the cache, what a run moved, the clock.
Ignorant of:  how weights are kept and multiplied; where tokens are shown.
"""

import contextlib
import functools
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowmoe.decoder.computation import Cache
from lowmoe.engine.gpu import gpu_memory
from lowmoe.engine.machine import new_pool, ram_read_bandwidth
from lowmoe.engine.options import SamplingOptions
from lowmoe.engine.runtime import Runtime
from lowmoe.engine.sampling import Sampler
from lowmoe.engine.statistics import (
    Bandwidths,
    PerTier,
    RunStatistics,
    bound_tokens_per_s,
    hit_rate,
)
from lowmoe.engine.text import StopText, StreamingDetokenizer
from lowmoe.errors import PromptError, UsageError
from lowmoe.experts.ledger import Traffic


@dataclass(frozen=True, slots=True)
class Token:
    """One token of an answer.  text: what became printable with it, often a word, maybe nothing.

    id: None where an answer has ended and text is left that was held back, because it might have
    become a stop string or a character.
    """

    id: int | None
    text: str


class Session:
    """A model and the tokens in its cache; a prompt that begins like the last one is not redone."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.chunk_tokens = runtime.decoder.computation.max_tokens
        self._cached: list[int] = []
        self._n_rewinds = 0  # tells a stream that another has taken the cache
        self._ram_bandwidth: float | None = None
        self._stop = threading.Event()
        self._one_call = threading.Lock()
        self.last_run: _Run | None = None

    @functools.cached_property
    def _cache(self) -> Cache:
        """Made when it is first needed: on a GPU it takes all its memory at once."""
        with gpu_memory():
            return self.runtime.decoder.new_cache(self.runtime.n_context)

    def forward(self, ids: Sequence[int]) -> Iterator[Tensor]:
        """Run ids through the model after what is cached; the last hidden state of each chunk,
        [T, H].
        """
        for first in range(0, len(ids), self.chunk_tokens):
            chunk = list(ids[first : first + self.chunk_tokens])
            del self._cached[self._cache.n_tokens :]  # what an interrupted pass may have left
            with self._computing():
                hidden = self.runtime.decoder.forward(torch.tensor(chunk), self._cache)
            self._cached += chunk
            yield hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """The scores of the next token, [T, V] float32.  hidden: [T, H] from `forward`."""
        with self._computing():
            return self.runtime.decoder.logits(hidden)

    @contextlib.contextmanager
    def _computing(self) -> Iterator[None]:
        """Threads and scratch serve one call at a time.

        Raises UsageError for a second one, MemoryBudgetError as gpu_memory.
        """
        if not self._one_call.acquire(blocking=False):
            raise UsageError(
                "the model is computing for another thread. Ask from one thread at a time, or load "
                "it twice."
            )
        try:
            with gpu_memory():
                yield
        finally:
            self._one_call.release()

    def rewind(self, ids: Sequence[int]) -> int:
        """Keep what the cache and ids have in common at the start, as far as it can be set back to
        that; returns how many tokens.
        """
        self._n_rewinds += 1
        n_common = 0
        for old, new in zip(self._cached, ids, strict=False):
            if old != new:
                break
            n_common += 1
        n_kept = self._cache.keep(n_common)
        del self._cached[n_kept:]
        return n_kept

    def stop(self) -> None:
        """End the stream made last at its next token; any thread or signal handler may call it."""
        self._stop.set()

    def token_ids(
        self, prompt_ids: Sequence[int], options: SamplingOptions, *, heed_ends: bool = True
    ) -> Iterator[int]:
        """Token ids after the prompt, until a limit or `stop`, or with heed_ends an end token.

        Raises PromptError for an empty prompt or one that leaves no room in the context, and
        UsageError once something else was asked of the session meanwhile.
        """
        self.check_prompt(prompt_ids)
        self._stop.clear()  # now: a stop before the first token is asked for counts
        return self._token_ids(prompt_ids, options, heed_ends=heed_ends)

    def _token_ids(
        self, prompt_ids: Sequence[int], options: SamplingOptions, *, heed_ends: bool
    ) -> Iterator[int]:
        run = self.last_run = _Run(self.runtime, len(prompt_ids))
        try:
            yield from self._answer(run, prompt_ids, options, heed_ends=heed_ends)
        finally:
            run.ended()

    def _answer(
        self,
        run: "_Run",
        prompt_ids: Sequence[int],
        options: SamplingOptions,
        *,
        heed_ends: bool,
    ) -> Iterator[int]:
        # The last prompt token is always run again, for its logits are what the answer begins with;
        # and alone, since many tokens at once round otherwise than one. So the same prompt has the
        # same answer whether or not it was in the cache.
        n_kept = self.rewind(prompt_ids[:-1])
        turn = self._n_rewinds
        if self._stop.is_set():
            return
        for _ in self.forward(prompt_ids[n_kept:-1]):
            if self._stop.is_set():
                return
        scores = self._scores_after(prompt_ids[-1])
        run.prefilled(len(prompt_ids) - n_kept)
        context, sampler = list(prompt_ids), Sampler(options)
        ends = self._end_ids() if heed_ends else set()
        n_most = min(len(prompt_ids) + options.max_new_tokens, self.runtime.n_context)
        while True:
            token_id = sampler.pick(scores, context)
            run.token()
            context.append(token_id)
            if token_id in ends:
                return
            yield token_id
            if self._stop.is_set() or len(context) >= n_most:
                return
            self._require_turn(turn)
            scores = self._scores_after(token_id)

    def _scores_after(self, token_id: int) -> Tensor:
        """Run one token; the scores of the next, [V].  Until they are there, a GPU computes."""
        (hidden,) = self.forward([token_id])
        return self.logits(hidden)[0]

    def _require_turn(self, turn: int) -> None:
        if turn != self._n_rewinds:
            raise UsageError(
                "this answer cannot go on: the model was asked something else since it began. "
                "Take all of an answer before the next, or load the model twice."
            )

    def stream(self, prompt_ids: Sequence[int], options: SamplingOptions) -> Iterator[Token]:
        """The same as tokens with their text, ended also by a stop text.

        A prompt that cannot be answered raises now, not at the first token.
        """
        return self._spelled(self.token_ids(prompt_ids, options), options)

    def _spelled(self, token_ids: Iterator[int], options: SamplingOptions) -> Iterator[Token]:
        spell = StreamingDetokenizer(self.runtime.text.tokenizer)
        stops = StopText(options.stop)
        for token_id in token_ids:
            text, stopped = stops.push(spell.push(token_id))
            yield Token(token_id, text)
            if stopped:
                return
        text, stopped = stops.push(spell.flush())
        rest = text if stopped else text + stops.flush()
        if rest:
            yield Token(None, rest)

    def statistics(self) -> RunStatistics:
        """Of the last stream, as far as it came.  Raises UsageError before the first."""
        if self.last_run is None:
            raise UsageError("nothing has been generated yet, so there are no statistics.")
        gpu = self.runtime.gpu
        # Without threads beside it, a GPU has all that is read.
        from_ram = gpu is None or self.runtime.pool is not None
        return self.last_run.statistics(
            Bandwidths(
                gpu=None if gpu is None else gpu.read_bandwidth(),
                ram=self.ram_bandwidth() if from_ram else None,
            )
        )

    def ram_bandwidth(self) -> float:
        """Bytes a second this machine reads from RAM, measured once."""
        if self._ram_bandwidth is None:
            pool = self.runtime.pool or new_pool()
            with self._computing():
                self._ram_bandwidth = ram_read_bandwidth(pool, self.runtime.working_bytes)
        return self._ram_bandwidth

    def check_prompt(self, prompt_ids: Sequence[int]) -> None:
        """Raises PromptError for what token_ids cannot go on with."""
        if not prompt_ids:
            raise PromptError("the prompt is empty. Give at least one word.")
        n_context, n_vocab = self.runtime.n_context, self.runtime.spec.n_vocab
        if len(prompt_ids) >= n_context:
            raise PromptError(
                f"the prompt has {len(prompt_ids)} tokens, but the context holds {n_context} and "
                "must leave room for an answer. Shorten it, or give a larger --context."
            )
        check_ids(prompt_ids, n_vocab)

    def _end_ids(self) -> set[int]:
        return {*self.runtime.spec.end_ids, *self.runtime.text.defaults.eos_ids}


def check_ids(ids: Sequence[int], n_vocab: int) -> None:
    """Raises PromptError for a token id outside the vocabulary."""
    for token_id in ids:
        if not 0 <= token_id < n_vocab:
            raise PromptError(
                f"token id {token_id}, but the vocabulary has ids 0 to {n_vocab - 1}."
            )


class _Run:
    """The clock of one stream, and the store's totals when its latest token came."""

    def __init__(self, runtime: Runtime, n_prompt: int) -> None:
        self._runtime, self._n_prompt = runtime, n_prompt
        self._begin = self._now = time.perf_counter()
        self._n_prefilled = self._n_new = 0
        self._prefill_s = 0.0
        self._first_token_at: float | None = None
        self._start_traffic = self._prefill_traffic = self._traffic = runtime.store.traffic()
        self._placement: PerTier | None = None

    def prefilled(self, n_tokens: int) -> None:
        self._n_prefilled = n_tokens
        self._prefill_s = time.perf_counter() - self._begin
        self._prefill_traffic = self._traffic = self._runtime.store.traffic()

    def token(self) -> None:
        self._now = time.perf_counter()
        self._n_new += 1
        if self._first_token_at is None:
            self._first_token_at = self._now
        self._traffic = self._runtime.store.traffic()

    def ended(self) -> None:
        # Not at every token: it looks at every expert in RAM.
        self._placement = placement(self._runtime)

    @property
    def decode_traffic(self) -> Traffic:
        """What was lent and read since the prefill."""
        return self._traffic - self._prefill_traffic

    def statistics(self, bandwidths: Bandwidths) -> RunStatistics:
        """bandwidths: those measured; the disk's is this run's own."""
        whole, decode = self._traffic - self._start_traffic, self.decode_traffic
        first = self._first_token_at or self._now
        n_steps = self._n_new - 1  # the first token comes out of the prefill
        per_token = PerTier()
        bound = None
        if n_steps > 0:
            dense = PerTier(**{self._runtime.store.tier: self._runtime.dense_bytes_per_token})
            per_token = PerTier(
                gpu=dense.gpu + decode.gpu_bytes / n_steps,
                ram=dense.ram + decode.ram_bytes / n_steps,
                disk=decode.disk_bytes / n_steps,
            )
            disk = whole.disk_bytes / whole.disk_busy_s if whole.disk_busy_s else None
            bound = bound_tokens_per_s(per_token, replace(bandwidths, disk=disk))
        return RunStatistics(
            prompt_tokens=self._n_prompt,
            new_tokens=self._n_new,
            ttft_s=first - self._begin,
            prefill_tokens_per_s=self._n_prefilled / self._prefill_s if self._prefill_s else None,
            decode_tokens_per_s=n_steps / (self._now - first) if n_steps > 0 else None,
            bits=self._runtime.bits,
            placement=self._placement or placement(self._runtime),
            hit_rate=hit_rate(whole),
            bytes_per_token=per_token,
            bound_tokens_per_s=bound,
            predicted_tokens_per_s=None,
        )


def placement(runtime: Runtime) -> PerTier:
    """Bytes of weights in each memory that is computed from, and of those that are on disk only."""
    store, counts = runtime.store, runtime.store.n_in_memory()
    in_memory = {tier: n * store.expert_bytes for tier, n in counts.items()}
    n_on_disk = runtime.spec.n_experts_total - sum(counts.values())
    in_memory[store.tier] += runtime.dense_bytes
    return PerTier(**in_memory, disk=n_on_disk * store.expert_bytes)
