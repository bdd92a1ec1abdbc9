from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
from torch import Tensor

from quant.trellis import TrellisCode
from quant.viterbi import Trellis

CODE = TrellisCode()


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


Costs: TypeAlias = "np.ndarray[Any, np.dtype[np.float64]]"  # [words]


def exact_costs(x: Tensor, scale: Tensor, code: TrellisCode, *, closed: bool = True) -> Costs:
    """The least squared error of each word: every path and, if its ends must meet, every seam.

    x, scale: [32, words].  Runs in the order of weights, where the search under test runs against
    it: the low window_bits - 2 bits of a window are the high ones of the window before.
    """
    n_states = 2 ** (code.window_bits - 2)
    cost = np.full((n_states, n_states, x.shape[1]), np.inf)  # [seam, state, words]
    cost[range(n_states), range(n_states) if closed else slice(None)] = 0
    for target, factor in zip(x.double().numpy(), scale.double().numpy(), strict=True):
        after = np.full_like(cost, np.inf)
        for window, value in enumerate(code.table):
            step = (target - factor * code.table_unit * value) ** 2
            path = cost[:, window % n_states] + step
            after[:, window // 4] = np.minimum(after[:, window // 4], path)
        cost = after
    least: Costs = (cost[range(n_states), range(n_states)] if closed else cost[0]).min(0)
    return least


def path_costs(x: Tensor, scale: Tensor, windows: Tensor, code: TrellisCode) -> Costs:
    values = torch.tensor(code.table, dtype=torch.float64)[windows] * code.table_unit
    costs: Costs = (x.double() - scale.double() * values).square().sum(0).numpy()
    return costs


def float32_slack(x: Tensor) -> Costs:
    """What the search may miss by adding in float32: 32 costs, each rounded to 2^-24 of what has
    been added up so far, itself at most about the word's sum of squares; twice, once a side."""
    slack: Costs = 64 * 2**-24 * x.double().square().sum(0).numpy()
    return slack


def any_code(window_bits: int) -> TrellisCode:
    if window_bits == 6:
        return CODE
    table = gaussian(2**window_bits, seed=window_bits).mul(20).round().clamp(-63, 63)
    return TrellisCode(window_bits=window_bits, table=tuple(int(v) for v in table))


def words_to_code(n_words: int, seed: int) -> tuple[Tensor, Tensor]:
    """Weights and their scales, [32, n_words] each; a word's scales differ from row to row."""
    rows = gaussian(32 // 4, n_words, seed=seed).mul(0.2).exp()
    scale = rows.repeat_interleave(4, dim=0)
    return gaussian(32, n_words, seed=seed + 1) * scale, scale


@pytest.mark.parametrize("window_bits", [4, 5, 6, 7])
def test_the_search_is_never_better_than_exact_and_on_average_nearly_as_good(
    window_bits: int,
) -> None:
    code = any_code(window_bits)
    x, scale = words_to_code(1000, seed=10)
    windows = Trellis.of(code).search(x, scale, tail_biting=True)
    found, exact = path_costs(x, scale, windows, code), exact_costs(x, scale, code)
    slack = float32_slack(x)
    assert (found >= exact - slack).all()
    # Two seams of 16 cost .2 % and are exact for 93 of 100 words; one costs 1 % and 80 of 100.
    assert found.mean() <= 1.005 * exact.mean()
    assert (found <= exact + slack).mean() > 0.9


@pytest.mark.parametrize("window_bits", [4, 5, 6, 7, 10])
def test_windows_overlap_all_around_the_word(window_bits: int) -> None:
    x, scale = words_to_code(500, seed=20)
    windows = Trellis.of(any_code(window_bits)).search(x, scale, tail_biting=True)
    assert windows.shape == x.shape
    shared = windows & (2 ** (window_bits - 2) - 1)  # with the window before
    assert torch.equal(windows.roll(1, dims=0) >> 2, shared)


@pytest.mark.parametrize("window_bits", [4, 5, 6, 7])
def test_a_search_whose_ends_need_not_meet_is_exact(window_bits: int) -> None:
    code = any_code(window_bits)
    x, scale = words_to_code(500, seed=30)
    windows = Trellis.of(code).search(x, scale, tail_biting=False)
    found, exact = path_costs(x, scale, windows, code), exact_costs(x, scale, code, closed=False)
    assert (abs(found - exact) <= float32_slack(x)).all()
    assert torch.equal(windows[:-1] >> 2, windows[1:] & (2 ** (window_bits - 2) - 1))
