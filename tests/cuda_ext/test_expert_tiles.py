"""Experts of many tokens: what the CPU's tiles say, whoever asks whom and whoever is not here."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from cuda_ext.launches import COUNTER_BYTES
from lowmoe.spec import SILU, Activation
from quant.activations import round_activations
from quant.expert import TrellisFormat
from tests.cuda_emulator.emulated import ORDERS, EmulatedLaunch
from tests.cuda_ext import oracle
from tests.cuda_ext.cpu_tiles import FEWEST_TOKENS, cpu_tiles, workspace
from tests.cuda_ext.samples import (
    SCALE_UNIT,
    TABLE,
    Experts,
    empty_rounded,
    numbers,
    random_experts,
    random_rounded,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """ids [T, K], first, order, active: see cuda_ext/ops.py."""

    ids: Tensor
    first: Tensor
    order: Tensor
    active: Tensor


def routing_of(ids: Tensor, n_experts: int) -> Routing:
    n_places = ids.numel()
    first, order, active = (
        torch.empty(n, dtype=torch.int32) for n in (n_experts + 1, n_places, n_experts + 1)
    )
    oracle.group(ids, n_experts, first, order, active)
    return Routing(ids=ids, first=first, order=order, active=active)


def uneven_routing(n_tokens: int, n_active: int, n_experts: int) -> Routing:
    """Expert 0 of every token, expert 1 of one, the last of nobody, the rest of some."""
    generator = numbers(n_tokens)
    ids = torch.zeros(n_tokens, n_active, dtype=torch.int32)
    for token in range(n_tokens):
        others = 2 + torch.randperm(n_experts - 3, generator=generator)[: n_active - 1]
        ids[token, 1:] = others
    ids[n_tokens // 2, -1] = 1
    return routing_of(ids, n_experts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A case: experts and who asks them.  missing: experts that are not here."""

    experts: Experts
    routing: Routing
    missing: tuple[int, ...]

    @property
    def format(self) -> TrellisFormat:
        return self.experts.format

    def places(self) -> list[tuple[int, slice]]:
        """Of every expert that is here and is asked."""
        groups = oracle.groups_of(self.routing.first, self.routing.active)
        return [(e, places) for e, places in groups if e not in self.missing]

    def planes(self, expert_id: int, *, down: bool) -> tuple[Tensor, ...]:
        gate_up, both = self.format.gate_up.plane_bytes, self.format.part_bytes[0]
        cut = slice(gate_up, both) if down else slice(gate_up)
        return tuple(part[cut] for part in self.experts.bytes_of[expert_id])


CASES = (  # tokens, experts of each, experts, hidden, inner, planes, missing
    (FEWEST_TOKENS, 2, 5, 128, 64, 1, ()),
    (20, 3, 6, 300, 192, 2, (2,)),  # gate and up of a unit that has half its channels
    (90, 2, 5, 64, 200, 2, (1,)),  # Hadamard blocks of 8
    (140, 1, 4, 128, 256, 3, ()),  # two tiles of one expert, two units
)


def layer_of(case: tuple[int, int, int, int, int, int, tuple[int, ...]]) -> Layer:
    n_tokens, n_active, n_experts, n_hidden, n_inner, n_planes, missing = case
    return Layer(
        experts=random_experts(n_experts, n_hidden, n_inner, n_planes, missing=missing),
        routing=uneven_routing(n_tokens, n_active, n_experts),
        missing=missing,
    )


SWIGLU = (None, 1.0, 0.0, math.inf)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_inner_tokens_are_those_of_the_cpus_tiles(
    emulated: EmulatedLaunch,
    case: tuple[int, int, int, int, int, int, tuple[int, ...]],
    order: int,
) -> None:
    emulated.order = order
    check_inner(case, None, SILU)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_so_they_are_with_biases_and_another_activation(
    emulated: EmulatedLaunch, case: tuple[int, int, int, int, int, int, tuple[int, ...]]
) -> None:
    bias = torch.randn(case[2], 2 * case[4], generator=numbers(6))
    check_inner(case, bias, Activation(steepness=1.702, shift=1.0, limit=0.9))


