"""What a model asks of a computation beyond a plain decoder, and whether a computation can do it.

A plain decoder has RMS norms, grouped-query attention with rope and windows, and experts of SwiGLU
that a softmax chooses. Torch computes all else too; a computation that is faster says what it can.

Knows:        every kind of lowmoe/spec, in words a user may read.
Ignorant of:  how anything is computed, which computation there is.
"""

from collections.abc import Callable, Mapping

from lowmoe.spec import (
    SILU,
    EveryToken,
    ExpertsFeedForward,
    GatedDeltaNet,
    GroupedQueryAttention,
    HeadNorm,
    LatentAttention,
    LayerSpec,
    LightningAttention,
    LongScaling,
    ModelSpec,
    Rope,
    SigmoidRouter,
    SoftmaxRouter,
    SparseMixerRouter,
    YarnScaling,
)

_OF_MODELS: Mapping[str, Callable[[ModelSpec], bool]] = {
    "layer norms": lambda s: s.norm == "layer",
    "biases of norms": lambda s: s.norm_bias,
    "norms behind layers": lambda s: s.norm_after,
    "learned positions": lambda s: s.learned_positions,
    "a bias of the head": lambda s: s.head_bias,
    "scaled embeddings": lambda s: s.embedding_scale != 1,
    "scaled layers": lambda s: s.residual_scale != 1,
    "scaled logits": lambda s: s.logit_scale != 1,
    "norms behind layers that keep states": lambda s: (
        s.norm_after
        and any(isinstance(x.attention, GatedDeltaNet | LightningAttention) for x in s.layers)
    ),
    "states in every layer": lambda s: (
        not any(isinstance(x.attention, GroupedQueryAttention | LatentAttention) for x in s.layers)
    ),
}
_OF_LAYERS: Mapping[str, Callable[[LayerSpec], bool]] = {
    "latent attention": lambda x: isinstance(x.attention, LatentAttention),
    "gated delta nets": lambda x: isinstance(x.attention, GatedDeltaNet),
    "lightning attention": lambda x: isinstance(x.attention, LightningAttention),
    "layers that add to their norms": lambda x: (
        x.attention_residual is not None or x.feed_forward_residual is not None
    ),
}
_OF_ATTENTION: Mapping[str, Callable[[GroupedQueryAttention], bool]] = {
    "biases of queries, keys and values": lambda a: a.qkv_bias,
    "a bias behind attention": lambda a: a.out_bias,
    "norms of single heads": lambda a: _has(a.norm, lambda n: n.over == "head" and n.weighted),
    "norms without weights": lambda a: _has(a.norm, lambda n: not n.weighted),
    "norms after rope": lambda a: _has(a.norm, lambda n: n.after_rope),
    "norms of all heads together": lambda a: _has(a.norm, lambda n: n.over == "all"),
    "layers without rope": lambda a: a.rope is None,
    "rope of a part of a head": lambda a: _turns(a.rope, lambda r: r.size is not None),
    "rope that lengthens": lambda a: _turns(a.rope, lambda r: isinstance(r.scaling, YarnScaling)),
    "rope by length": lambda a: _turns(a.rope, lambda r: isinstance(r.scaling, LongScaling)),
    "chunks": lambda a: a.chunk is not None,
    "clamped queries, keys and values": lambda a: a.clamp is not None,
    "another scale of scores": lambda a: a.score_scale is not None,
    "capped scores": lambda a: a.score_cap is not None,
    "temperatures of queries": lambda a: a.temperature is not None,
    "attention sinks": lambda a: a.sinks,
    "gates behind attention": lambda a: a.gated,
}
_OF_FEED_FORWARDS: Mapping[str, Callable[[ExpertsFeedForward], bool]] = {
    "experts without a choice": lambda f: isinstance(f.router, EveryToken) and f.n_experts > 0,
    "routers by sigmoid": lambda f: isinstance(f.router, SigmoidRouter),
    "sparse mixers": lambda f: isinstance(f.router, SparseMixerRouter),
    "biases of routers": lambda f: isinstance(f.router, SoftmaxRouter) and f.router.bias,
    "routers of a given spread": lambda f: (
        isinstance(f.router, SoftmaxRouter) and f.router.spread is not None
    ),
    "softmax routers with groups or a scale": lambda f: (
        isinstance(f.router, SoftmaxRouter) and (f.router.n_groups > 1 or f.router.scale != 1)
    ),
    "biases of the choice": lambda f: (
        isinstance(f.router, SoftmaxRouter | SigmoidRouter) and f.router.choice_bias
    ),
    "shared experts": lambda f: f.shared is not None and f.n_experts > 0,
    "layers without experts": lambda f: f.n_experts == 0,
    "another activation": lambda f: f.activation != SILU,
    "activations with a cubic term": lambda f: f.activation.cubic != 0,
    "experts without a gate": lambda f: not f.gated,
    "biases of experts": lambda f: f.bias,
    "weights on what experts are given": lambda f: f.weigh_input,
}
ALL = frozenset({*_OF_MODELS, *_OF_LAYERS, *_OF_ATTENTION, *_OF_FEED_FORWARDS})


def _has(norm: HeadNorm | None, test: Callable[[HeadNorm], bool]) -> bool:
    return norm is not None and test(norm)


def _turns(rope: Rope | None, test: Callable[[Rope], bool]) -> bool:
    return rope is not None and test(rope)


def needs(spec: ModelSpec) -> list[str]:
    """What a model asks beyond a plain decoder."""
    kinds = {layer.attention for layer in spec.layers}
    attentions = [kind for kind in kinds if isinstance(kind, GroupedQueryAttention)]
    feed_forwards = {layer.feed_forward for layer in spec.layers}
    return [
        *(name for name, test in _OF_MODELS.items() if test(spec)),
        *(name for name, test in _OF_LAYERS.items() if any(map(test, spec.layers))),
        *(name for name, test in _OF_ATTENTION.items() if any(map(test, attentions))),
        *(name for name, test in _OF_FEED_FORWARDS.items() if any(map(test, feed_forwards))),
    ]


def lacking(spec: ModelSpec, able: frozenset[str]) -> list[str]:
    """What of it a computation that is able to do so much cannot do."""
    assert able <= ALL, able - ALL
    return [name for name in needs(spec) if name not in able]
