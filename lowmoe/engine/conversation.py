"""The tokens in one cache.

Knows:        which they are, what of them a prompt may go on from.
Ignorant of:  how they are computed, whose turn it is.
"""

import functools
from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lowmoe.decoder.computation import Cache
from lowmoe.decoder.state_cache import TAIL_TOKENS
from lowmoe.engine.gpu import gpu_failures
from lowmoe.engine.runtime import AnyDecoder, Runtime

# What a prompt may go on from of what a cache has of it: anything; what reading it anew would
# compute just so; nothing. Tokens are rounded otherwise in chunks of another size or one by one, so
# that what an answer said before may decide a near-tie in the next one.
Reuse: TypeAlias = Literal["any", "exact", "none"]


class Conversation:
    """A cache and the tokens whose keys and values it has.

    taken: whether an answer goes on in it; last_taken: the larger, the later it was; n_prompt:
    tokens of the prompt that was answered in it last.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._decoder, self._capacity = runtime.decoder, runtime.n_context
        self._tokens: list[int] = []
        self._whole_chunks: list[int] = []  # where those end that follow each other from the start
        self.taken = False
        self.last_taken = self.n_prompt = 0

    @functools.cached_property
    def _cache(self) -> Cache:
        """Made when it is first needed: on a GPU it takes all its memory at once."""
        with gpu_failures():
            return self._decoder.new_cache(self._capacity)

    @property
    def n_tokens(self) -> int:
        """How many of its tokens are known to be in the cache."""
        return len(self._tokens)

    def n_common(self, ids: Sequence[int], reuse: Reuse = "any") -> int:
        """How many tokens it begins with that ids begins with too and may go on from."""
        if reuse == "none":
            return 0
        n_same, n_most = 0, min(len(self._tokens), len(ids))
        while n_same < n_most:  # halving compares slices, 20 times as fast as token by token
            middle = (n_same + n_most + 1) // 2
            if self._tokens[n_same:middle] == list(ids[n_same:middle]):
                n_same = middle
            else:
                n_most = middle - 1
        return self._last_chunk_end(n_same) if reuse == "exact" else n_same

    def is_continued_by(self, ids: Sequence[int]) -> bool:
        """Whether a prompt goes on from the last one, so that what else is here is of no more use:
        an answer that is asked for again, or comes back without what the model thought.
        """
        # A prompt's end may differ by how the answer begins, such as a mark for thoughts.
        return self.n_common(ids) >= max(self.n_prompt - TAIL_TOKENS, self.n_prompt // 2)

    def keep(self, ids: Sequence[int], reuse: Reuse = "any") -> int:
        """Forget all but what the cache and ids have in common at the start, as far as the cache
        can be set back to that; returns how many tokens are kept.
        """
        self.forget_beyond(self.n_common(ids, reuse))
        if reuse == "exact":
            while self.n_tokens not in (0, *self._whole_chunks):  # it was set back further
                self.forget_beyond(self._last_chunk_end(self.n_tokens))
        return self.n_tokens

    def copy_from(self, other: "Conversation", n_tokens: int) -> None:
        """Have the first n_tokens of another, as far as its cache can be copied, and no others."""
        n_copied = self._cache.copy_from(other._cache, n_tokens)
        self._tokens = other._tokens[:n_copied]
        self._whole_chunks = [end for end in other._whole_chunks if end <= n_copied]

    def forward(self, ids: Sequence[int], *, whole_chunk: bool) -> Tensor:
        """Run ids through the layers after what is there.  Returns the last hidden state [T, H].

        whole_chunk: as many as a prompt is read in, as long as it has so many left.
        """
        hidden = self._decoder.forward(torch.tensor(ids), self._cache)
        if whole_chunk and self.n_tokens == self._last_chunk_end(self.n_tokens):
            self._whole_chunks.append(self.n_tokens + len(ids))
        self._tokens += ids
        return hidden

    def forget_beyond(self, n_tokens: int) -> None:
        """What comes after n_tokens, and what a pass left that was interrupted at its end; and what
        comes before as far as the cache cannot be set back to just there.
        """
        n_kept = self._cache.keep(min(n_tokens, len(self._tokens)))
        del self._tokens[n_kept:]
        self._whole_chunks = [end for end in self._whole_chunks if end <= n_kept]

    def _last_chunk_end(self, n_tokens: int) -> int:
        """Up to which token, of the first n_tokens, the cache has what a prompt read anew has."""
        return max((end for end in self._whole_chunks if end <= n_tokens), default=0)


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
