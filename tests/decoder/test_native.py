"""Native passes against torch's, over the same planes."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from native_goldens import (
    CHUNKS,
    MEAN_LIMIT,
    N_TOKENS,
    Golden,
    assert_within,
    errors,
    expected_error,
    golden_of,
)
from tiny_models import in_chunks, with_attention, with_router
from torch import Tensor
from trellis_models import Guided, layer_by_layer, trellis_model
from trellis_shapes import DEMANDING_SHAPES, LAYERS, MIXTRAL, SHAPES, Shape

from lowmoe.checkpoint.layout import Recipe
from lowmoe.decoder.abilities import needs
from lowmoe.decoder.native import ABLE
from lowmoe.families import read_config
from lowmoe.kernels import cpu
from lowmoe.spec import ModelSpec, Rope
from quant.trellis import WINDOW_6_TABLE, TrellisCode

# --- against torch


@pytest.mark.parametrize("kv", cpu.KV_FORMATS)
@pytest.mark.parametrize("chunks", CHUNKS)
def test_logits_are_torchs_but_for_the_rounding_of_activations(
    golden: Golden, chunks: str, kv: cpu.KvFormat
) -> None:
    guided = Guided(golden.model.native(kv=kv), golden.answer.routings)
    with golden.model.decoder(guided) as decoder:
        found = in_chunks(decoder, golden.ids, CHUNKS[chunks])
    assert_within(found, golden.answer.logits, expected_error(LAYERS, kv, CHUNKS[chunks]))
    # A score is off by some 2 % of its deviation, and few gaps between two scores are as narrow.
    agreed = sum(guided.agreed) / len(guided.agreed)
    assert agreed > 0.9


def test_all_at_once_and_one_by_one_differ_by_no_more_than_both_from_torch(golden: Golden) -> None:
    found = []
    for sizes in (CHUNKS["at once"], CHUNKS["one by one"]):
        guided = Guided(golden.model.native(), golden.answer.routings)
        with golden.model.decoder(guided) as decoder:
            found.append(in_chunks(decoder, golden.ids, sizes))
    expected = sum(expected_error(LAYERS, "float16", CHUNKS[c]) for c in ("at once", "one by one"))
    assert_within(*found, expected)


def test_the_experts_and_their_weights_are_torchs(golden: Golden) -> None:
    # Routers see float32: what is left are the roundings of sums of at most 256 products.
    model = golden.model
    x = torch.randn(40, model.spec.n_hidden, generator=torch.Generator().manual_seed(2))
    native, in_torch = model.native(), model.in_torch()
    for layer_id in range(LAYERS):
        residual = model.spec.layers[layer_id].attention_residual
        scale = model.spec.residual_scale if residual is None else residual.added
        native_x = x / scale  # see norm_epsilons
        found, wanted = native.route(native_x, layer_id), in_torch.route(x, layer_id)
        assert found.expert_ids.dtype == torch.int64
        assert torch.equal(found.expert_ids, wanted.expert_ids)
        torch.testing.assert_close(found.weights, wanted.weights, rtol=1e-4, atol=1e-6)


def test_what_is_foreseen_is_what_is_routed(golden: Golden) -> None:
    native = golden.model.native()
    x = torch.randn(5, golden.model.spec.n_hidden, generator=torch.Generator().manual_seed(2))
    for layer_id in range(LAYERS):
        foreseen, routed = native.foresee(x, layer_id), native.route(x, layer_id)
        assert torch.equal(foreseen.expert_ids, routed.expert_ids)
        assert torch.equal(foreseen.weights, routed.weights)


def test_rows_of_the_embedding_are_torchs(golden: Golden) -> None:
    ids = torch.arange(golden.model.spec.n_vocab)
    found, wanted = (
        computation.embed(ids, torch.arange(ids.shape[0]))
        for computation in (golden.model.native(), golden.model.in_torch())
    )
    found *= golden.model.spec.residual_scale  # see NativeComputation
    # Nothing is rounded to int8: sums of three planes, then of 128 signs, in float32.
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


def _seen(spec: ModelSpec) -> int:
    window = spec.layers[0].attention.window
    return N_TOKENS if window is None else window


BREAKS: dict[str, Callable[[ModelSpec], ModelSpec]] = {
    "router not renormalized": lambda spec: with_router(spec, renormalize=False),
    "rope with another theta": lambda spec: with_attention(spec, rope=Rope(theta=100.0)),
    "a token less in sight": lambda spec: with_attention(spec, window=_seen(spec) - 1),
    "norm with another epsilon": lambda spec: replace(spec, norm_epsilon=1e-2),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_slightly_different_model_is_told_apart(
    tmp_path_factory: pytest.TempPathFactory, name: str
) -> None:
    folder = tmp_path_factory.mktemp("model") / "folder"
    with trellis_model(folder, SHAPES["window of 7"]) as model:
        golden = golden_of(model)
        broken = model.native(spec=BREAKS[name](model.spec))
        with model.decoder(Guided(broken, golden.answer.routings)) as decoder:
            found = in_chunks(decoder, golden.ids, [1])
    limit = MEAN_LIMIT * expected_error(LAYERS, "float16", [1])
    assert errors(found, golden.answer.logits).mean() > 2 * limit


def test_every_vector_of_a_layer_counts(golden: Golden) -> None:
    # Routings are torch's, so that what only they depend on is not to be seen here.
    unseen = {"router", "router_bias", "choice_bias"}
    found: dict[str, Tensor] = {}
    for layer in golden.model.weights.layers:
        parts = layer.parts.items()
        found |= {n: p for n, p in parts if isinstance(p, Tensor) and n not in unseen}
    limit = MEAN_LIMIT * expected_error(LAYERS, "float16", [1])
    for name, vector in found.items():
        kept = vector.clone()
        vector.neg_()
        guided = Guided(golden.model.native(), golden.answer.routings)
        with golden.model.decoder(guided) as decoder:
            logits = in_chunks(decoder, golden.ids, [1])
        vector.copy_(kept)
        assert errors(logits, golden.answer.logits).mean() > 2 * limit, name


def test_the_shapes_demand_all_that_native_code_says_it_is_able_to_do() -> None:
    demanded = set()
    for shape in DEMANDING_SHAPES.values():
        demanded |= set(needs(read_config(MIXTRAL | shape.config).spec))
    assert demanded == ABLE


def test_layers_may_differ_in_what_they_see_and_how_they_turn(tmp_path: Path) -> None:
    with trellis_model(tmp_path / "folder", Shape(config={"num_hidden_layers": 4})) as model:
        spec = layer_by_layer(model.spec, 1, window=5, rope=Rope(theta=100.0))
        spec = layer_by_layer(spec, 2, window=9)
        golden = golden_of(replace(model, spec=spec))
        for chunks in CHUNKS.values():
            guided = Guided(golden.model.native(), golden.answer.routings)
            with golden.model.decoder(guided) as decoder:
                found = in_chunks(decoder, golden.ids, chunks)
            assert_within(found, golden.answer.logits, expected_error(4, "float16", chunks))


# --- long texts


@pytest.mark.parametrize("kv", cpu.KV_FORMATS)
@pytest.mark.parametrize("window", [None, 300, 900])
def test_texts_of_many_pages_are_attended_to_in_parts(
    tmp_path: Path, window: int | None, kv: cpu.KvFormat
) -> None:
    # A page has 256 tokens. A single token's positions are shared out in parts of 1024: up to three
    # here, and where a window begins after the first or in the midst of one, fewer.
    assert cpu.PAGE_TOKENS == 256
    sizes = [250, 256, 1, 1, 7, 256, 256, 1, 1, 1, 256, 256, 1, 200, 250, 1, 1, 250, 53, *[1] * 6]
    shape = Shape(config={"num_hidden_layers": 2, "sliding_window": window})
    with trellis_model(tmp_path / "folder", shape) as model:
        golden = golden_of(model, sum(sizes))
        guided = Guided(model.native(kv=kv), golden.answer.routings)
        with model.decoder(guided) as decoder:
            found = in_chunks(decoder, golden.ids, sizes)
    expected = expected_error(2, kv, sizes)
    assert_within(found[:1000], golden.answer.logits[:1000], expected)
    assert_within(found[1000:2000], golden.answer.logits[1000:2000], expected)
    assert_within(found[2000:], golden.answer.logits[2000:], expected)


def test_texts_of_many_pages_of_latents_are_attended_to_in_parts(tmp_path: Path) -> None:
    sizes = [250] * 9 + [1, 1, 3]
    latents = DEMANDING_SHAPES["latents, sigmoids in groups, shared, lengthening rope"]
    shape = replace(latents, config={**latents.config, "num_hidden_layers": 2})
    with trellis_model(tmp_path / "folder", shape) as model:
        golden = golden_of(model, sum(sizes))
        guided = Guided(model.native(n_threads=2), golden.answer.routings)
        with model.decoder(guided) as decoder:
            found = in_chunks(decoder, golden.ids, sizes)
    expected = expected_error(2, "float16", sizes)
    assert_within(found[:1000], golden.answer.logits[:1000], expected)
    assert_within(found[1000:], golden.answer.logits[1000:], expected)


# --- codes


@pytest.mark.parametrize("window_bits", [4, 5])
def test_codes_of_narrower_windows_are_read(tmp_path: Path, window_bits: int) -> None:
    code = TrellisCode(window_bits=window_bits, table=WINDOW_6_TABLE[: 2**window_bits])
    shape = Shape(config={}, recipe=Recipe(code=code, expert_planes=3))
    with trellis_model(tmp_path / "folder", shape) as model:
        golden = golden_of(model)
        for sizes in CHUNKS.values():
            guided = Guided(model.native(), golden.answer.routings)
            with model.decoder(guided) as decoder:
                found = in_chunks(decoder, golden.ids, sizes)
            assert_within(found, golden.answer.logits, expected_error(LAYERS, "float16", sizes))
