import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from quant.damage import kl_divergence, relative_squared_error, top1_agreement


def two_models(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    reference = 5 * torch.randn(20, 100, generator=generator)
    noise = torch.randn(20, 100, generator=generator)
    return (reference + noise).to(dtype), reference.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_divergence_is_that_of_torch_token_by_token(dtype: torch.dtype) -> None:
    logits, reference = two_models(dtype)
    wanted = functional.kl_div(
        logits.double().log_softmax(-1),
        reference.double().log_softmax(-1),
        reduction="none",
        log_target=True,
    ).sum(-1)
    found = kl_divergence(logits, reference)
    assert found.shape == (20,)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)  # float64, another order
    assert (found > 0).all()
    assert not torch.allclose(found, kl_divergence(reference, logits))  # it has a direction


def test_equal_models_do_not_diverge_whatever_is_added_to_their_logits() -> None:
    _, reference = two_models()
    assert (kl_divergence(reference, reference) == 0).all()
    # 8 is exact beside 20-odd in float64: nothing but the logarithm of the sum rounds.
    shifted = kl_divergence(reference.double() + 8, reference)
    torch.testing.assert_close(shifted, torch.zeros(20).double(), rtol=0, atol=1e-13)


def test_a_certain_model_read_as_a_fair_coin_loses_log_2() -> None:
    certain, coin = torch.tensor([[100.0, 0.0]]), torch.zeros(1, 2)
    assert kl_divergence(coin, certain).item() == pytest.approx(math.log(2), rel=1e-12)


def test_squared_error_is_relative_to_the_original() -> None:
    original = torch.tensor([[3.0, 4.0]])
    assert relative_squared_error(original, original) == 0
    assert relative_squared_error(torch.zeros(1, 2), original) == 1
    assert relative_squared_error(torch.tensor([[3.0, 3.0]]), original) == pytest.approx(1 / 25)
    assert relative_squared_error(original.bfloat16(), original.half()) == 0


def test_agreement_asks_only_for_the_likeliest_token() -> None:
    reference = torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0], [0.0, 5.0, 1.0]])
    logits = torch.tensor([[9.0, 8.0, 10.0], [1.0, 2.0, 1.5], [-3.0, 0.0, -1.0]])
    assert top1_agreement(logits, reference).tolist() == [True, False, True]
