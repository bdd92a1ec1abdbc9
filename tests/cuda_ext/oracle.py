"""Every operation of cuda_ext/ops.py in plain torch on the CPU: slow and right.

Products and attention are summed in float64 from the very codes, scales and cached numbers that a
kernel reads, so that a kernel differs from them by the order of its sums and by float32 alone.
What ops.py promises bit for bit (roundings to int8, groups, cached heads) is the same bits here,
given the same input.

Knows:        what every operation means, in terms of quant/ and lowmoe/decoder.
Ignorant of:  kernels, launches.
"""

import ctypes
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cuda_ext.launches.routing import scores_in
from lowmoe.decoder.rope import rotate
from lowmoe.spec import SILU, Activation
from quant.activations import MOST_CODE, SCALE_COLUMNS, SILENCE, round_activations
from quant.expert import Expert, TrellisFormat
from quant.layout import BLOCK_CODE_BYTES, BLOCK_COLUMNS, BLOCK_SCALE_BYTES, PlaneLayout, round_up
from quant.matrix import TrellisMatrix
from quant.trellis import (
    SCALE_LEVELS,
    TrellisCode,
    gain,
    group_scales,
    row_scales,
    table_values,
)

HEAD_SCALE_BYTES = 4

# --- vectors


def embed(
    ids: Tensor, planes: Sequence[Tensor], table: Tensor, scale_unit: float, d: Tensor, x: Tensor
) -> None:
    layout = PlaneLayout(_rows_of(planes[0], d.shape[0]), d.shape[0])
    matrix = TrellisMatrix(layout, code_of(table, scale_unit), tuple(planes), d)
    x.copy_(matrix.rows(ids.long()))


def norm_round(
    x: Tensor,
    weight: Tensor,
    epsilon: float,
    d: Tensor,
    normed: Tensor,
    codes: Tensor,
    scales: Tensor,
) -> None:
    """normed: [T, H], or empty where nobody wants it."""
    found = rms_normed(x, weight, epsilon)
    if normed.numel():
        normed.copy_(found)
    round_tokens(found, d, codes, scales)


def rms_normed(x: Tensor, weight: Tensor | None, epsilon: float) -> Tensor:
    """x / rms(x) * weight over the last dimension, in float64, rounded once."""
    wide = x.double()
    root = (wide.square().mean(-1, keepdim=True) + epsilon).sqrt()
    return (wide / root * (1.0 if weight is None else weight.double())).float()


def round_tokens(x: Tensor, d: Tensor, codes: Tensor, scales: Tensor) -> None:
    rounded = round_activations(x, d)
    codes.copy_(rounded.codes)
    scales.copy_(rounded.scales)


def gate_round(
    gate_up: Tensor,
    steepness: float,
    shift: float,
    limit: float,
    normed: Tensor,
    router: Tensor | None,
    d: Tensor,
    codes: Tensor,
    scales: Tensor,
) -> None:
    kind = Activation(steepness=steepness, shift=shift, limit=limit)
    inner = activated(*gate_up.double().chunk(2, dim=1), kind)
    if router is not None:
        inner = inner * (normed.double() @ router.double().T).sigmoid()
    round_tokens(inner.float(), d, codes, scales)


# --- products


def linear(
    codes: Tensor,
    scales: Tensor,
    planes: Sequence[Tensor],
    table: Tensor,
    scale_unit: float,
    n_out: int,
    n_in: int,
    bias: Tensor | None,
    add: bool,
    y: Tensor,
    workspace: Tensor,
) -> None:
    code = code_of(table, scale_unit)
    product = values_of(codes, scales) @ weights_of(planes, PlaneLayout(n_out, n_in), code).T
    if bias is not None:
        product += bias.double()
    y.copy_(y.double() + product if add else product)


def experts_inner(
    codes: Tensor,
    scales: Tensor,
    parts: Tensor,
    n_planes: int,
    table: Tensor,
    scale_unit: float,
    first: Tensor,
    order: Tensor,
    active: Tensor,
    d_inner: Tensor,
    bias: Tensor | None,
    steepness: float,
    shift: float,
    limit: float,
    n_hidden: int,
    n_active: int,
    inner_codes: Tensor,
    inner_scales: Tensor,
    workspace: Tensor,
) -> None:
    """Places whose expert has no parts are left as they are."""
    format = TrellisFormat(n_hidden, d_inner.shape[1], n_planes, code_of(table, scale_unit))
    x = values_of(codes, scales)
    for expert_id, places in groups_of(first, active):
        expert = expert_at(parts[expert_id], format)
        if expert is not None:
            tokens = order[places].long() // n_active
            kind = Activation(steepness=steepness, shift=shift, limit=limit)
            own = None if bias is None else bias[expert_id]
            inner = inner_of(x[tokens], expert, own, kind).float()
            rounded = round_activations(inner, d_inner[expert_id])
            inner_codes[places], inner_scales[places] = rounded.codes, rounded.scales


