"""Attention of a prompt over a cache, against the plainest way to say it."""

import pytest
import torch
from torch import Tensor

from lowmoe.decoder import prompt_attention
from lowmoe.decoder.prompt_attention import attend_prompt


def plainly(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float, sinks: Tensor | None
) -> Tensor:
    """In float64, a row of scores for every query.  Shapes as attend_prompt's."""
    n_tokens, n_heads = q.shape[:2]
    k, v = (c.double().repeat_interleave(n_heads // c.shape[0], dim=0) for c in (k, v))
    scores = torch.einsum("tad,asd->ats", q.double(), k) * scale
    asks = torch.arange(k.shape[1] - n_tokens, k.shape[1])[:, None]
    asked = torch.arange(k.shape[1])[None]
    seen = (asked <= asks) & (asked > asks - (window or k.shape[1] + 1))
    scores = scores.masked_fill(~seen, -torch.inf)
    nothing = torch.full((n_heads,), -torch.inf) if sinks is None else sinks
    nothing = nothing.double()[:, None, None].expand(-1, n_tokens, 1)
    chances = torch.cat([scores, nothing], dim=2).softmax(2)[..., :-1]
    return torch.einsum("ats,asd->tad", chances, v)


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("window", [None, 9, 64])
@pytest.mark.parametrize("n_cached", [0, 13, 100])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_it_is_the_softmax_over_what_is_seen(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    n_cached: int,
    window: int | None,
    with_sinks: bool,
) -> None:
    monkeypatch.setattr(prompt_attention, "BLOCK_ROWS", 48)
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(40, 6, 24, generator=generator).to(dtype)
    k, v = torch.randn(2, 2, n_cached + 40, 24, generator=generator).to(dtype)
    sinks = torch.linspace(-4, 5, 6) if with_sinks else None
    scale = 0.3
    found = attend_prompt(q, k, v, window=window, scale=scale, sinks=sinks)
    assert found.shape == q.shape
    assert found.dtype == dtype
    wanted = plainly(q, k, v, window, scale, sinks)
    # Sums of at most 24 products of each score, up to about 10 of them scaled, are rounded to
    # float32 at least; outputs to the dtype, and where that is half, chances too.
    unit = 2.0**-11 if dtype == torch.float16 else 2.0**-24
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=24 * unit)
