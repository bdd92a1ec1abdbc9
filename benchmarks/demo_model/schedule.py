"""The learning rate over tokens: warm up, stay, decay.

Knows:        how many tokens have been read and will be.
Ignorant of:  clocks: a run that pauses is the same run.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Warm-up, stable, decay (MiniCPM, arXiv 2404.06395, section 4).

    Nothing before the decay depends on tokens, so that a run may be prolonged until then.
    """

    tokens: int
    peak: float
    warm_up_tokens: int = 1_000_000
    decay_share: float = 0.25  # of all tokens, the last

    def rate(self, done: int) -> float:
        """The learning rate of the step that begins after `done` tokens."""
        left = (self.tokens - done) / (self.decay_share * self.tokens)
        return self.peak * max(0.0, min(1.0, (done + 1) / self.warm_up_tokens, left))