def experts_down(
    inner_codes: Tensor,
    inner_scales: Tensor,
    parts: Tensor,
    n_planes: int,
    table: Tensor,
    scale_unit: float,
    first: Tensor,
    order: Tensor,
    active: Tensor,
    bias: Tensor | None,
    weights: Tensor,
    n_inner: int,
    x: Tensor,
    workspace: Tensor,
) -> None:
    """An expert that has no parts adds nothing."""
    format = TrellisFormat(x.shape[1], n_inner, n_planes, code_of(table, scale_unit))
    outputs = torch.zeros(order.shape[0], x.shape[1], dtype=torch.float64)  # [T * K, H]
    for expert_id, places in groups_of(first, active):
        expert = expert_at(parts[expert_id], format)
        if expert is not None:
            inner = values_of(inner_codes[places], inner_scales[places])
            output = inner @ matrix_weights(expert.down).T
            output += 0 if bias is None else bias[expert_id].double()
            outputs[order[places].long()] = output
    heard = outputs.view(*weights.shape, -1) * weights.double()[:, :, None]  # [T, K, H]
    x.copy_(x.double() + heard.sum(1))


# --- attention


def rope_store(
    qkv: Tensor,
    frequencies: Tensor,
    rope_length: float,
    positions: Tensor,
    sequences: Tensor,
    n_heads: int,
    norm: int,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    epsilon: float,
    clamp: float,
    keys: Tensor,
    values: Tensor,
) -> None:
    n_tokens, n_kv_heads = qkv.shape[0], keys.shape[1]
    heads = qkv.view(n_tokens, n_heads + 2 * n_kv_heads, -1)
    turned = n_heads + n_kv_heads
    both = [(heads[:, :n_heads], q_norm), (heads[:, n_heads:turned], k_norm)]

    def norm_if(kind: int, first_dim: int) -> None:
        for some, weight in both if norm == kind else []:
            flat = some.flatten(first_dim)
            some.copy_(rms_normed(flat, weight, epsilon).view(some.shape))

    norm_if(3, 1)
    heads.clamp_(-clamp, clamp)
    norm_if(1, 2)
    angles = torch.outer(positions.float(), frequencies)
    angles = torch.cat([angles, angles], dim=1)
    cos, sin = angles.cos() * rope_length, angles.sin() * rope_length
    heads[:, :turned] = rotate(heads[:, :turned].clone(), cos, sin)
    norm_if(2, 2)
    at = (sequences.long(), slice(None), positions.long())
    keys[at] = stored_heads(heads[:, n_heads:turned], keys.dtype)
    values[at] = stored_heads(heads[:, turned:], values.dtype)


