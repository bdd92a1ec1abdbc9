"""The operations of a pass on a GPU as torch ops: what each reads, writes and means.

Every operation writes into tensors that the caller owns and allocates nothing, so that a CUDA graph
may replay it. Nothing here waits for the card. All tensors of a call are on one device and
contiguous; lengths are those of the shapes below, and an implementation may rely on them.

Letters: T tokens, H hidden, I inner, E experts, K experts of a token, V vocabulary, A heads,
B key-value heads, D head size; P planes; C columns of a matrix, N its rows.

    rounded tokens   codes [T, C padded to 64] int8, scales [T, C / 128 rounded up] float32: as
                     quant/activations.py says, bit for bit
    a matrix         planes, P tensors [plane_bytes] uint8 as in quant/layout.py; n_out N, n_in C
    the code         table [64] int8, the value of each window; scale_unit, see quant/trellis.py
    experts          parts [E, 3] int64: the address of each expert's part for each plane, as drawn
                     in quant/expert.py, 0 where there is none
    groups           who goes where: the T * K assignments sorted by expert, those of one expert by
                     token. order [T * K] int32: the assignment, token * K + rank, at each place;
                     first [E + 1] int32: the place where each expert begins; active [E + 1] int32:
                     how many experts have tokens, then which, ascending
    ids, positions,  [T] int32: of the vocabulary; below capacity; below S. Ids of experts are int32
    sequences        as well
    workspace        [at least workspace_bytes(...)] uint8, zeroed when it is made; one serves all,
                     one after the other. Its first COUNTER_BYTES, see launches/__init__.py, are 0
                     before and after every operation; beyond them is anything

    embed            x = rows of the embedding in their own basis
    norm_round       normed = x / rms(x) * weight; rounded tokens of it in the basis of d
    round_tokens     rounded tokens of x in the basis of d
    gate_round       rounded tokens of the activation of gate_up [T, 2 * I], gate's first, in the
                     basis of d; times the sigmoid of normed router, [1, H], None for 1
    linear           y = W x + bias, or y += W x + bias; bias: [N], None for zeros
    rope_store       norms and turns queries and keys in place, keys and values go to the cache
    attend           attention of T tokens over the cache, for decoding: T up to 8; sinks: [A],
                     scores of nothing, which take part in each head's softmax; None for none
    route            the experts of each token, in the order they are chosen, ties to the lower id;
                     it leaves its scores, no bias added, in the workspace: [T, E] float32 behind
                     the counters
    prefer           after it and with its workspace, for a softmax without biases: weights, ids and
                     groups anew, the scores of experts that `parts` has counting as higher by boost
                     for the choice, not for weights, whose order is that of the choice
    group            the groups of a routing
    norm_route       norm_round, route and group; shared_*: also rounded tokens of the norm in the
                     basis of shared_d, None for none; of one token all at once
    experts_inner    rounded activation of gate x and up x, plus bias [E, 2 * I], gate's first, of
                     each place, in the basis of that expert's down
    experts_down     x += each token's experts, plus bias [E, H], weighted, summed in the order they
                     were chosen in

The activation is gate * sigmoid(steepness * gate) * (up + shift), with gate kept under limit and up
within +-limit before; 1, 0 and infinity are SwiGLU.

A router scores each expert by a row of `router` [E, H], plus bias [E]. What is likely of an expert
is its part of the softmax over all scores, or its own score's sigmoid. Chosen are those whose
likely plus choice_bias [E] is highest, among the experts of n_groups_active of n_groups groups,
those whose two highest add up to most; groups are for sigmoids. They weigh what is likely of them,
divided by their sum if renormalize, times scale. None: no bias.

The cache of one layer: keys and values, each [S, B, capacity, row]: S conversations; a row is D
float16 or float32, or int8 as lowmoe/kernels/cpu/kv_cache.h draws it: D codes padded to 4, then a
float32 scale. Token t is at positions[t] of conversation sequences[t] and sees positions[t] + 1
positions, of which the latest `window`; 0 for all.

What may become of queries and keys, in this order:

    norm 3           RMS norms of all queries and of all keys of a token; q_norm, k_norm: [A * D],
                     [B * D]
    clamp            values too are kept within +-clamp; infinity for no bounds
    norm 1           RMS norms of each head; q_norm, k_norm: [D]. None of either: ones
    rope             the first 2 * |frequencies| channels of a head turn, a multiple of 4, and are
                     multiplied by rope_length; frequencies: [pairs], radians a token
    norm 2           as norm 1; 0 for no norm

Knows:        names, schemas, meanings.
Ignorant of:  kernels, grids, how a launch is made.
"""

from collections.abc import Callable
from functools import cache, partial

import torch

from cuda_ext.launch import Launch
from cuda_ext.launches import attention, products, routing, vectors

NAMESPACE = "lowmoe"
MOST_DECODED = products.MOST_DECODED  # tokens, T of what is for decoding only

