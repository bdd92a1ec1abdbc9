"""From one token's logits to one token id.

Knows:        penalty, temperature, top-k, top-p, min-p, in that order; a seed and its generator.
Ignorant of:  text, stop strings, where the logits came from.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lowmoe.engine.options import SamplingOptions
from lowmoe.errors import LowMoeError

# The nucleus of a language model's answer rarely exceeds a few hundred tokens. Finding the 1024
# largest of 152064 logits takes 0.5 ms where sorting them all takes 11 (2 CPU cores, torch 2.13).
N_SHORTLIST = 1024


class Sampler:
    """Chooses tokens as its options say; the same seed and logits give the same tokens.

    The random numbers come from a CPU generator of its own, one number a token, so that neither
    the logits' device nor anybody else's use of torch's generator changes the answer.
    """

    def __init__(self, options: SamplingOptions) -> None:
        self._options = options
        self._generator = torch.Generator(device="cpu")
        if options.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(options.seed)

    def pick(
        self,
        logits: Tensor,
        context: Sequence[int] | Tensor,
        allowed: Tensor | None = None,
    ) -> int:
        """Choose the next token.

        logits: [V] float32, on any device. context: the token ids so far, prompt included; only
        the repetition penalty looks at them. allowed: [A] int64, the ids to choose among, at least
        one; None for all.

        Raises LowMoeError if a logit is not finite.
        """
        token_ids, weights = self._candidates(logits, context, allowed)
        if len(token_ids) == 1:
            return int(token_ids.item())
        # float64: 150,000 float32 summands would blur the tail's share.
        cumulative = weights.cpu().double().cumsum(0)
        draw = torch.rand(1, dtype=torch.float64, generator=self._generator) * cumulative[-1]
        index = int(torch.searchsorted(cumulative, draw, right=True).item())
        # The product can round up to the total itself, one past the last candidate.
        return int(token_ids[min(index, len(token_ids) - 1)].item())

    def probabilities(
        self,
        logits: Tensor,
        context: Sequence[int] | Tensor,
        allowed: Tensor | None = None,
    ) -> Tensor:
        """Give the distribution that pick draws from: [V] float32 summing to 1.

        Arguments and errors are pick's. At temperature 0 all of it lies on one token.
        """
        token_ids, weights = self._candidates(logits, context, allowed)
        spread = torch.zeros_like(logits, dtype=torch.float32)
        spread[token_ids] = weights / weights.sum()
        return spread

    def _candidates(
        self, logits: Tensor, context: Sequence[int] | Tensor, allowed: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Give the tokens that may come next, [C] int64, and their weights, [C] float32 > 0."""
        assert logits.ndim == 1
        scores = _penalize(logits.float(), context, penalty=self._options.repetition_penalty)
        _require_finite(scores)
        if allowed is None:
            return self._among(scores)
        assert len(allowed)
        allowed = allowed.to(scores.device)
        places, weights = self._among(scores[allowed])
        return allowed[places], weights

    def _among(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Give places among scores, [C] int64, and their weights, [C] float32 > 0.

        Source: the order of steps is that of transformers' GenerationMixin.
        """
        options = self._options
        if options.temperature == 0:
            likeliest = scores.argmax().reshape(1)
            return likeliest, torch.ones_like(likeliest, dtype=torch.float32)
        # The likeliest score becomes 0, so dividing by a small temperature cannot overflow upwards.
        scores = (scores - scores.max()) / options.temperature
        token_ids = _top_k(scores, options.top_k)
        token_ids, weights = _top_p(token_ids, scores[token_ids], options.top_p)
        # Without min-p the limit is 0 and leaves out what has underflowed.
        limit = options.min_p * weights.max()
        kept = (weights >= limit) & (weights > 0)
        return token_ids[kept], weights[kept]


def _require_finite(scores: Tensor) -> None:
    finite = torch.isfinite(scores)
    if not finite.all():
        n_broken = int((~finite).sum().item())
        raise LowMoeError(
            f"{n_broken} of the model's {len(scores)} logits are NaN or infinite, but all must be "
            "finite numbers: its weights are damaged or its activations overflowed; "
            "verify the folder, then try another dtype"
        )


def _penalize(scores: Tensor, context: Sequence[int] | Tensor, *, penalty: float) -> Tensor:
    """Make the tokens of context less likely: [V] -> [V]. Source: CTRL, arXiv 1909.05858."""
    if penalty == 1 or len(context) == 0:
        return scores
    seen = torch.as_tensor(context, dtype=torch.int64, device=scores.device)
    found = scores[seen]
    # A token seen twice is written twice with the same value.
    return scores.index_put((seen,), torch.where(found < 0, found * penalty, found / penalty))


def _top_k(scores: Tensor, k: int) -> Tensor:
    """Give the ids, ascending, of the k largest scores and of all that tie with the k-th."""
    if k == 0 or k >= len(scores):
        return torch.arange(len(scores), device=scores.device)
    threshold = scores.topk(k).values[-1]
    return (scores >= threshold).nonzero().squeeze(1)


def _top_p(token_ids: Tensor, scores: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """Keep the fewest likeliest tokens whose weights sum to at least p.

    token_ids: [C] ascending, scores: [C]. Returns (ids [N], weights [N]), N <= C; the weights are
    the softmax over all C. Of equally likely tokens at the edge those with the higher ids stay.
    Source: Holtzman et al., arXiv 1904.09751.
    """
    weights = scores.softmax(0)
    if p == 1:
        return token_ids, weights
    listed = _shortlist(weights, p)
    # Stable, so that a tie at the edge falls to the same tokens on every machine.
    order = listed[scores[listed].sort(stable=True).indices]
    ascending = weights[order].double()
    total = ascending.sum()
    # From the least likely upwards, a token goes while it and everything below it weigh 1 - p.
    kept = (1 - total) + ascending.cumsum(0) > 1 - p
    kept[-1] = True
    return token_ids[order[kept]], weights[order[kept]]


def _shortlist(weights: Tensor, p: float) -> Tensor:
    """Give the places, ascending, of weights that surely hold the nucleus: few if few will do."""
    if len(weights) > N_SHORTLIST:
        places = (weights >= weights.topk(N_SHORTLIST).values[-1]).nonzero().squeeze(1)
        if weights[places].double().sum() >= p:
            return places
    return torch.arange(len(weights), device=weights.device)
