"""The tensors a model needs: a checkpoint's, by role, and those that a decoder keeps, by part.

A part is a role's tensor, or several that are used at once, one above the other: q, k and v.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from lowmoe.spec.attention import Attention, GroupedQueryAttention, LatentAttention
from lowmoe.spec.feed_forward import (
    ExpertsFeedForward,
    SigmoidRouter,
    SoftmaxRouter,
    SparseMixerRouter,
)
from lowmoe.spec.recurrent import GatedDeltaNet, LightningAttention


@dataclass(frozen=True, slots=True)
class Role:
    """What a checkpoint's tensor is for; a family's table gives its name there."""

    name: str
    layer_id: int | None = None
    expert_id: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A tensor of a layer, or of the model's ends, that is kept in RAM.

    rows: the roles it is made of, with the rows of each; n_columns: None for vectors; coded: a
    matrix that takes the folder's format, else float32; of_experts: rows are [E, rows].
    """

    name: str
    rows: tuple[tuple[str, int], ...]
    n_columns: int | None = None
    coded: bool = False
    of_experts: int | None = None

    @property
    def n_rows(self) -> int:
        return sum(count for _, count in self.rows)

    @property
    def shape(self) -> tuple[int, ...]:
        experts = () if self.of_experts is None else (self.of_experts,)
        return (*experts, *self.role_shape(self.n_rows))

    def role_shape(self, n_rows: int) -> tuple[int, ...]:
        """The shape of one role's tensor."""
        return (n_rows,) if self.n_columns is None else (n_rows, self.n_columns)

    def roles(self, layer_id: int | None) -> Iterator[tuple[Role, tuple[int, ...]]]:
        """What a checkpoint must have for it, in order: expert by expert where they have theirs."""
        for expert_id in [None] if self.of_experts is None else range(self.of_experts):
            for name, n_rows in self.rows:
                yield Role(name, layer_id, expert_id), self.role_shape(n_rows)


def vector(name: str, n_rows: int) -> Part:
    """A float32 vector that is one role's."""
    return Part(name=name, rows=((name, n_rows),))


def matrix(name: str, n_columns: int, *rows: tuple[str, int]) -> Part:
    """A matrix that takes the folder's format."""
    return Part(name=name, rows=rows, n_columns=n_columns, coded=True)


def norm_parts(name: str, n_hidden: int, *, bias: bool) -> Iterator[Part]:
    """A norm before or after attention or feed-forward, or before the head."""
    yield vector(name, n_hidden)
    if bias:
        yield vector(f"{name}_bias", n_hidden)


def attention_parts(attention: Attention, n_hidden: int) -> Iterator[Part]:
    """What attention keeps."""
    match attention:
        case LatentAttention():
            yield from _latent(attention, n_hidden)
        case GroupedQueryAttention():
            yield from _grouped(attention, n_hidden)
        case GatedDeltaNet():
            yield from _delta(attention, n_hidden)
        case LightningAttention():
            yield from _lightning(attention, n_hidden)


def _delta(attention: GatedDeltaNet, n_hidden: int) -> Iterator[Part]:
    """What decays and corrects states is kept exact, as routers are: its errors add up."""
    keys, values, n = attention.all_keys, attention.q_size, attention.n_heads
    mixed = (("delta_q", keys), ("delta_k", keys), ("delta_v", values))
    yield matrix("delta_in", n_hidden, *mixed, ("delta_gate", values))
    rates = (("delta_correction", n), ("delta_decay", n))
    yield Part(name="delta_rates", rows=rates, n_columns=n_hidden)
    taps = (("delta_taps", attention.n_mixed),)
    yield Part(name="delta_taps", rows=taps, n_columns=attention.n_taps)
    yield vector("delta_decay_bias", n)
    yield vector("delta_log_decay", n)
    yield vector("delta_norm", attention.value_size)
    yield matrix("attention_out", values, ("delta_out", n_hidden))


def _lightning(attention: LightningAttention, n_hidden: int) -> Iterator[Part]:
    n = attention.q_size
    yield matrix("qkv", n_hidden, *((f"lightning_{name}", n) for name in "qkv"))
    yield matrix("attention_gate", n_hidden, ("lightning_gate", n))
    yield vector("lightning_norm", n)
    yield matrix("attention_out", n, ("lightning_out", n_hidden))


