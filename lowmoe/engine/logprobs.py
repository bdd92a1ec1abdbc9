"""How likely each token of an answer was, and what else was likely in its place.

Knows:        logarithms of probabilities before any sampling option, what a token is written like.
Ignorant of:  how the token was chosen, who asks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lowmoe.engine.token_bytes import TokenBytes


@dataclass(frozen=True, slots=True)
class TokenChance:
    """A token and the natural logarithm of its probability before any sampling option."""

    id: int
    text: str
    raw: bytes  # the token's own bytes, maybe a part of a character
    logprob: float


@dataclass(frozen=True, slots=True)
class ChosenToken:
    """A token of an answer.  others: the likeliest at its place, most likely first."""

    chance: TokenChance
    others: Sequence[TokenChance] = ()


class Chances:
    """n_others: how many of the likeliest are told beside each token, itself maybe among them."""

    def __init__(self, tokens: TokenBytes, n_others: int) -> None:
        self._tokens, self._n_others = tokens, n_others

    def of(self, token_id: int, scores: Tensor) -> ChosenToken:
        """scores: [V] float32, all finite, as the model gave them."""
        logprobs = scores.float().log_softmax(0)
        best = logprobs.topk(self._n_others)
        others = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        chosen = self._chance(token_id, float(logprobs[token_id]))
        return ChosenToken(chosen, tuple(self._chance(*other) for other in others))

    def _chance(self, token_id: int, logprob: float) -> TokenChance:
        raw = self._tokens[token_id]
        return TokenChance(token_id, raw.decode("utf-8", "replace"), raw, logprob)