_CODE = "Tensor table, float scale_unit"
_ROUNDED = "Tensor codes, Tensor scales"
_ACTIVATION = "float steepness, float shift, float limit"
_ROUTER = (
    "Tensor router, Tensor? bias, Tensor? choice_bias, bool sigmoid, bool renormalize, "
    "int n_groups, int n_groups_active, float scale"
)
_GROUPS = "Tensor first, Tensor order, Tensor active"
OPERATIONS: dict[str, tuple[Callable[..., None], str]] = {
    "embed": (
        vectors.embed,
        f"(Tensor ids, Tensor[] planes, {_CODE}, Tensor d, Tensor(a!) x) -> ()",
    ),
    "norm_round": (
        vectors.norm_round,
        "(Tensor x, Tensor weight, float epsilon, Tensor d, Tensor(a!) normed, Tensor(b!) codes, "
        "Tensor(c!) scales) -> ()",
    ),
    "round_tokens": (
        vectors.round_tokens,
        "(Tensor x, Tensor d, Tensor(a!) codes, Tensor(b!) scales) -> ()",
    ),
    "gate_round": (
        vectors.gate_round,
        f"(Tensor gate_up, {_ACTIVATION}, Tensor normed, Tensor? router, Tensor d, "
        "Tensor(a!) codes, Tensor(b!) scales) -> ()",
    ),
    "linear": (
        products.linear,
        f"({_ROUNDED}, Tensor[] planes, {_CODE}, int n_out, int n_in, Tensor? bias, "
        "bool add, Tensor(a!) y, Tensor(b!) workspace) -> ()",
    ),
    "rope_store": (
        attention.rope_store,
        "(Tensor(a!) qkv, Tensor frequencies, float rope_length, Tensor positions, "
        "Tensor sequences, int n_heads, int norm, Tensor? q_norm, Tensor? k_norm, float epsilon, "
        "float clamp, Tensor(b!) keys, Tensor(c!) values) -> ()",
    ),
    "attend": (
        attention.attend,
        "(Tensor qkv, Tensor keys, Tensor values, Tensor positions, Tensor sequences, int n_heads, "
        "int window, float score_scale, Tensor? sinks, Tensor(a!) out, Tensor(b!) workspace) -> ()",
    ),
    "route": (
        routing.route,
        f"(Tensor normed, {_ROUTER}, Tensor(a!) weights, Tensor(b!) ids, Tensor(c!) workspace) "
        "-> ()",
    ),
    "group": (
        routing.group,
        "(Tensor ids, int n_experts, Tensor(a!) first, Tensor(b!) order, Tensor(c!) active) -> ()",
    ),
    "prefer": (
        routing.prefer,
        "(Tensor parts, float boost, bool renormalize, Tensor(a!) weights, Tensor(b!) ids, "
        "Tensor(c!) first, Tensor(d!) order, Tensor(e!) active, Tensor(f!) workspace) -> ()",
    ),
    "norm_route": (
        routing.norm_route,
        f"(Tensor x, Tensor weight, float epsilon, Tensor d, {_ROUTER}, "
        "Tensor(a!) normed, Tensor(b!) codes, Tensor(c!) scales, Tensor(d!) weights, "
        "Tensor(e!) ids, Tensor(f!) first, Tensor(g!) order, Tensor(h!) active, "
        "Tensor? shared_d, Tensor(i!)? shared_codes, Tensor(j!)? shared_scales, "
        "Tensor(k!) workspace) -> ()",
    ),
    "experts_inner": (
        products.experts_inner,
        f"({_ROUNDED}, Tensor parts, int n_planes, {_CODE}, {_GROUPS}, Tensor d_inner, "
        f"Tensor? bias, {_ACTIVATION}, int n_hidden, int n_active, Tensor(a!) inner_codes, "
        "Tensor(b!) inner_scales, Tensor(c!) workspace) -> ()",
    ),
    "experts_down": (
        products.experts_down,
        "(Tensor inner_codes, Tensor inner_scales, Tensor parts, int n_planes, "
        f"{_CODE}, {_GROUPS}, Tensor? bias, Tensor weights, int n_inner, Tensor(a!) x, "
        "Tensor(b!) workspace) -> ()",
    ),
}


@cache
def define() -> torch.library.Library:
    """Make the schemas known to torch, for the rest of the process."""
    library = torch.library.Library(NAMESPACE, "DEF")
    for name, (_, schema) in OPERATIONS.items():
        library.define(name + schema)
    return library


def implement(launch: Launch, key: str) -> torch.library.Library:
    """Give every operation an implementation for tensors of a dispatch key, "CUDA" or "CPU"."""
    library = torch.library.Library(NAMESPACE, "IMPL")
    for name, (run, _) in OPERATIONS.items():
        library.impl(name, partial(run, launch), key)
    return library
