"""The kinds of attention, and of the positions they turn queries and keys by."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

from lowmoe.spec.recurrent import GatedDeltaNet, LightningAttention


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearScaling:
    """Positions divided by factor.  Source: arXiv 2306.15595."""

    factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class WavelengthScaling:
    """Slow frequencies divided by factor, fast ones as they are, a ramp between the two.

    A frequency is slow where its wavelength is over n_original / low, fast where under
    n_original / high.  Source: meta-llama/llama-models, apply_scaling.
    """

    factor: float
    low: float
    high: float
    n_original: int


@dataclass(frozen=True, slots=True, kw_only=True)
class YarnScaling:
    """The same between beta_fast and beta_slow turns in n_original tokens; longer queries and keys.

    truncate: whether the ends of the ramp are rounded to whole channels; length: what queries and
    keys are multiplied by.  Source: arXiv 2309.00071.
    """

    factor: float
    beta_fast: float
    beta_slow: float
    n_original: int
    length: float
    truncate: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class LongScaling:
    """Each frequency divided by a factor of its own: one of `short` where a conversation may have
    at most n_original tokens, of `long` where it may have more.

    short_length, long_length: what queries and keys are multiplied by.  Source: arXiv 2402.13753.
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    short_length: float
    long_length: float
    n_original: int


RopeScaling: TypeAlias = LinearScaling | WavelengthScaling | YarnScaling | LongScaling


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Rotary positions: the halves of a head's first `size` channels turn against each other.

    size: None for the whole head.
    """

    theta: float
    size: int | None = None
    scaling: RopeScaling | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadNorm:
    """RMS norms of queries and of keys.

    over: "head", each head by itself, or "all", all heads together, before rope; after_rope: those
    of single heads; weighted: whether channels have weights, of a head or of all of them.
    """

    over: Literal["head", "all"]
    epsilon: float
    after_rope: bool = False
    weighted: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryTemperature:
    """Queries at position p times 1 + scale * log(1 + floor((p + 1) / step))."""

    step: int
    scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupedQueryAttention:
    """n_heads query heads in groups that share n_kv_heads key-value heads.

    rope: None for no positions; window: how many of the latest tokens, itself included, a token
    sees; chunk: it sees those of its own chunk of so many; None for all.
    qkv_bias, out_bias: of the linear maps; clamp: queries, keys and values, after norms of all
    heads, are kept within +-clamp; score_scale: what scores are multiplied by, None for
    head_size ** -0.5; score_cap: scores are then cap * tanh(scores / cap); sinks: each head has a
    learned score of nothing; gated: what heads put out is multiplied by the sigmoid of as many
    channels.
    """

    n_heads: int
    n_kv_heads: int
    head_size: int
    rope: Rope | None
    window: int | None
    chunk: int | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    norm: HeadNorm | None = None
    clamp: float | None = None
    score_scale: float | None = None
    score_cap: float | None = None
    temperature: QueryTemperature | None = None
    sinks: bool = False
    gated: bool = False

    @property
    def q_size(self) -> int:
        return self.n_heads * self.head_size

    @property
    def kv_size(self) -> int:
        return self.n_kv_heads * self.head_size

    @property
    def kept_shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """What the cache keeps of a token: keys and values, [B, D] each."""
        return (self.n_kv_heads, self.head_size), (self.n_kv_heads, self.head_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentAttention:
    """Queries, keys and values out of short latent vectors; the cache keeps only that of keys and
    values, and one key of rope_size channels that all heads share and that alone turns.

    q_rank: channels of the latent that queries come from, None where they come from x itself;
    kv_rank: of that of keys and values; plain_size: channels of a head's keys that do not turn;
    value_size: of its values; norm_epsilon: of the latents' norms.  Source: arXiv 2405.04434.
    """

    n_heads: int
    q_rank: int | None
    kv_rank: int
    plain_size: int
    rope_size: int
    value_size: int
    rope: Rope
    score_scale: float
    norm_epsilon: float

    @property
    def key_size(self) -> int:
        """Channels of a head's queries and keys: those that do not turn, then those that do."""
        return self.plain_size + self.rope_size

    @property
    def q_size(self) -> int:
        """What attention puts out: all heads' values."""
        return self.n_heads * self.value_size

    @property
    def kept_shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """What the cache keeps of a token: the latent, and the key that turned."""
        return (1, self.kv_rank), (1, self.rope_size)


Attention: TypeAlias = GroupedQueryAttention | LatentAttention | GatedDeltaNet | LightningAttention


def grouped(attention: Attention) -> GroupedQueryAttention:
    """An attention that a computation found it can do, so that it is of this kind."""
    assert isinstance(attention, GroupedQueryAttention), attention
    return attention
