"""The oracle of the GPU's operations against what the CPU's are held to: quant/ and lowmoe/decoder.

Both say the same in other words, the one in float64, the other in float32: tolerances are those of
sums of some hundred float32 products.
"""

import pytest
import torch
import torch.nn.functional as F

from lowmoe.decoder.router import route_softmax, router_logits
from lowmoe.kernels.reference import ReferenceKernels
from lowmoe.spec import SoftmaxRouter
from quant.activations import RoundedActivations, round_activations
from quant.matrix import TrellisMatrix
from tests.cuda_ext import oracle, samples

NO_WORKSPACE = torch.empty(0, dtype=torch.uint8)
NEAR = {"rtol": 1e-4, "atol": 1e-4}
PLANES = [1, 2, 3]
CACHES = [torch.float16, torch.float32, torch.int8]


def values(codes: torch.Tensor, scales: torch.Tensor, n_in: int) -> torch.Tensor:
    """What rounded tokens stand for, in quant's words."""
    return RoundedActivations(codes, scales, torch.empty(0)).values()[:, :n_in]


@pytest.mark.parametrize("n_planes", PLANES)
@pytest.mark.parametrize(("n_out", "n_in"), [(64, 64), (200, 192), (33, 50), (130, 256)])
@pytest.mark.parametrize("add", [False, True])
def test_a_product_is_that_of_the_weights_and_the_rounded_tokens(
    n_out: int, n_in: int, n_planes: int, add: bool
) -> None:
    matrix = samples.random_matrix(n_out, n_in, n_planes, seed=3)
    codes, scales = samples.random_rounded(5, n_in, seed=4)
    y = torch.ones(5, n_out)
    oracle.linear(
        codes, scales, matrix.planes, samples.TABLE, samples.SCALE_UNIT, n_out, n_in, None, add, y,
        NO_WORKSPACE,
    )  # fmt: skip
    wanted = values(codes, scales, n_in) @ matrix.transformed().T
    torch.testing.assert_close(y, wanted + add, **NEAR)


@pytest.mark.parametrize("n_planes", PLANES)
@pytest.mark.parametrize(("n_rows", "n_in"), [(97, 64), (640, 48), (300, 192)])
def test_rows_of_an_embedding_are_those_of_the_weights(
    n_rows: int, n_in: int, n_planes: int
) -> None:
    matrix = samples.random_matrix(n_rows, n_in, n_planes, seed=5)
    ids = torch.tensor([0, n_rows - 1, 3, 3, 63, 64])
    x = torch.empty(6, n_in)
    oracle.embed(ids, matrix.planes, samples.TABLE, samples.SCALE_UNIT, matrix.d, x)
    wanted = ReferenceKernels().embed(ids, matrix, torch.float32)
    torch.testing.assert_close(x, wanted, **NEAR)


@pytest.mark.parametrize("n_planes", PLANES)
@pytest.mark.parametrize("n_inner", [64, 96, 200])
def test_a_layer_of_experts_is_the_weighted_sum_of_each_tokens_experts(
    n_planes: int, n_inner: int
) -> None:
    n_hidden, n_experts, n_tokens, n_active = 128, 5, 7, 2
    experts = samples.random_experts(n_experts, n_hidden, n_inner, n_planes, missing=(2,), seed=1)
    groups = samples.random_groups(n_tokens, n_experts, n_active, seed=2)
    codes, scales = samples.random_rounded(n_tokens, n_hidden, seed=3)
    inner_codes, inner_scales = samples.empty_rounded(n_tokens * n_active, n_inner)
    x = torch.ones(n_tokens, n_hidden)
    code = (samples.TABLE, samples.SCALE_UNIT)
    swiglu = (None, 1.0, 0.0, torch.inf)
    who = (groups.first, groups.order, groups.active)
    oracle.experts_inner(
        codes, scales, experts.table, n_planes, *code, *who, experts.d_inner, *swiglu, n_hidden,
        n_active, inner_codes, inner_scales, NO_WORKSPACE,
    )  # fmt: skip
    oracle.experts_down(
        inner_codes, inner_scales, experts.table, n_planes, *code, *who, None, groups.weights,
        n_inner, x, NO_WORKSPACE,
    )  # fmt: skip
    wanted = torch.ones(n_tokens, n_hidden)
    for token in range(n_tokens):
        for weight, expert_id in zip(groups.weights[token], groups.ids[token], strict=True):
            if expert_id == 2:
                continue
            d_inner = experts.d_inner[expert_id]
            parts = tuple(experts.bytes_of[expert_id])
            expert = experts.format.open(parts, experts.d_in, d_inner)
            assert isinstance(expert.gate_up, TrellisMatrix)
            assert isinstance(expert.down, TrellisMatrix)
            given = values(codes[token][None], scales[token][None], n_hidden)
            gate, up = expert.split(given @ expert.gate_up.transformed().T)
            inner = round_activations(F.silu(gate) * up, d_inner).values()[:, :n_inner]
            wanted[token] += weight * (inner @ expert.down.transformed().T)[0]
    # A number in the middle between two codes may be rounded either way: of 200 inner ones, few are
    # off by a step, 1 / 127 of the largest, and so is what they add up to.
    error = (x - wanted).square().sum() / wanted.square().sum()
    assert error < 1e-5


