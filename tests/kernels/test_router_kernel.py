"""The native router beside the decoder's."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowmoe.decoder.router import route_softmax
from lowmoe.kernels.cpu import _native
from lowmoe.spec import SoftmaxRouter


def routed(logits: Tensor, n_active: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    weights = torch.empty(logits.shape[0], n_active)
    ids = torch.empty(logits.shape[0], n_active, dtype=torch.int64)
    _native.route_softmax(logits, renormalize, weights, ids)
    return weights, ids


@settings(deadline=None, max_examples=100)
@given(
    n_experts=st.integers(1, 300),
    data=st.data(),
    renormalize=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_experts_and_weights_are_the_decoders(
    n_experts: int, data: st.DataObject, renormalize: bool, seed: int
) -> None:
    n_active = data.draw(st.integers(1, min(n_experts, 12)))
    generator = torch.Generator().manual_seed(seed)
    # All different, by more than float32 could lose: among equals torch promises no order.
    steps = torch.stack([torch.randperm(n_experts, generator=generator) for _ in range(3)])
    logits = steps * 0.05 - 4
    wanted, wanted_ids = route_softmax(
        logits, SoftmaxRouter(n_active=n_active, renormalize=renormalize)
    )
    weights, ids = routed(logits, n_active, renormalize)
    assert torch.equal(ids, wanted_ids)
    # n roundings in the sum of n powers, and a few of each power, on either side.
    torch.testing.assert_close(weights, wanted, rtol=2 * (n_experts + 8) * 2**-24, atol=0)


def test_among_equals_the_lower_id_comes_first() -> None:
    weights, ids = routed(torch.tensor([[1.0, 3.0, 2.0, 3.0, 2.0, 2.0]]), 4, True)
    assert ids.tolist() == [[1, 3, 2, 4]]
    assert weights[0, 0] == weights[0, 1]


def test_large_logits_do_not_overflow() -> None:
    weights, ids = routed(torch.tensor([[1e30, -1e30, 1e30, 0.0]]), 3, False)
    assert ids.tolist() == [[0, 2, 3]]
    assert weights.tolist() == [[0.5, 0.5, 0.0]]


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("place", range(6))
def test_nan_makes_all_weights_nan_and_ids_stay_different_experts(
    renormalize: bool, place: int
) -> None:
    logits = torch.arange(6.0)[None]
    logits[0, place] = float("nan")
    weights, ids = routed(logits, 3, renormalize)
    assert weights.isnan().all()
    assert len(set(ids[0].tolist())) == 3
    assert set(ids[0].tolist()) <= set(range(6))


def test_more_experts_than_there_are_cannot_be_asked_for() -> None:
    with pytest.raises(ValueError, match="n_active"):
        routed(torch.ones(1, 2), 3, True)
