"""Experts run for tokens that somebody else routed and rounded, against native code's own way."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from trellis_models import TrellisModel, trellis_model
from trellis_shapes import DEMANDING_SHAPES, SHAPES

from lowmoe.decoder.cpu_share import CpuShare, HostTokens
from lowmoe.decoder.moe import Routing
from lowmoe.decoder.native import NativeComputation
from lowmoe.experts.store import ExpertStore
from lowmoe.kernels import cpu
from quant.activations import round_activations

LAYER = 1


@pytest.fixture(
    scope="module",
    params=[
        "4 heads of 16 over 2",
        "top 4 of 8",
        "5 heads of 10, odd sizes",
        "sinks, biases everywhere, another activation, odd sizes",
        "all heads normed together, a quarter turns",
    ],
)
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TrellisModel]:
    with trellis_model(
        tmp_path_factory.mktemp("model") / "folder", (SHAPES | DEMANDING_SHAPES)[request.param]
    ) as model:
        # With signs for tokens, every norm is then exact.
        yield replace(model, spec=replace(model.spec, norm_epsilon=0.0))


def signs(model: TrellisModel, n_tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(n_tokens)
    return torch.randint(0, 2, (n_tokens, model.spec.n_hidden), generator=generator) * 2.0 - 1


def rounded_elsewhere(model: TrellisModel, x: Tensor, routing: Routing) -> HostTokens:
    of = model.weights.layers[LAYER]
    rounded = round_activations(x * of.experts_norm, of.transforms.d_in)
    return HostTokens(
        x=x,
        weights=routing.weights,
        experts=routing.expert_ids.int(),
        codes=rounded.codes,
        scales=rounded.scales,
        share=torch.full_like(x, torch.nan),
    )


def share_of(model: TrellisModel, max_tokens: int = 32) -> CpuShare:
    return CpuShare(
        model.spec,
        model.weights,
        model.recipe.code,
        cpu.Pool(1, []),
        isa=cpu.isas()[0],
        max_tokens=max_tokens,
    )


def run(share: CpuShare, tokens: HostTokens, store: ExpertStore, expert_ids: list[int]) -> Tensor:
    """What these experts, one after the other, come to."""
    share.begin(LAYER, tokens)
    for expert_id in expert_ids:
        with store.borrow(LAYER, [expert_id]) as experts:
            share.run(LAYER, experts)
    share.finish(LAYER, tokens)
    return tokens.share.clone()


@pytest.mark.parametrize("n_tokens", [1, 3, 8, 20])
def test_tokens_rounded_elsewhere_come_to_the_same_bits(model: TrellisModel, n_tokens: int) -> None:
    native: NativeComputation = model.native()
    with model.decoder(native) as decoder:
        x = signs(model, n_tokens)
        routing = native.route(x, LAYER)
        decoder.store.want(LAYER, routing.wanted())
        tokens = rounded_elsewhere(model, x, routing)
        wanted = native.mix(x.clone(), routing, LAYER, decoder.store)
        found = run(share_of(model), tokens, decoder.store, routing.wanted()[::-1])
        assert torch.equal(x + found, wanted)


def test_experts_that_do_not_run_add_nothing(model: TrellisModel) -> None:
    native: NativeComputation = model.native()
    with model.decoder(native) as decoder:
        x = signs(model, 8)
        routing = native.route(x, LAYER)
        tokens, share = rounded_elsewhere(model, x, routing), share_of(model)
        wanted = routing.wanted()
        assert len(wanted) > 2
        parts = [run(share, tokens, decoder.store, some) for some in (wanted[:1], wanted[1:])]
        whole = run(share, tokens, decoder.store, wanted)
        assert not run(share, tokens, decoder.store, []).any()
    served = (routing.expert_ids == wanted[0]).any(1)
    assert 0 < served.sum() < 8
    assert not parts[0][~served].any()
    assert parts[0][served].abs().amax(1).min() > 0
    # Two sums of up to four products instead of one: a rounding more.
    torch.testing.assert_close(parts[0] + parts[1], whole, rtol=1e-5, atol=1e-6)


def test_more_tokens_than_there_is_scratch_for_are_refused(model: TrellisModel) -> None:
    x = signs(model, 5)
    native: NativeComputation = model.native()
    tokens = rounded_elsewhere(model, x, native.route(x, LAYER))
    with pytest.raises(ValueError, match="more than the engine was made for"):
        share_of(model, max_tokens=4).begin(LAYER, tokens)


def test_what_is_foreseen_is_what_native_code_routes(model: TrellisModel) -> None:
    x = signs(model, 8)
    found, wanted = share_of(model).foresee(LAYER, x), model.native().route(x, LAYER)
    assert torch.equal(found.expert_ids, wanted.expert_ids)
    assert torch.equal(found.weights, wanted.weights)


def test_no_more_of_a_folders_weights_is_kept_than_norms_and_routers(
    tmp_path: Path,
) -> None:
    with trellis_model(tmp_path / "folder", SHAPES["4 heads of 16 over 2"]) as model:
        share = share_of(model)
        kept = [t for of in share._kept for t in (of.transforms.d_in, of.transforms.d_inner)]
        kept += [of.vector(name) for of in share._kept for name in of.parts]
        assert all(set(of.parts) == {"experts_norm", "router"} for of in share._kept)
        assert all(t.untyped_storage().nbytes() == t.nbytes for t in kept)