def check_inner(
    case: tuple[int, int, int, int, int, int, tuple[int, ...]],
    bias: Tensor | None,
    activation: Activation,
) -> None:
    limit = math.inf if activation.limit is None else activation.limit
    kind = (bias, activation.steepness, activation.shift, limit)
    layer, (n_tokens, n_active, _, n_hidden, n_inner, n_planes, _) = layer_of(case), case
    experts, routing = layer.experts, layer.routing
    codes, scales = random_rounded(n_tokens, n_hidden)
    found_codes, found_scales = empty_rounded(n_tokens * n_active, n_inner)
    expected_codes, expected_scales = found_codes.clone(), found_scales.clone()
    torch.ops.lowmoe.experts_inner(
        codes, scales, experts.table, n_planes, TABLE, SCALE_UNIT, routing.first, routing.order,
        routing.active, experts.d_inner, *kind, n_hidden, n_active, found_codes, found_scales,
        workspace(),
    )  # fmt: skip
    for expert_id, places in layer.places():
        tokens = routing.order[places].long() // n_active
        planes = layer.planes(expert_id, down=False)
        both = cpu_tiles(planes, layer.format.gate_up, codes[tokens], scales[tokens])
        halves = both.view(both.shape[0], -1, 2, 64)
        gate, up = (halves[:, :, h].flatten(1)[:, :n_inner].double() for h in (0, 1))
        if bias is not None:
            of_gate, of_up = bias[expert_id].chunk(2)
            gate, up = gate + of_gate, up + of_up
        inner = oracle.activated(gate, up, activation).float()
        rounded = round_activations(inner, experts.d_inner[expert_id])
        expected_codes[places], expected_scales[places] = rounded.codes, rounded.scales
    # Beside products of the same bits: an exponential of 2 units in the last place, a sum, a
    # quotient and two products, all within 8 units; then up to seven sums of Hadamard's that may
    # cancel, so the scale's share of a group's largest, 128 times that at the utmost.
    torch.testing.assert_close(
        found_scales, expected_scales, rtol=128 * 8 * 2.0**-24, atol=0, equal_nan=True
    )
    off = (found_codes.int() - expected_codes.int()).abs()
    assert off.max() <= 1  # what is near the middle between two codes may go to either
    assert (off > 0).float().mean() < 0.002


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_tokens_experts_are_added_weighted(
    emulated: EmulatedLaunch,
    case: tuple[int, int, int, int, int, int, tuple[int, ...]],
    order: int,
    has_bias: bool,
) -> None:
    emulated.order = order
    layer, (n_tokens, n_active, _, n_hidden, n_inner, n_planes, _) = layer_of(case), case
    experts, routing = layer.experts, layer.routing
    codes, scales = random_rounded(n_tokens * n_active, n_inner)
    # Nobody has written the places of experts that are not here.
    absent = torch.ones(codes.shape[0], dtype=torch.bool)
    for _, places in layer.places():
        absent[places] = False
    codes[absent], scales[absent] = 99, torch.nan
    weights = torch.rand(n_tokens, n_active, generator=numbers(3))
    n_experts = experts.table.shape[0]
    bias = torch.randn(n_experts, n_hidden, generator=numbers(5)) if has_bias else None
    before = torch.randn(n_tokens, n_hidden, generator=numbers(4))
    x = before.clone()
    space = workspace(n_tokens, n_hidden, n_active)
    torch.ops.lowmoe.experts_down(
        codes, scales, experts.table, n_planes, TABLE, SCALE_UNIT, routing.first, routing.order,
        routing.active, bias, weights, n_inner, x, space,
    )  # fmt: skip
    outputs = torch.zeros(n_tokens * n_active, n_hidden)
    for expert_id, places in layer.places():
        planes = layer.planes(expert_id, down=True)
        y = cpu_tiles(planes, layer.format.down, codes[places], scales[places])
        of_expert = 0 if bias is None else bias[expert_id]
        outputs[routing.order[places].long()] = y[:, :n_hidden] + of_expert
    heard = outputs.view(n_tokens, n_active, n_hidden).double() * weights.double()[:, :, None]
    # n_active fused products and sums and one more sum, each off by half a unit in the last place
    # of what is at most the sum of the terms' magnitudes. Sums begin with the bias: each step, one
    # for each scale group, may then be rounded otherwise.
    terms = heard.abs().sum(1) + before.abs()
    allowed = (n_active + 1) * 2.0**-24 * terms
    if bias is not None:
        allowed += 2 * (-(-n_inner // 128) + 1) * 2.0**-24 * (terms + 2 * bias.abs().amax())
    assert ((x.double() - (before + heard.sum(1))).abs() <= allowed).all()
    assert not space[:COUNTER_BYTES].any()


def test_a_layer_is_near_what_the_planes_say(emulated: EmulatedLaunch) -> None:
    n_tokens, n_active, n_experts, n_hidden, n_inner, n_planes = 64, 2, 5, 256, 256, 2
    experts = random_experts(n_experts, n_hidden, n_inner, n_planes)
    routing = uneven_routing(n_tokens, n_active, n_experts)
    codes, scales = random_rounded(n_tokens, n_hidden)
    weights = torch.rand(n_tokens, n_active, generator=numbers(3))
    found = []
    for run in (oracle, torch.ops.lowmoe):
        inner_codes, inner_scales = empty_rounded(n_tokens * n_active, n_inner)
        x = torch.zeros(n_tokens, n_hidden)
        space = workspace(n_tokens, n_hidden, n_active)
        groups = (routing.first, routing.order, routing.active)
        run.experts_inner(
            codes, scales, experts.table, n_planes, TABLE, SCALE_UNIT, *groups, experts.d_inner,
            *SWIGLU, n_hidden, n_active, inner_codes, inner_scales, space,
        )  # fmt: skip
        run.experts_down(
            inner_codes, inner_scales, experts.table, n_planes, TABLE, SCALE_UNIT, *groups, None,
            weights, n_inner, x, space,
        )  # fmt: skip
        found.append(x.double())
    exact, x = found
    # Rounding a stack to int8 costs 7.2e-5 of its weights' energy where they are Gaussian
    # (lowmoe/kernels/cpu/trellis_tile.h), and it happens in gate, up and down; these random planes,
    # flatter than Gaussian and with nibbles that differ by more, get four times as much.
    energy = (x - exact).square().sum() / exact.square().sum()
    assert energy < 3 * 4 * 7.2e-5