def _latent(attention: LatentAttention, n_hidden: int) -> Iterator[Part]:
    """Latents come out of the maps down, heads out of those up."""
    queries, kept = attention.n_heads * attention.key_size, attention.kv_rank + attention.rope_size
    if attention.q_rank is None:
        yield matrix("q", n_hidden, ("q", queries))
    else:
        yield matrix("q_down", n_hidden, ("q_down", attention.q_rank))
        yield vector("q_latent_norm", attention.q_rank)
        yield matrix("q_up", attention.q_rank, ("q_up", queries))
    yield matrix("kv_down", n_hidden, ("kv_down", kept))
    yield vector("kv_latent_norm", attention.kv_rank)
    of_head = attention.plain_size + attention.value_size
    yield matrix("kv_up", attention.kv_rank, ("kv_up", attention.n_heads * of_head))
    yield matrix("attention_out", attention.q_size, ("attention_out", n_hidden))


def _grouped(attention: GroupedQueryAttention, n_hidden: int) -> Iterator[Part]:
    q, kv = attention.q_size, attention.kv_size
    gate = (("attention_gate", q),) if attention.gated else ()
    yield matrix("qkv", n_hidden, ("q", q), ("k", kv), ("v", kv), *gate)
    if attention.qkv_bias:
        yield Part(name="qkv_bias", rows=(("q_bias", q), ("k_bias", kv), ("v_bias", kv)))
    if attention.norm is not None and attention.norm.weighted:
        alone = attention.norm.over == "head"
        yield vector("q_norm", attention.head_size if alone else q)
        yield vector("k_norm", attention.head_size if alone else kv)
    if attention.sinks:
        yield vector("sinks", attention.n_heads)
    yield matrix("attention_out", q, ("attention_out", n_hidden))
    if attention.out_bias:
        yield vector("attention_out_bias", n_hidden)


def feed_forward_parts(experts: ExpertsFeedForward, n_hidden: int) -> Iterator[Part]:
    """What a feed-forward keeps in RAM, whatever experts are there."""
    yield from _router(experts, n_hidden)
    yield from _shared(experts, n_hidden)
    yield from _expert_biases(experts, n_hidden)


def _router(experts: ExpertsFeedForward, n_hidden: int) -> Iterator[Part]:
    router, n = experts.router, experts.n_experts
    if isinstance(router, SoftmaxRouter | SigmoidRouter | SparseMixerRouter):
        yield Part(name="router", rows=(("router", n),), n_columns=n_hidden)
    if isinstance(router, SoftmaxRouter) and router.bias:
        yield vector("router_bias", n)
    if isinstance(router, SoftmaxRouter | SigmoidRouter) and router.choice_bias:
        yield vector("choice_bias", n)


def _shared(experts: ExpertsFeedForward, n_hidden: int) -> Iterator[Part]:
    """The shared expert; where it is alone a checkpoint has another name for it."""
    if (shared := experts.shared) is None:
        return
    of, n = ("shared" if experts.n_experts else "only"), shared.n_inner
    yield matrix("shared_gate_up", n_hidden, (f"{of}_gate", n), (f"{of}_up", n))
    yield matrix("shared_down", n, (f"{of}_down", n_hidden))
    if shared.weighed:
        yield Part(name="shared_router", rows=(("shared_router", 1),), n_columns=n_hidden)


def _expert_biases(experts: ExpertsFeedForward, n_hidden: int) -> Iterator[Part]:
    if experts.bias:
        n, wide = experts.n_experts, ("gate_bias", "up_bias") if experts.gated else ("up_bias",)
        rows = tuple((name, experts.n_inner) for name in wide)
        yield Part(name="gate_up_bias", rows=rows, of_experts=n)
        yield Part(name="down_bias", rows=(("down_bias", n_hidden),), of_experts=n)


def expert_shapes(experts: ExpertsFeedForward, n_hidden: int) -> dict[str, tuple[int, int]]:
    """An expert's own matrices."""
    wide = (experts.n_inner, n_hidden)
    gate = {"gate": wide} if experts.gated else {}
    return {**gate, "up": wide, "down": wide[::-1]}
