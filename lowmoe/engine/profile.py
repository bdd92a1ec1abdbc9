"""Where a token's time goes: native phases, and what lies between them.

Knows:        the phases that native code adds up, the clock on the wall.
Ignorant of:  what a phase does, how it is shown.
"""

import time
from dataclasses import dataclass, field

from lowmoe.engine.runtime import Runtime
from lowmoe.errors import UsageError

BETWEEN = "Python, sampling, waiting for the disk"


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchProfile:
    """Seconds a token by phase, largest first, of the last run; they add up to the token's time.

    prefill: of a token of the prompt; decode: of one that was generated, None for fewer than two.
    """

    prefill: dict[str, float]
    decode: dict[str, float] | None


def require_native(runtime: Runtime) -> None:
    """Raises UsageError for a model that has no phases to be timed."""
    if runtime.pool is None:
        raise UsageError(
            f"a profile shows native code, but this model is computed by {runtime.isa}. Leave it "
            "out."
        )


@dataclass(slots=True)
class Profiler:
    """Times one run after another; the last one counts."""

    runtime: Runtime
    _begin: float = 0.0
    _first_token: float = 0.0
    _last_token: float = 0.0
    _n_tokens: int = 0
    _prefill: dict[str, float] = field(default_factory=dict)
    _latest: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require_native(self.runtime)

    def begin(self) -> None:
        """A run begins."""
        assert self.runtime.pool is not None
        self.runtime.pool.start_profile()
        self._n_tokens = 0
        self._begin = time.perf_counter()

    def token(self) -> None:
        """A token came out."""
        self._last_token = time.perf_counter()
        self._n_tokens += 1
        self._latest = self._phases()
        if self._n_tokens == 1:
            self._first_token, self._prefill = self._last_token, self._latest

    def profile(self, n_prompt: int) -> BenchProfile:
        """Of the last run, whose prompt had n_prompt tokens."""
        decode = None
        n_steps = self._n_tokens - 1
        if n_steps > 0:
            spent = {name: s - self._prefill.get(name, 0.0) for name, s in self._latest.items()}
            decode = _per_token(spent, self._last_token - self._first_token, n_steps)
        whole = self._first_token - self._begin
        return BenchProfile(prefill=_per_token(self._prefill, whole, n_prompt), decode=decode)

    def _phases(self) -> dict[str, float]:
        assert self.runtime.pool is not None
        return {name: seconds for name, seconds, _ in self.runtime.pool.phases()}


def _per_token(phases: dict[str, float], whole_s: float, n_tokens: int) -> dict[str, float]:
    phases = {**phases, BETWEEN: whole_s - sum(phases.values())}
    largest_first = sorted(phases.items(), key=lambda item: -item[1])
    return {name: seconds / n_tokens for name, seconds in largest_first if seconds > 0}
