"""How much memory a pass in torch takes beside weights and cache.

Knows:        the widest matrices and activations of a spec.
Ignorant of:  how much there is, what it is divided among.
"""

import math

from lowmoe.decoder.linear_attention import CHUNK
from lowmoe.kernels import Kernels
from lowmoe.spec import (
    GatedDeltaNet,
    GroupedQueryAttention,
    LatentAttention,
    LayerSpec,
    LightningAttention,
    ModelSpec,
    layer_parts,
)

FLOAT_BYTES = 4  # products of transformed activations are float32, whatever theirs is


def working_bytes(spec: ModelSpec, max_tokens: int, n_context: int, kernels: Kernels) -> int:
    """The most that weights being decoded and the activations of max_tokens tokens take.

    What is not in it: scores of more than one token, which only `Model.logits` returns.
    """
    decoding = max(kernels.working_bytes(*shape) for shape in _shapes(spec))
    n_tokens = min(max_tokens, n_context)
    floats = max(_floats_of_a_token(spec.n_hidden, layer) for layer in spec.layers)
    unfolded = n_context * max(_floats_of_a_cached_token(layer) for layer in spec.layers)
    mask = n_tokens * n_context * (1 + 2 * FLOAT_BYTES)  # which token sees which, also as numbers
    scores = n_tokens * n_context * max(_floats_of_a_score(layer) for layer in spec.layers)
    states = max(_floats_of_a_state(layer) for layer in spec.layers)
    activations = FLOAT_BYTES * (n_tokens * floats + unfolded + scores + states)
    return decoding + activations + mask + FLOAT_BYTES * spec.n_vocab


def _shapes(spec: ModelSpec) -> list[tuple[int, int]]:
    shapes = [(spec.n_vocab, spec.n_hidden)]
    for layer in spec.layers:
        for part in layer_parts(layer, spec):
            if part.coded and part.n_columns is not None:
                shapes.append((part.n_rows, part.n_columns))
        n_inner = layer.feed_forward.n_inner
        shapes += [(2 * n_inner, spec.n_hidden), (spec.n_hidden, n_inner)]
    return shapes


def _floats_of_a_cached_token(layer: LayerSpec) -> int:
    """Keys and values that are made of latents for every pass, as one and apart."""
    attention = layer.attention
    if not isinstance(attention, LatentAttention):
        return 0
    of_head = 2 * attention.plain_size + 2 * attention.value_size + attention.rope_size
    return 2 * attention.n_heads * of_head


def _floats_of_a_score(layer: LayerSpec) -> int:
    """Of the heads of one key-value head: as it was, capped, hidden or not, and its chance."""
    attention = layer.attention
    if not isinstance(attention, GroupedQueryAttention):
        return 0
    if attention.score_cap is None and not attention.sinks:
        return 0
    return 4 * attention.n_heads // attention.n_kv_heads


def _floats_of_a_state(layer: LayerSpec) -> int:
    """A state, what it becomes and what is added to it; and what a chunk's tokens are to another:
    how much decays between them, their products, those that decayed, and the triangle.
    """
    attention = layer.attention
    if not isinstance(attention, GatedDeltaNet | LightningAttention):
        return 0
    *_, maps = attention.state_shapes
    return 3 * math.prod(maps) + 5 * attention.n_heads * CHUNK**2


def _floats_of_a_token(n_hidden: int, layer: LayerSpec) -> int:
    """Activations alive at once: the residual stream, and attention's or those of the experts."""
    experts = layer.feed_forward
    attending = 4 * n_hidden + 6 * _wide(layer)
    inner = max(experts.n_inner, 0 if experts.shared is None else experts.shared.n_inner)
    mixing = 4 * n_hidden + 8 * inner + 2 * experts.router.n_active * n_hidden
    return 4 * n_hidden + max(attending, mixing)


def _wide(layer: LayerSpec) -> int:
    """Of attention, the numbers of a token that are alive at once a few times over."""
    attention = layer.attention
    match attention:
        case LatentAttention():
            return attention.q_size + attention.n_heads * attention.key_size
        case GroupedQueryAttention():
            return (1 + attention.gated) * attention.q_size + attention.kv_size
        case GatedDeltaNet():
            return attention.n_mixed + 2 * attention.n_heads * attention.key_size
        case LightningAttention():
            return 3 * attention.q_size
