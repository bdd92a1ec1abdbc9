"""Passes on a GPU against torch's, over the same planes, on a stand-in for a GPU.

What is rounded is what native code rounds, and tolerances are those of native_goldens.py, but that
no planes are added up in int8. Tokens go to the experts that torch sent them to.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

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
    some_ids,
)
from test_native import BREAKS
from test_native_faults import POISONED
from tiny_models import in_chunks
from torch import Tensor
from trellis_models import TrellisModel, layer_by_layer, trellis_model
from trellis_shapes import CONTEXT, GPU_SHAPES, LAYERS, SHAPES, Shape

from cuda_ext.card import find_card, look, why_none
from cuda_ext.ops import MOST_DECODED
from lowmoe.checkpoint.layout import Recipe
from lowmoe.decoder import gpu_buffers, prompt_attention
from lowmoe.decoder.decoder import Decoder
from lowmoe.decoder.moe import Routing
from lowmoe.decoder.on_gpu import GpuCache, GpuComputation
from lowmoe.experts.resident import ResidentExperts
from lowmoe.experts.source import FolderExperts
from lowmoe.kernels import cpu
from lowmoe.kernels.cuda import CudaGpu, open_card
from lowmoe.kernels.gpu import Gpu
from lowmoe.spec import Rope
from quant.trellis import WINDOW_6_TABLE, TrellisCode
from tests.cuda_emulator.emulated import EmulatedLaunch
from tests.cuda_ext import oracle
from tests.stand_in_gpu import Operation, StandInGpu, with_kernels

ALL_SHAPES = SHAPES | GPU_SHAPES
# Heads that kernels are built for; 1, 2 and 3 planes.
EMULATED = [
    "4 heads of 16 over 2",
    "3 heads of 64 of their own, hidden 192, inner 200",
    "2 heads of 128 over 1",
    "window of 7",
    "top 3 of 9, not renormalized",
]


class GuidedRoute:
    """The operation `norm_route`, but tokens go where they went before; see Guided.

    It is called for one layer after the other of a text's tokens in order, from `begin` on.
    """

    def __init__(self, route: Operation, group: Operation, routings: list[Routing]) -> None:
        # A layer without experts routes nothing.
        self._routings = [r for r in routings if r.expert_ids.shape[1]]
        self._route, self._group = route, group
        self.begin()

    def begin(self) -> None:
        self._first = self._layer_id = 0

    def __call__(self, x: Tensor, *others: Any) -> None:
        self._route(x, *others)
        router, weights, ids, *groups = others[3], *others[14:19]
        at = self._routings[self._layer_id]
        these = slice(self._first, self._first + x.shape[0])
        wanted = at.expert_ids[these].int().to(ids.device)
        same = (ids == wanted).all(1)[:, None]
        weights.copy_(torch.where(same, weights, at.weights[these].to(ids.device)))
        ids.copy_(wanted)
        self._group(ids, router.shape[0], *groups)
        self._layer_id = (self._layer_id + 1) % len(self._routings)
        self._first += x.shape[0] if self._layer_id == 0 else 0


class GuidedComputation:
    """A computation whose texts begin where their caches do."""

    def __init__(self, computation: GpuComputation, route: GuidedRoute) -> None:
        self._computation, self._route = computation, route

    def __getattr__(self, name: str) -> Any:
        return getattr(self._computation, name)

    def new_cache(self, capacity: int) -> GpuCache:
        self._route.begin()
        cache = self._computation.new_cache(capacity)  # which captures, and so runs, a step
        self._route.begin()
        return cache


class Uncaptured:
    """A card that does captured work by doing it, and where `route` is given, routes with that."""

    def __init__(self, gpu: CudaGpu, route: GuidedRoute | None = None) -> None:
        self._gpu = gpu
        by_name = {name: getattr(gpu.operations, name) for name in oracle.OPERATIONS}
        guide = {} if route is None else {"norm_route": route}
        self.operations = SimpleNamespace(**by_name | guide)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._gpu, name)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        return work


def resident(model: TrellisModel, gpu: Gpu) -> ResidentExperts:
    format = model.recipe.expert_format(model.spec)
    source = FolderExperts(model.folder, model.recipe.part_names, format.part_bytes)
    n_experts = [layer.feed_forward.n_experts for layer in model.spec.layers]
    return ResidentExperts(source, format.part_bytes, n_experts, gpu, lambda done, total: None)


def on_gpu(
    model: TrellisModel,
    gpu: Gpu,
    *,
    kv: cpu.KvFormat = "float16",
    max_tokens: int = 256,
) -> Decoder[ResidentExperts]:
    experts = resident(model, gpu)
    computation = GpuComputation(
        model.spec,
        model.weights.at(gpu.place),
        model.recipe.code,
        experts,
        gpu,
        kv=kv,
        max_tokens=max_tokens,
        n_context=CONTEXT,
    )
    return Decoder(spec=model.spec, store=experts, computation=computation)


def guided(
    golden: Golden,
    operations: Mapping[str, Operation] = oracle.OPERATIONS,
    *,
    on: CudaGpu | None = None,
    **how: Any,
) -> Decoder[Any]:
    """On a stand-in with these operations, or on a card with its own."""
    own = operations if on is None else vars(Uncaptured(on).operations)
    route = GuidedRoute(own["norm_route"], own["group"], golden.answer.routings)
    guide = {**operations, "norm_route": route}
    gpu: Any = StandInGpu(guide) if on is None else Uncaptured(on, route)
    decoder = on_gpu(golden.model, gpu, **how)
    computation = GuidedComputation(decoder.computation, route)  # type: ignore[arg-type]
    return Decoder(spec=decoder.spec, store=decoder.store, computation=computation)


@pytest.fixture(scope="module", params=ALL_SHAPES)
def golden(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Golden]:
    with trellis_model(
        tmp_path_factory.mktemp("model") / "folder", ALL_SHAPES[request.param]
    ) as model:
        yield golden_of(model)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Golden]:
    """One shape, where what is tested has nothing to do with shapes."""
    shape = SHAPES["4 heads of 16 over 2"]
    with trellis_model(tmp_path_factory.mktemp("model") / "folder", shape) as model:
        yield golden_of(model)


def expected(kv: cpu.KvFormat, n_layers: int = LAYERS) -> float:
    """Of the oracle and of kernels for few tokens: planes are added up exactly."""
    return expected_error(n_layers, kv, [1])


# --- the order and the arguments of operations, each done by its oracle


@pytest.mark.parametrize("chunks", ["at once", "in all sizes"])
def test_logits_are_torchs_but_for_the_rounding_of_activations(golden: Golden, chunks: str) -> None:
    found = in_chunks(guided(golden), golden.ids, CHUNKS[chunks])
    assert_within(found, golden.answer.logits, expected("float16"))


@pytest.mark.parametrize("kv", cpu.KV_FORMATS)
@pytest.mark.parametrize("chunks", [*CHUNKS, "eight by eight"])
def test_so_they_are_however_a_text_is_cut_and_whatever_cache_it_is_kept_in(
    plain: Golden, chunks: str, kv: cpu.KvFormat
) -> None:
    sizes = CHUNKS.get(chunks, [MOST_DECODED, MOST_DECODED, MOST_DECODED + 1, MOST_DECODED - 1])
    found = in_chunks(guided(plain, kv=kv), plain.ids, sizes)
    assert_within(found, plain.answer.logits, expected(kv))


def test_dense_weights_are_one_piece_of_its_memory_as_they_are_of_the_hosts(tmp_path: Path) -> None:
    """Matrix by matrix, torch would take hundreds of MB more than they have."""
    with trellis_model(tmp_path / "folder", SHAPES["4 heads of 16 over 2"]) as model:
        here = model.weights._tensors()
        (piece,) = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in here}.values()
        # A device of no memory: each tensor that is moved alone would have a storage of its own.
        there = model.weights.at(torch.device("meta"))._tensors()
        (storage,) = {t.untyped_storage()._cdata: t.untyped_storage() for t in there}.values()
        assert storage.nbytes() == piece.nbytes()
        assert model.weights.n_bytes <= storage.nbytes()
        copies = model.weights.at(torch.device("cpu"))._tensors()
        for tensor, moved, copied in zip(here, there, copies, strict=True):
            found = (moved.shape, moved.dtype, moved.storage_offset(), moved.is_contiguous())
            assert found == (tensor.shape, tensor.dtype, tensor.storage_offset(), True)
            assert torch.equal(tensor, copied)


def test_layers_may_differ_in_what_they_see_and_how_they_turn(tmp_path: Path) -> None:
    with trellis_model(tmp_path / "folder", Shape(config={"num_hidden_layers": 4})) as model:
        spec = layer_by_layer(model.spec, 1, window=5, rope=Rope(theta=100.0))
        spec = layer_by_layer(spec, 2, window=9)
        golden = golden_of(replace(model, spec=spec))
        for chunks in CHUNKS.values():
            found = in_chunks(guided(golden), golden.ids, chunks)
            assert_within(found, golden.answer.logits, expected("float16", 4))


@pytest.mark.parametrize("name", BREAKS)
def test_a_slightly_different_model_is_told_apart(tmp_path: Path, name: str) -> None:
    with trellis_model(tmp_path / "folder", SHAPES["window of 7"]) as model:
        golden = golden_of(model)
        broken = replace(golden, model=replace(model, spec=BREAKS[name](model.spec)))
        found = in_chunks(guided(broken), golden.ids, [20, 1, 1, 38])
    limit = MEAN_LIMIT * expected("float16")
    assert errors(found, golden.answer.logits).mean() > 2 * limit


@pytest.mark.parametrize("window_bits", [4, 5])
def test_codes_of_narrower_windows_are_read(tmp_path: Path, window_bits: int) -> None:
    code = TrellisCode(window_bits=window_bits, table=WINDOW_6_TABLE[: 2**window_bits])
    shape = Shape(config={}, recipe=Recipe(code=code, expert_planes=3))
    with trellis_model(tmp_path / "folder", shape) as model:
        golden = golden_of(model, 20)
        found = in_chunks(guided(golden), golden.ids, [18, 1])
        assert_within(found, golden.answer.logits, expected("float16"))


@pytest.mark.parametrize("window", [None, 90])
def test_long_texts_are_attended_to_in_blocks(
    tmp_path: Path, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_attention, "BLOCK_ROWS", 64)
    sizes = [100, 150, 1, 1, 7, 120, 21]
    shape = Shape(config={"num_hidden_layers": 2, "sliding_window": window})
    with trellis_model(tmp_path / "folder", shape) as model:
        golden = golden_of(model, sum(sizes))
        for kv in cpu.KV_FORMATS:
            found = in_chunks(guided(golden, kv=kv), golden.ids, sizes)
            assert_within(found, golden.answer.logits, expected(kv, 2))


def test_scores_of_many_tokens_come_piece_by_piece(
    plain: Golden, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = in_chunks(on_gpu(plain.model, StandInGpu()), plain.ids, [N_TOKENS])
    monkeypatch.setattr(gpu_buffers, "SCORES_TOKENS", 16)
    pieces = in_chunks(on_gpu(plain.model, StandInGpu()), plain.ids, [N_TOKENS])
    # The same products, but of matrices of another height: sums may come in another order.
    torch.testing.assert_close(pieces, whole, rtol=1e-5, atol=1e-5)


# --- what is captured


def test_a_step_is_the_same_work_whatever_the_token_and_its_position(plain: Golden) -> None:
    replaying, running = StandInGpu(), StandInGpu()
    running.capture = lambda work: work  # type: ignore[method-assign]
    found, wanted = (
        in_chunks(on_gpu(plain.model, g), plain.ids, [1]) for g in (replaying, running)
    )
    assert torch.equal(found, wanted)
    assert (replaying.n_captured, replaying.n_replayed) == (1, N_TOKENS)


def test_two_conversations_take_turns_and_do_not_hear_each_other(plain: Golden) -> None:
    decoder = on_gpu(plain.model, StandInGpu())
    sizes = [10, 1, 9, 1, 1, 18]
    texts = (plain.ids, plain.ids.flip(0))
    alone = [in_chunks(decoder, ids[:40], sizes) for ids in texts]
    caches = [decoder.new_cache(N_TOKENS) for _ in texts]
    found: list[list[Tensor]] = [[], []]
    for size in sizes:
        for which, ids in enumerate(texts):
            first = caches[which].n_tokens
            hidden = decoder.forward(ids[first : first + size], caches[which])
            found[which].append(decoder.logits(hidden))
    for which in (0, 1):
        assert torch.equal(torch.cat(found[which]), alone[which])


def test_forgetting_the_latest_tokens_leaves_no_trace_of_them(plain: Golden) -> None:
    ids = plain.ids
    decoder = on_gpu(plain.model, StandInGpu())
    wanted = in_chunks(decoder, ids, [10, 49, 1])[10:]
    cache = decoder.new_cache(N_TOKENS)
    decoder.forward(ids[:10], cache)
    decoder.forward(ids[40:], cache)
    assert cache.keep(10) == 10
    found = [decoder.logits(decoder.forward(part, cache)) for part in (ids[10:59], ids[59:])]
    assert torch.equal(torch.cat(found), wanted)


def test_hidden_states_outlive_the_next_pass(plain: Golden) -> None:
    decoder = on_gpu(plain.model, StandInGpu())
    cache = decoder.new_cache(N_TOKENS)
    hidden = [decoder.forward(ids, cache) for ids in plain.ids[:9].split([3, 1, 5])]
    late = torch.cat([decoder.logits(h) for h in hidden])
    assert torch.equal(late, in_chunks(decoder, plain.ids[:9], [3, 1, 5]))


def test_a_cache_that_is_full_is_not_written_beyond(plain: Golden) -> None:
    decoder = on_gpu(plain.model, StandInGpu())
    cache = decoder.new_cache(10)
    decoder.forward(plain.ids[:10], cache)
    for more in (1, 2, 20):
        with pytest.raises(AssertionError):
            decoder.forward(plain.ids[:more], cache)
    assert cache.n_tokens == 10


# --- the kernels, emulated


@pytest.mark.parametrize("name", [*EMULATED, *GPU_SHAPES])
def test_kernels_for_few_tokens_differ_from_their_oracle_by_the_order_of_sums(
    tmp_path: Path, name: str
) -> None:
    with trellis_model(tmp_path / "folder", ALL_SHAPES[name]) as model:
        golden = golden_of(model, 30)
        sizes = [3, 1, MOST_DECODED, 1, 1, 6]
        wanted = in_chunks(guided(golden), golden.ids, sizes)
        found = in_chunks(guided(golden, with_kernels(EmulatedLaunch())), golden.ids, sizes)
    error = errors(found, wanted)
    # Now and then that moves an activation across the middle between two steps of int8, and all
    # that follows from it may be rounded otherwise.
    assert error.min() < 1e-9, "no token at all for which nothing was rounded otherwise"
    assert error.mean() < expected("float16") / 2


@pytest.mark.parametrize(
    ("name", "kv"),
    [
        *((name, kv) for name in EMULATED for kv in cpu.KV_FORMATS),
        *((name, "float16") for name in GPU_SHAPES),
    ],
)
def test_kernels_for_prompts_are_torchs_but_for_rounding(
    tmp_path: Path, name: str, kv: cpu.KvFormat
) -> None:
    with trellis_model(tmp_path / "folder", ALL_SHAPES[name]) as model:
        golden = golden_of(model, 30)
        operations = with_kernels(EmulatedLaunch())
        found = in_chunks(guided(golden, operations, kv=kv), golden.ids, [17, 13])
    # Tiles add planes up in int8, as native code's do.
    assert_within(found, golden.answer.logits, expected_error(LAYERS, kv, [17]))


@pytest.mark.parametrize("number", [math.nan, math.inf])
@pytest.mark.parametrize("which", POISONED)
def test_a_weight_that_is_no_number_leaves_no_logit_that_is_one(
    tmp_path: Path, which: str, number: float
) -> None:
    # Rounded to int8 it could pass for a number, and a wrong answer for a right one.
    if (which, number) == ("router", math.inf):
        return  # an infinite score below 0 is one, never chosen
    with trellis_model(tmp_path / "folder", SHAPES["4 heads of 16 over 2"]) as model:
        POISONED[which](model.weights)[5] = number
        decoder = on_gpu(model, StandInGpu(with_kernels(EmulatedLaunch())))
        assert in_chunks(decoder, some_ids(model, 12), [9, 1]).isnan().all()


# --- on a card


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> CudaGpu:
    found = find_card("auto", look())
    assert found is not None, why_none(look())
    kernels = tmp_path_factory.mktemp("kernels")
    return open_card(found, kernels=kernels, limit_bytes=None, announce=lambda line: None)


@pytest.mark.gpu
@pytest.mark.parametrize("kv", cpu.KV_FORMATS)
@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("name", [*EMULATED, *GPU_SHAPES])
def test_a_cards_logits_are_torchs_but_for_rounding(
    card: CudaGpu, tmp_path: Path, name: str, chunks: str, kv: cpu.KvFormat
) -> None:
    with trellis_model(tmp_path / "folder", ALL_SHAPES[name]) as model:
        golden = golden_of(model)
        found = in_chunks(guided(golden, on=card, kv=kv), golden.ids, CHUNKS[chunks])
    sizes = [max(CHUNKS[chunks]) if max(CHUNKS[chunks]) > MOST_DECODED else 1]
    assert_within(found, golden.answer.logits, expected_error(LAYERS, kv, sizes))


@pytest.mark.gpu
def test_a_graph_replays_what_a_card_does_step_by_step(card: CudaGpu, plain: Golden) -> None:
    replaying, running = (on_gpu(plain.model, gpu) for gpu in (card, Uncaptured(card)))
    for sizes in ([1], [20, 1, 1, 7, 1]):
        found, wanted = (in_chunks(d, plain.ids, sizes) for d in (replaying, running))
        assert torch.equal(found, wanted)
        assert torch.equal(in_chunks(replaying, plain.ids, sizes), found), (
            "another time, other bits"
        )


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 300])
def test_a_card_attends_to_long_texts_as_torch_does(
    card: CudaGpu, tmp_path: Path, window: int | None
) -> None:
    sizes = [1500, 1, 1, 700, 1]
    shape = Shape(config={"num_hidden_layers": 2, "sliding_window": window})
    with trellis_model(tmp_path / "folder", shape) as model:
        golden = golden_of(model, sum(sizes))
        decoder = guided(golden, on=card, max_tokens=2048)
        found = in_chunks(decoder, golden.ids, sizes)
    assert_within(found, golden.answer.logits, expected_error(2, "float16", sizes))
