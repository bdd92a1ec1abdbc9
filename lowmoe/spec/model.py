"""A whole model out of layers, and all the tensors it needs."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

from lowmoe.spec.attention import Attention
from lowmoe.spec.feed_forward import ExpertsFeedForward
from lowmoe.spec.parts import (
    Part,
    Role,
    attention_parts,
    expert_shapes,
    feed_forward_parts,
    matrix,
    norm_parts,
    vector,
)

# "rms": over the root mean square; "layer": the mean taken off before, Ba et al., arXiv 1607.06450.
NormKind: TypeAlias = Literal["rms", "layer"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NormedResidual:
    """x = kept * norm(x) + added * f(norm(x)), where most have x += f(norm(x))."""

    kept: float
    added: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """One layer: x += attention(norm(x)); x += feed_forward(norm(x)).  See norm_after, too.

    attention_residual, feed_forward_residual: None for these sums.
    """

    attention: Attention
    feed_forward: ExpertsFeedForward
    attention_residual: NormedResidual | None = None
    feed_forward_residual: NormedResidual | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A whole model, unrolled layer by layer.

    norm, norm_bias: of the norms before attention, feed-forward and head; norm_after: what
    attention and feed-forward return is normed too, before it is added; head_bias: of the head.
    learned_positions: a vector of each of context_length positions is added to embeddings.
    embedding_scale, residual_scale, logit_scale: what embeddings, what layers add, and logits are
    multiplied by.
    """

    model_type: str
    n_vocab: int
    n_hidden: int
    context_length: int
    norm_epsilon: float
    tied_head: bool
    layers: tuple[LayerSpec, ...]
    end_ids: tuple[int, ...]
    norm: NormKind = "rms"
    norm_bias: bool = False
    norm_after: bool = False
    learned_positions: bool = False
    head_bias: bool = False
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0

    @property
    def n_experts_total(self) -> int:
        return sum(self.n_experts_by_layer)

    @property
    def n_experts_by_layer(self) -> list[int]:
        """Of each layer, from the first."""
        return [layer.feed_forward.n_experts for layer in self.layers]

    @property
    def n_parameters(self) -> int:
        return sum(math.prod(shape) for _, shape in checkpoint_tensors(self))

    @property
    def n_active_parameters(self) -> int:
        """Parameters one token meets: everything but the experts it is not routed to."""
        idle = sum(
            (f.n_experts - f.router.n_active) * f.n_matrices * f.n_inner * self.n_hidden
            for f in (layer.feed_forward for layer in self.layers)
        )
        return self.n_parameters - idle

    def uniform_experts(self) -> ExpertsFeedForward:
        """The feed-forward all layers with experts share; slots of the store have one size."""
        found = [f for f in (layer.feed_forward for layer in self.layers) if f.n_experts]
        kinds = {(f.n_inner, f.router) for f in found}
        assert len(kinds) == 1, "layers with experts of different sizes"
        return found[0]


def layer_parts(layer: LayerSpec, spec: ModelSpec) -> Iterator[Part]:
    """What one layer keeps in RAM, in the order of a folder."""
    yield from norm_parts("attention_norm", spec.n_hidden, bias=spec.norm_bias)
    yield from attention_parts(layer.attention, spec.n_hidden)
    if spec.norm_after:
        yield from norm_parts("attention_out_norm", spec.n_hidden, bias=spec.norm_bias)
    yield from norm_parts("experts_norm", spec.n_hidden, bias=spec.norm_bias)
    yield from feed_forward_parts(layer.feed_forward, spec.n_hidden)
    if spec.norm_after:
        yield from norm_parts("experts_out_norm", spec.n_hidden, bias=spec.norm_bias)


def end_parts(spec: ModelSpec) -> Iterator[Part]:
    """What is no layer's, but for the embedding."""
    if spec.learned_positions:
        rows = (("positions", spec.context_length),)
        yield Part(name="positions", rows=rows, n_columns=spec.n_hidden)
    yield from norm_parts("final_norm", spec.n_hidden, bias=spec.norm_bias)
    if not spec.tied_head:
        yield matrix("head", spec.n_hidden, ("head", spec.n_vocab))
    if spec.head_bias:
        yield vector("head_bias", spec.n_vocab)


def checkpoint_tensors(spec: ModelSpec) -> Iterator[tuple[Role, tuple[int, ...]]]:
    """Every tensor a checkpoint of this model must have, with its shape [rows out, columns in]."""
    yield Role("embedding"), (spec.n_vocab, spec.n_hidden)
    for layer_id, layer in enumerate(spec.layers):
        for part in layer_parts(layer, spec):
            yield from part.roles(layer_id)
        for expert_id in range(layer.feed_forward.n_experts):
            for name, shape in expert_shapes(layer.feed_forward, spec.n_hidden).items():
                yield Role(name, layer_id, expert_id), shape
    for part in end_parts(spec):
        yield from part.roles(None)
