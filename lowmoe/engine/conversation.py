"""The tokens in one cache.

Knows:        which they are, what of them a prompt may go on from.
Ignorant of:  how they are computed, whose turn it is.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from lowmoe.decoder.computation import Cache
from lowmoe.engine.gpu import gpu_failures
from lowmoe.engine.runtime import AnyDecoder, Runtime


class Conversation:
    """A cache and the tokens whose keys and values it has.

    taken: whether an answer goes on in it; last_taken: the larger, the later it was.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._decoder, self._capacity = runtime.decoder, runtime.n_context
        self._tokens: list[int] = []
        self.taken = False
        self.last_taken = 0

    @functools.cached_property
    def _cache(self) -> Cache:
        """Made when it is first needed: on a GPU it takes all its memory at once."""
        with gpu_failures():
            return self._decoder.new_cache(self._capacity)

    @property
    def n_tokens(self) -> int:
        """How many of its tokens are known to be in the cache."""
        return len(self._tokens)

    def n_common(self, ids: Sequence[int]) -> int:
        """How many tokens it begins with that ids begins with too."""
        for n, (old, new) in enumerate(zip(self._tokens, ids, strict=False)):
            if old != new:
                return n
        return min(len(self._tokens), len(ids))

    def keep(self, ids: Sequence[int]) -> int:
        """Forget all but what the cache and ids have in common at the start, as far as the cache
        can be set back to that; returns how many tokens are kept.
        """
        self.forget_beyond(self.n_common(ids))
        return self.n_tokens

    def forward(self, ids: Sequence[int]) -> Tensor:
        """Run ids through the layers after what is there.  Returns the last hidden state [T, H]."""
        hidden = self._decoder.forward(torch.tensor(ids), self._cache)
        self._tokens += ids
        return hidden

    def forget_beyond(self, n_tokens: int) -> None:
        """What comes after n_tokens, and what a pass left that was interrupted at its end; and what
        comes before as far as the cache cannot be set back to just there.
        """
        n_kept = self._cache.keep(min(n_tokens, len(self._tokens)))
        del self._tokens[n_kept:]


def step(
    decoder: AnyDecoder, conversations: Sequence[Conversation], contexts: Sequence[Sequence[int]]
) -> Tensor:
    """Run the last token of each context, which the others are in the cache before.

    Returns the last hidden states, [B, H].
    """
    pairs = zip(conversations, contexts, strict=True)
    assert all(conversation.n_tokens == len(context) - 1 for conversation, context in pairs)
    ids = [context[-1] for context in contexts]
    hidden = decoder.step(torch.tensor(ids), [c._cache for c in conversations])
    for conversation, token_id in zip(conversations, ids, strict=True):
        conversation._tokens.append(token_id)
    return hidden
