"""Random operands for the operations of cuda_ext/ops.py.

Everything is a function of its seed. Planes are random bytes with sane scales: whatever the format
can hold occurs, nibbles of 0 and rows of scale 0 too.

Knows:        shapes and dtypes of every operand.
Ignorant of:  what is computed with them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from quant.activations import round_activations
from quant.expert import TrellisFormat
from quant.layout import MAX_PLANES, PlaneLayout, round_up
from quant.matrix import TrellisMatrix
from quant.trellis import DEFAULT_CODE, TrellisCode
from tests.cuda_ext import oracle

CODE = DEFAULT_CODE
TABLE = torch.tensor(CODE.table, dtype=torch.int8)
SCALE_UNIT = CODE.scale_unit
PLANE_RATIO = 0.28  # of what a plane codes to what the one before it does


def numbers(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_plane(layout: PlaneLayout, *, plane: int = 0, seed: int = 0) -> Tensor:
    """[plane_bytes] uint8, of weights whose rms is about 1 / sqrt(n_in)."""
    generator = numbers(seed)
    data = torch.randint(0, 256, (layout.plane_bytes,), generator=generator, dtype=torch.uint8)
    loudness = PLANE_RATIO**plane / layout.n_in**0.5
    rows = torch.empty(layout.padded_rows).uniform_(0.5, 2.0, generator=generator) * loudness
    rows[7::31] = 0
    rows[layout.n_out :] = 0
    end = layout.gain_offset
    data[layout.row_scale_offset : end].view(torch.float16).copy_(rows)
    data[end : end + 4].view(torch.float32).fill_(1.0 + 0.01 * (seed % 7))
    return data


def random_d(*shape: int, seed: int = 0) -> Tensor:
    """An input transform: signs times loudnesses, float16."""
    generator = numbers(seed)
    loud = torch.empty(shape).uniform_(0.5, 2.0, generator=generator)
    return torch.where(torch.rand(shape, generator=generator) < 0.5, -loud, loud).half()


def random_matrix(
    n_out: int, n_in: int, n_planes: int, *, seed: int = 0, code: TrellisCode = CODE
) -> TrellisMatrix:
    layout = PlaneLayout(n_out, n_in)
    planes = tuple(random_plane(layout, plane=p, seed=10 * seed + p) for p in range(n_planes))
    return TrellisMatrix(layout, code, planes, random_d(n_in, seed=seed))


def random_tokens(n_tokens: int, n_in: int, *, seed: int = 0) -> Tensor:
    """[T, n_in] float32 with outliers, and where there are several, a token of zeros."""
    generator = numbers(seed)
    x = torch.randn(n_tokens, n_in, generator=generator)
    x[:, :: max(n_in // 3, 1)] *= 20
    if n_tokens > 2:
        x[2] = 0
    return x


def random_rounded(n_tokens: int, n_in: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Codes [T, C padded] int8 and scales [T, groups] float32 of random tokens."""
    x = random_tokens(n_tokens, n_in, seed=seed)
    rounded = round_activations(x, random_d(n_in, seed=seed + 1))
    return rounded.codes, rounded.scales


def empty_rounded(n_tokens: int, n_in: int) -> tuple[Tensor, Tensor]:
    """Room for codes and scales, poisoned: NaN where nothing is written."""
    codes = torch.full((n_tokens, round_up(n_in, 64)), 99, dtype=torch.int8)
    return codes, torch.full((n_tokens, round_up(n_in, 128) // 128), torch.nan)


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """A layer's experts.  table: [E, 3] int64 addresses; bytes_of: what they point to, [E][P]."""

    format: TrellisFormat
    bytes_of: list[list[Tensor]]
    table: Tensor
    d_in: Tensor
    d_inner: Tensor


def random_experts(
    n_experts: int,
    n_hidden: int,
    n_inner: int,
    n_planes: int,
    *,
    missing: tuple[int, ...] = (),
    seed: int = 0,
) -> Experts:
    """missing: experts that have no parts."""
    format = TrellisFormat(n_hidden, n_inner, n_planes, CODE)
    bytes_of = [
        [_random_part(format, p, seed=1000 * seed + 10 * e + p) for p in range(n_planes)]
        for e in range(n_experts)
    ]
    table = torch.zeros(n_experts, MAX_PLANES, dtype=torch.int64)
    for expert_id, parts in enumerate(bytes_of):
        if expert_id not in missing:
            table[expert_id, :n_planes] = torch.tensor([part.data_ptr() for part in parts])
    return Experts(
        format=format,
        bytes_of=bytes_of,
        table=table,
        d_in=random_d(n_hidden, seed=seed),
        d_inner=random_d(n_experts, n_inner, seed=seed + 1),
    )


def _random_part(format: TrellisFormat, plane: int, *, seed: int) -> Tensor:
    layouts = (format.gate_up, format.down)
    part = torch.cat(
        [random_plane(layout, plane=plane, seed=2 * seed + i) for i, layout in enumerate(layouts)]
    )
    # A card reads pinned memory where it is, by the address that a table of experts has.
    return part.pin_memory() if torch.cuda.is_available() else part


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """A routing, ids and weights [T, K], and who goes where."""

    ids: Tensor
    weights: Tensor
    first: Tensor
    order: Tensor
    active: Tensor


def random_groups(n_tokens: int, n_experts: int, n_active: int, *, seed: int = 0) -> Groups:
    """Each token goes to n_active different experts, with weights that add up to 1."""
    generator = numbers(seed)
    scores = torch.randn(n_tokens, n_experts, generator=generator)
    weights, ids = (2 * scores).softmax(1).topk(n_active, dim=1)
    return groups_of_ids(ids.int(), weights / weights.sum(1, keepdim=True), n_experts)


def groups_of_ids(ids: Tensor, weights: Tensor, n_experts: int) -> Groups:
    """The groups of a given routing, [T, K] each."""
    first, order, active = empty_groups(ids.numel(), n_experts)
    oracle.group(ids, n_experts, first, order, active)
    return Groups(ids=ids, weights=weights, first=first, order=order, active=active)


def empty_groups(n_assignments: int, n_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Room for first, order and active, poisoned."""
    sizes = (n_experts + 1, n_assignments, n_experts + 1)
    first, order, active = (torch.full((n,), -9, dtype=torch.int32) for n in sizes)
    return first, order, active


def cache_row(head_size: int, dtype: torch.dtype) -> int:
    """Numbers, or bytes of int8, that one head of one token takes."""
    return round_up(head_size, 4) + 4 if dtype == torch.int8 else head_size


def random_cache(
    n_sequences: int,
    n_kv_heads: int,
    capacity: int,
    head_size: int,
    dtype: torch.dtype,
    *,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Keys and values, [S, B, capacity, row] each, all positions filled."""
    shape = (2, n_sequences, n_kv_heads, capacity, head_size)
    heads = torch.randn(shape, generator=numbers(seed))
    keys, values = oracle.stored_heads(heads, dtype)
    return keys.contiguous(), values.contiguous()