def attend(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    sequences: Tensor,
    n_heads: int,
    window: int,
    score_scale: float,
    sinks: Tensor | None,
    out: Tensor,
    workspace: Tensor,
) -> None:
    """For any T, so that it is the oracle of a prompt's attention too."""
    n_kv_heads, head_size = keys.shape[1], out.shape[1] // n_heads
    queries = qkv[:, : out.shape[1]].double().view(-1, n_kv_heads, n_heads // n_kv_heads, head_size)
    for token, (position, sequence) in enumerate(
        zip(positions.tolist(), sequences.tolist(), strict=True)
    ):
        end = position + 1
        seen = slice(max(0, end - window) if window else 0, end)
        k, v = (cached_heads(c[sequence, :, seen], head_size) for c in (keys, values))  # [B, S, D]
        scores = queries[token] @ k.transpose(1, 2) * score_scale  # [B, A / B, S]
        if sinks is not None:
            nothing = sinks.double().view(n_kv_heads, -1, 1)
            scores, v = torch.cat([scores, nothing], 2), F.pad(v, (0, 0, 0, 1))
        out[token] = (scores.softmax(2) @ v).flatten()


def stored_heads(heads: Tensor, dtype: torch.dtype) -> Tensor:
    """How heads [..., D] float32 lie in a cache of this dtype, [..., row]."""
    if dtype in (torch.float16, torch.float32):
        return heads.to(dtype)
    amax = heads.abs().amax(-1, keepdim=True)
    finite, loud = amax.isfinite(), amax >= SILENCE
    most = torch.tensor(float(MOST_CODE))
    scales = torch.where(loud, amax / most, 0.0).where(finite, torch.nan)
    steps = torch.where(loud & finite, most / amax, 0.0)
    codes = (heads * steps).round().nan_to_num(0.0).to(torch.int8)
    padding = round_up(heads.shape[-1], HEAD_SCALE_BYTES) - heads.shape[-1]
    codes = F.pad(codes, (0, padding))
    return torch.cat([codes, scales.contiguous().view(torch.int8)], dim=-1).view(dtype)


def cached_heads(rows: Tensor, head_size: int) -> Tensor:
    """The numbers that rows of a cache [..., row] stand for, [..., D] float64."""
    if rows.dtype in (torch.float16, torch.float32):
        return rows.double()
    scales = rows[..., -HEAD_SCALE_BYTES:].contiguous().view(torch.float32)
    return rows[..., :head_size].view(torch.int8).double() * scales.double()


# --- routing


def route(
    normed: Tensor,
    router: Tensor,
    bias: Tensor | None,
    choice_bias: Tensor | None,
    sigmoid: bool,
    renormalize: bool,
    n_groups: int,
    n_groups_active: int,
    scale: float,
    weights: Tensor,
    ids: Tensor,
    workspace: Tensor,
) -> None:
    scores = normed.double() @ router.double().T  # [T, E]
    if workspace.numel():
        scores_in(workspace, *scores.shape).copy_(scores)
    scores += 0 if bias is None else bias.double()
    shares = scores.sigmoid() if sigmoid else scores.softmax(1)
    # Sorted by score where that is the same: shares of experts far behind are all 0.
    choice = scores if not sigmoid and choice_bias is None else shares
    choice = choice if choice_bias is None else choice + choice_bias.double()
    groups = choice.view(choice.shape[0], n_groups, -1)
    best = groups.topk(min(2, groups.shape[2]), dim=2).values.sum(2)
    closed = best.sort(stable=True, dim=1, descending=True).indices[:, n_groups_active:]
    choice = groups.scatter(1, closed[:, :, None].expand(-1, -1, groups.shape[2]), -torch.inf)
    # Stable: ties go to the lower id.
    order = choice.flatten(1).sort(stable=True, dim=1, descending=True).indices
    chosen = order[:, : ids.shape[1]]
    heard = shares.gather(1, chosen)
    if renormalize:
        heard = heard / (heard.sum(1, keepdim=True) + 1e-20)
    weights.copy_(heard * scale)
    ids.copy_(chosen)


def prefer(
    parts: Tensor,
    boost: float,
    renormalize: bool,
    weights: Tensor,
    ids: Tensor,
    first: Tensor,
    order: Tensor,
    active: Tensor,
    workspace: Tensor,
) -> None:
    n_experts = parts.shape[0]
    scores = scores_in(workspace, ids.shape[0], n_experts).double()
    preferred = scores + boost * (parts[:, 0] != 0)
    chosen = preferred.sort(stable=True, dim=1, descending=True).indices[:, : ids.shape[1]]
    heard = scores.softmax(1).gather(1, chosen)
    weights.copy_(heard / heard.sum(1, keepdim=True) if renormalize else heard)
    ids.copy_(chosen)
    group(ids, n_experts, first, order, active)


def group(ids: Tensor, n_experts: int, first: Tensor, order: Tensor, active: Tensor) -> None:
    flat = ids.flatten().long()
    counts = torch.bincount(flat, minlength=n_experts)
    order.copy_(flat.argsort(stable=True))
    first.zero_()
    first[1:] = counts.cumsum(0)
    which = torch.nonzero(counts).flatten()
    active[0] = which.shape[0]
    active[1 : 1 + which.shape[0]] = which


def norm_route(
    x: Tensor,
    weight: Tensor,
    epsilon: float,
    d: Tensor,
    router: Tensor,
    bias: Tensor | None,
    choice_bias: Tensor | None,
    sigmoid: bool,
    renormalize: bool,
    n_groups: int,
    n_groups_active: int,
    scale: float,
    normed: Tensor,
    codes: Tensor,
    scales: Tensor,
    weights: Tensor,
    ids: Tensor,
    first: Tensor,
    order: Tensor,
    active: Tensor,
    shared_d: Tensor | None,
    shared_codes: Tensor | None,
    shared_scales: Tensor | None,
    workspace: Tensor,
) -> None:
    norm_round(x, weight, epsilon, d, normed, codes, scales)
    kind = (bias, choice_bias, sigmoid, renormalize, n_groups, n_groups_active, scale)
    route(normed, router, *kind, weights, ids, workspace)
    group(ids, router.shape[0], first, order, active)
    if shared_d is not None:
        assert shared_codes is not None
        assert shared_scales is not None
        round_tokens(normed, shared_d, shared_codes, shared_scales)


OPERATIONS = {
    "embed": embed,
    "norm_round": norm_round,
    "round_tokens": round_tokens,
    "gate_round": gate_round,
    "linear": linear,
    "rope_store": rope_store,
    "attend": attend,
    "route": route,
    "group": group,
    "prefer": prefer,
    "norm_route": norm_route,
    "experts_inner": experts_inner,
    "experts_down": experts_down,
}


# --- what all of them read


def code_of(table: Tensor, scale_unit: float) -> TrellisCode:
    """The code of a table [64] int8."""
    return TrellisCode(table=tuple(table.tolist()), table_unit=scale_unit * SCALE_LEVELS)


def values_of(codes: Tensor, scales: Tensor) -> Tensor:
    """What rounded tokens stand for, [T, padded columns] float64, no rounding."""
    wide = scales.double().repeat_interleave(SCALE_COLUMNS, dim=1)
    return codes.double() * wide[:, : codes.shape[1]]


def weights_of(planes: Sequence[Tensor], layout: PlaneLayout, code: TrellisCode) -> Tensor:
    """What a rounded token is multiplied with, [n_out, padded columns] float64: gain W / d H.

    Unlike TrellisMatrix.transformed, no float32 on the way.
    """
    total = torch.zeros(layout.padded_rows, layout.padded_columns, dtype=torch.float64)
    for plane in planes:
        numbers = table_values(plane, layout, code).double()
        groups = group_scales(plane, layout).double() * row_scales(plane, layout).double()[:, None]
        total += numbers * groups.repeat_interleave(BLOCK_COLUMNS, dim=1)
    return (total * (code.scale_unit * gain(planes[-1], layout)))[: layout.n_out]


def matrix_weights(matrix: object) -> Tensor:
    """weights_of a matrix of planes."""
    assert isinstance(matrix, TrellisMatrix)
    return weights_of(matrix.planes, matrix.layout, matrix.code)


def inner_of(
    x: Tensor, expert: Expert, bias: Tensor | None = None, kind: Activation = SILU
) -> Tensor:
    """The activation of gate x and up x, [T, I] float64.  x: values_of the expert's tokens."""
    gate, up = expert.split(x @ matrix_weights(expert.gate_up).T)
    if bias is not None:
        of_gate, of_up = bias.double().chunk(2)
        gate, up = gate + of_gate, up + of_up
    return activated(gate, up, kind)


def activated(gate: Tensor, up: Tensor, kind: Activation) -> Tensor:
    """In the dtype of both."""
    if kind.limit is not None:
        gate, up = gate.clamp(max=kind.limit), up.clamp(-kind.limit, kind.limit)
    return gate * torch.sigmoid(kind.steepness * gate) * (up + kind.shift)


def groups_of(first: Tensor, active: Tensor) -> list[tuple[int, slice]]:
    """Every active expert, and the places of its assignments."""
    which = active[1 : 1 + int(active[0])].tolist()
    return [(e, slice(int(first[e]), int(first[e + 1]))) for e in which]


def expert_at(addresses: Tensor, format: TrellisFormat) -> Expert | None:
    """The expert whose parts lie at addresses [3] int64; None where there is none."""
    where = addresses[: format.n_planes].tolist()
    if 0 in where:
        return None
    parts = [_bytes_at(a, n) for a, n in zip(where, format.part_bytes, strict=True)]
    no_d = torch.empty(0)  # tokens have been turned already
    return format.open(tuple(parts), no_d, no_d)


def _bytes_at(address: int, n_bytes: int) -> Tensor:
    return torch.frombuffer((ctypes.c_uint8 * n_bytes).from_address(address), dtype=torch.uint8)


def _rows_of(plane: Tensor, n_in: int) -> int:
    """Rows of the matrix that a plane codes, padded, from the regions of quant/layout.py."""
    column_blocks = -(-n_in // BLOCK_COLUMNS)
    of_a_row_block = column_blocks * (BLOCK_CODE_BYTES + BLOCK_SCALE_BYTES) + 2 * 64
    row_blocks = (plane.shape[0] - 64) // of_a_row_block
    assert PlaneLayout(64 * row_blocks, n_in).plane_bytes == plane.shape[0]
    return 64 * row_blocks
