"""A layer's operands on a device: random planes, rounded tokens, routings.

Knows:        shapes and dtypes of every operand of cuda_ext/ops.py.
Ignorant of:  what is timed.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.gpu.shapes import ExpertShape
from quant.expert import TrellisFormat
from quant.layout import MAX_PLANES, PlaneLayout, round_up
from quant.trellis import DEFAULT_CODE

CODE = DEFAULT_CODE
PLANE_RATIO = 0.28  # of what a plane codes to what the one before it does


def random_plane(layout: PlaneLayout, plane: int, place: torch.device) -> Tensor:
    """[plane_bytes] uint8, of weights whose rms is about 1 / sqrt(n_in)."""
    data = torch.randint(0, 256, (layout.plane_bytes,), dtype=torch.uint8, device=place)
    loudness = PLANE_RATIO**plane / layout.n_in**0.5
    end = layout.gain_offset
    data[layout.row_scale_offset : end].view(torch.float16).fill_(loudness)
    data[end : end + 4].view(torch.float32).fill_(1.0)
    return data


def code_table(place: torch.device) -> Tensor:
    """[64] int8."""
    return torch.tensor(CODE.table, dtype=torch.int8, device=place)


def rounded(n_tokens: int, n_in: int, place: torch.device) -> tuple[Tensor, Tensor]:
    """Codes and scales of random tokens."""
    size = (n_tokens, round_up(n_in, 64))
    codes = torch.randint(-127, 128, size, dtype=torch.int8, device=place)
    codes[:, n_in:] = 0
    groups = round_up(n_in, 128) // 128
    return codes, torch.full((n_tokens, groups), 1 / 50, device=place)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """Experts in memory.  table: [E, 3] int64 addresses of `parts`; d_inner: [E, I] float16."""

    shape: ExpertShape
    n_planes: int
    parts: list[list[Tensor]]
    table: Tensor
    d_inner: Tensor

    @property
    def expert_bytes(self) -> int:
        return sum(part.nbytes for part in self.parts[0])


def random_layer(shape: ExpertShape, n_planes: int, n_experts: int, place: torch.device) -> Layer:
    """The first n_experts of the shape's."""
    format = TrellisFormat(shape.n_hidden, shape.n_inner, n_planes, CODE)
    parts = [
        [
            torch.cat([random_plane(each, p, place) for each in (format.gate_up, format.down)])
            for p in range(n_planes)
        ]
        for _ in range(n_experts)
    ]
    table = torch.zeros(n_experts, MAX_PLANES, dtype=torch.int64)
    table[:, :n_planes] = torch.tensor([[part.data_ptr() for part in of] for of in parts])
    signs = torch.randint(0, 2, (n_experts, shape.n_inner), device=place) * 2 - 1
    return Layer(
        shape=shape,
        n_planes=n_planes,
        parts=parts,
        table=table.to(place),
        d_inner=signs.half(),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """Where tokens go: ids and weights [T, K], and the groups of ops.py, to be filled."""

    ids: Tensor
    weights: Tensor
    first: Tensor
    order: Tensor
    active: Tensor


def random_routing(n_tokens: int, n_experts: int, n_active: int, place: torch.device) -> Routing:
    """Every token goes to n_active different experts, all of them equally often on average."""
    scores = torch.rand(n_tokens, n_experts, device=place)
    ids = scores.topk(n_active, dim=1).indices.int()
    routing = Routing(
        ids=ids,
        weights=torch.full((n_tokens, n_active), 1 / n_active, device=place),
        first=torch.empty(n_experts + 1, dtype=torch.int32, device=place),
        order=torch.empty(n_tokens * n_active, dtype=torch.int32, device=place),
        active=torch.empty(n_experts + 1, dtype=torch.int32, device=place),
    )
    torch.ops.lowmoe.group(ids, n_experts, routing.first, routing.order, routing.active)
    return routing
