"""How long an answer takes, and what is moved for it.

Knows:        the clock, the store's totals, which of them are a prompt's.
Ignorant of:  tokens and text; how answers are decoded together.
"""

import time
from dataclasses import dataclass, field, replace

from lowmoe.engine.runtime import Runtime
from lowmoe.engine.statistics import (
    Bandwidths,
    Moved,
    PerTier,
    RunStatistics,
    coarse_rate,
    hit_rate,
)
from lowmoe.experts.ledger import Traffic


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """Totals; subtract two to get those of a span of time.

    steps: passes of one token of each answer; tokens: of all answers; whole: what was lent and
    read for anything; prompts: for prompts.
    """

    steps: int = 0
    tokens: int = 0
    whole: Traffic = field(default_factory=Traffic)
    prompts: Traffic = field(default_factory=Traffic)

    @property
    def traffic(self) -> Traffic:
        """What was lent and read for steps."""
        return self.whole - self.prompts

    def __sub__(self, earlier: "Tally") -> "Tally":
        return Tally(
            steps=self.steps - earlier.steps,
            tokens=self.tokens - earlier.tokens,
            whole=self.whole - earlier.whole,
            prompts=self.prompts - earlier.prompts,
        )


class RunClock:
    """Of one answer, from when it joins others or begins alone."""

    def __init__(self, runtime: Runtime, n_prompt: int) -> None:
        self._runtime, self._n_prompt = runtime, n_prompt
        self._n_prefilled = self._n_new = 0
        self._prefill_s = 0.0
        self._placement: PerTier | None = None
        self.begin(n_prompt)

    def begin(self, n_to_prefill: int) -> None:
        """Now.  n_to_prefill: tokens of the prompt that are not in a cache."""
        self._begin = self._now = self._first_token_at = time.perf_counter()
        self._n_to_prefill = n_to_prefill
        self._start_traffic = self._runtime.store.traffic()
        self._first_tally = self._tally = Tally(whole=self._start_traffic)

    def token(self, tally: Tally) -> None:
        """One is here.  tally: the totals after the step that made it."""
        self._now, self._tally = time.perf_counter(), tally
        if self._n_new == 0:  # it comes out of the prefill
            self._first_token_at, self._first_tally = self._now, tally
            self._n_prefilled, self._prefill_s = self._n_to_prefill, self._now - self._begin
        self._n_new += 1

    def ended(self) -> None:
        """No more tokens come."""
        # Not at every token: it looks at every expert in RAM.
        self._placement = placement(self._runtime)

    @property
    def decoding(self) -> Tally:
        """Of the steps after the first token, in which this answer took part."""
        return self._tally - self._first_tally

    def statistics(self, bandwidths: Bandwidths) -> RunStatistics:
        """bandwidths: those measured; the disk's is this run's own."""
        whole, decode = self._tally.whole - self._start_traffic, self.decoding.traffic
        n_steps = self._n_new - 1
        per_token = PerTier()
        bound = None
        if n_steps > 0:
            dense = PerTier(**{self._runtime.store.tier: self._runtime.dense_bytes_per_token})
            moved = Moved(traffic=decode, n_tokens=n_steps, dense=dense)
            # Of a short answer's reads most may have begun before: then it seems faster than it is.
            disk = max(filter(None, map(_disk_speed, (whole, decode))), default=None)
            bus = whole.copied_bytes / whole.copied_s if whole.copied_s else None
            # A step makes one token of this answer, whatever it makes of others.
            bound = moved.bound_tokens_per_s(replace(bandwidths, disk=disk, bus=bus))
            per_token = moved.per_token.divided(self.decoding.tokens / n_steps)
        return RunStatistics(
            prompt_tokens=self._n_prompt,
            new_tokens=self._n_new,
            ttft_s=self._first_token_at - self._begin,
            prefill_tokens_per_s=self._n_prefilled / self._prefill_s if self._prefill_s else None,
            decode_tokens_per_s=self._decode_tokens_per_s(n_steps),
            bits=self._runtime.bits,
            placement=self._placement or placement(self._runtime),
            hit_rate=hit_rate(whole),
            bytes_per_token=per_token,
            bound_tokens_per_s=bound,
            predicted_tokens_per_s=self._predicted(),
            to_gpu_bytes=whole.copied_bytes,
            promoted=whole.promoted,
            trades=self._runtime.trades,
            coarse_rate=coarse_rate(whole),
        )

    def _predicted(self) -> float | None:
        """For the token in the middle of the answer; of one that was decoded alone."""
        predict, decoding = self._runtime.predict, self.decoding
        shared = decoding.tokens > decoding.steps or decoding.prompts != Traffic()
        return None if predict is None or shared else predict(self._n_prompt + self._n_new // 2)

    def _decode_tokens_per_s(self, n_steps: int) -> float | None:
        return n_steps / (self._now - self._first_token_at) if n_steps > 0 else None


def _disk_speed(traffic: Traffic) -> float | None:
    return traffic.disk_bytes / traffic.disk_busy_s if traffic.disk_busy_s else None


def placement(runtime: Runtime) -> PerTier:
    """Bytes of weights in each memory that is computed from, and of those that are on disk only."""
    store = runtime.store
    counts = {tier: len(keys) for tier, keys in store.in_memory().items()}
    in_memory = {tier: n * store.expert_bytes for tier, n in counts.items()}
    n_on_disk = runtime.spec.n_experts_total - sum(counts.values())
    in_memory[store.tier] += runtime.dense_bytes
    return PerTier(**in_memory, disk=n_on_disk * store.expert_bytes)
