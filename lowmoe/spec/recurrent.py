"""The kinds of attention that keep a state in place of keys and values.

The state has one size however long a conversation is, and what came into it cannot be taken out.
"""

from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True, kw_only=True)
class GatedDeltaNet:
    """Every head's state maps keys to values; each token makes it decay, and corrects it by what it
    did not know of the token's value.

    n_key_heads: of queries and keys, which n_heads heads of values share; n_taps: how many of the
    latest tokens, itself included, a channel of queries, keys and values is mixed from before;
    norm_epsilon: of the norm of what heads put out, which a gate multiplies then.
    Source: arXiv 2412.06464.
    """

    n_key_heads: int
    n_heads: int
    key_size: int
    value_size: int
    n_taps: int
    norm_epsilon: float

    @property
    def q_size(self) -> int:
        """What heads put out, all of them together."""
        return self.n_heads * self.value_size

    @property
    def all_keys(self) -> int:
        """Channels of all keys, or of all queries."""
        return self.n_key_heads * self.key_size

    @property
    def n_mixed(self) -> int:
        """Channels of queries, keys and values."""
        return 2 * self.all_keys + self.q_size

    @property
    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        """What is kept, float32: the tokens that are still to be mixed in, and the maps."""
        maps = (self.n_heads, self.key_size, self.value_size)
        return (self.n_taps - 1, self.n_mixed), maps


@dataclass(frozen=True, slots=True, kw_only=True)
class LightningAttention:
    """Every head's state is the sum of keys times values, each decayed by exp(-slope) a token.

    slopes: of each head; norm_epsilon: of the norm over what all heads put out, which a gate
    multiplies then.  Source: arXiv 2401.04658, as in arXiv 2501.08313.
    """

    head_size: int
    slopes: tuple[float, ...]
    norm_epsilon: float

    @property
    def n_heads(self) -> int:
        return len(self.slopes)

    @property
    def q_size(self) -> int:
        """Channels of queries, of keys, of values, and of what heads put out."""
        return self.n_heads * self.head_size

    @property
    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        """What is kept, float32."""
        return ((self.n_heads, self.head_size, self.head_size),)


Recurrent: TypeAlias = GatedDeltaNet | LightningAttention