@pytest.mark.parametrize("dtype", CACHES)
@pytest.mark.parametrize("window", [0, 3, 100])
def test_attention_is_torchs_over_what_the_cache_holds(dtype: torch.dtype, window: int) -> None:
    n_heads, n_kv_heads, head_size = 6, 2, 10
    keys, values = samples.random_cache(3, n_kv_heads, 20, head_size, dtype, seed=1)
    positions, sequences = torch.tensor([19, 0, 7, 8]), torch.tensor([2, 0, 1, 1])
    qkv = torch.randn(4, (n_heads + 2 * n_kv_heads) * head_size, generator=samples.numbers(2))
    out = torch.empty(4, n_heads * head_size)
    where = (positions, sequences, n_heads)
    oracle.attend(qkv, keys, values, *where, window, head_size**-0.5, None, out, NO_WORKSPACE)
    for token, (position, sequence) in enumerate(zip(positions, sequences, strict=True)):
        first = max(0, int(position) + 1 - window) if window else 0
        k, v = (
            oracle.cached_heads(c[sequence, :, first : position + 1], head_size).float()
            for c in (keys, values)
        )
        q = qkv[token, : n_heads * head_size].view(1, n_heads, 1, head_size)
        wanted = F.scaled_dot_product_attention(q, k[None], v[None], enable_gqa=True)
        torch.testing.assert_close(out[token], wanted.flatten(), **NEAR)


@pytest.mark.parametrize("dtype", CACHES)
def test_heads_come_back_from_a_cache_as_near_as_its_format_allows(dtype: torch.dtype) -> None:
    heads = torch.randn(5, 3, 10, generator=samples.numbers(3))
    rows = oracle.stored_heads(heads, dtype)
    assert rows.shape == (5, 3, samples.cache_row(10, dtype))
    off = (oracle.cached_heads(rows, 10) - heads).abs()
    # Half a step: of 127 to the largest of a head, or of float16's 11 bits.
    largest = heads.abs().amax(2, keepdim=True)
    steps = {torch.int8: largest / 127, torch.float16: heads.abs() * 2.0**-10}
    assert (off <= steps.get(dtype, torch.zeros(())) / 2 * 1.001 + 1e-7).all()


def test_keys_and_values_go_where_the_token_is() -> None:
    n_heads, n_kv_heads, head_size = 4, 2, 8
    keys = torch.zeros(2, n_kv_heads, 6, head_size)
    cached = torch.zeros_like(keys)
    qkv = torch.randn(2, (n_heads + 2 * n_kv_heads) * head_size, generator=samples.numbers(4))
    given = qkv.clone().view(2, -1, head_size)
    frequencies = 100.0 ** (-torch.arange(0, head_size, 2) / head_size)
    where = (torch.tensor([5, 0]), torch.tensor([1, 0]))
    plain = (0, None, None, 1.0, torch.inf)
    oracle.rope_store(qkv, frequencies, 1.0, *where, n_heads, *plain, keys, cached)
    turned = qkv.view(2, -1, head_size)
    # Position 0 turns by nothing; others turn halves against each other and keep lengths.
    assert torch.equal(turned[1], given[1])
    torch.testing.assert_close(
        turned[0].square().sum(1), given[0].square().sum(1), rtol=1e-5, atol=1e-5
    )
    angle = 5 * frequencies[1]
    wanted = given[0, 0, 1] * angle.cos() - given[0, 0, 5] * angle.sin()
    torch.testing.assert_close(turned[0, 0, 1], wanted)
    assert torch.equal(keys[1, :, 5], turned[0, 4:6])
    assert torch.equal(cached[1, :, 5], given[0, 6:8])
    assert keys.count_nonzero() == 2 * n_kv_heads * head_size


@pytest.mark.parametrize("renormalize", [False, True])
def test_routing_is_the_decoders(renormalize: bool) -> None:
    x = samples.random_tokens(6, 32, seed=1)
    # Scores within some 10 of each other: in float32 the shares of others are all 0.
    router = torch.randn(9, 32, generator=samples.numbers(2)) / 20
    weights, ids = torch.empty(6, 3), torch.empty(6, 3, dtype=torch.int32)
    softmax = (None, None, False, renormalize, 1, 1, 1.0)
    oracle.route(x, router, *softmax, weights, ids, NO_WORKSPACE)
    kind = SoftmaxRouter(n_active=3, renormalize=renormalize)
    wanted_weights, wanted_ids = route_softmax(router_logits(x, router), kind)
    loud = x.abs().sum(1) > 0  # of a token of zeros all experts are alike, and torch takes any
    assert torch.equal(ids[loud], wanted_ids[loud].int())
    torch.testing.assert_close(weights[loud], wanted_weights[loud], rtol=1e-4, atol=1e-6)
    assert torch.equal(ids[2], torch.arange(3, dtype=torch.int32))


def test_groups_hold_every_assignment_once_by_expert_and_then_by_token() -> None:
    ids = torch.tensor([[3, 1], [1, 0], [3, 0]], dtype=torch.int32)
    first, order, active = samples.empty_groups(6, 5)
    oracle.group(ids, 5, first, order, active)
    assert first.tolist() == [0, 2, 4, 4, 6, 6]
    assert order.tolist() == [3, 5, 1, 2, 0, 4]
    assert active[:4].tolist() == [3, 0, 1, 3]


def test_a_norm_is_of_length_one_times_its_weights_and_rounded_as_quant_says() -> None:
    x, d = samples.random_tokens(8, 200, seed=1), samples.random_d(200)
    weight = torch.rand(200, generator=samples.numbers(2))
    normed, (codes, scales) = torch.empty_like(x), samples.empty_rounded(8, 200)
    oracle.norm_round(x, weight, 1e-5, d, normed, codes, scales)
    torch.testing.assert_close(normed, F.rms_norm(x, (200,), weight, 1e-5), **NEAR)
    rounded = round_activations(normed, d)
    assert torch.equal(codes, rounded.codes)
    assert torch.equal(scales, rounded.scales)
