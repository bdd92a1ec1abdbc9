"""Native passes against torch's, over the same planes.

Tolerances are of the relative squared error of a token's logits. What native code rounds that torch
does not are activations, to int8 with one scale for each 128 of them: the largest of 128 normal
numbers is about 2.7 deviations, a step of 2.7 / 127 has a variance of step^2 / 12 = 4e-5. A layer
rounds before each of its four matrices and the head once more, and a residual stream carries all of
it on: (4 * LAYERS + 1) * 4e-5 is what to expect. For more than eight tokens, planes are added up in
int8 too, 1e-4 more (lowmoe/kernels/cpu/trellis_tile.h); an int8 cache rounds keys and values as
often. Measured on these models, the mean is at most 1.4 times what is expected, and the worst of
some hundred tokens 13 times.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import in_chunks, with_attention, with_router
from torch import Tensor
from trellis_models import Answer, Guided, Recording, TrellisModel, layer_by_layer, trellis_model
from trellis_shapes import CONTEXT, DEMANDING_SHAPES, LAYERS, MIXTRAL, SHAPES, Shape

from lowmoe.checkpoint.folder import ModelFolder
from lowmoe.checkpoint.layout import Recipe
from lowmoe.decoder.abilities import needs
from lowmoe.decoder.native import ABLE, NativeCache
from lowmoe.decoder.weights import DenseWeights
from lowmoe.experts.store import ExpertStore
from lowmoe.families import read_config
from lowmoe.kernels import cpu
from lowmoe.spec import ModelSpec, Rope
from quant.trellis import WINDOW_6_TABLE, TrellisCode

ROUNDING, TILE_ROUNDING = 4e-5, 1e-4
MEAN_LIMIT, TOKEN_LIMIT = 3.0, 30.0  # times what is to be expected
FEW_TOKENS = 8  # at once, that are multiplied one by one
N_TOKENS = 60
CHUNKS = {
    "at once": [N_TOKENS],
    "one by one": [1],
    "few by few": [FEW_TOKENS, 2],
    "in all sizes": [1, 10, 2, 3, 4, 20],
}


def expected_error(n_layers: int, kv: cpu.KvFormat, sizes: list[int]) -> float:
    of_a_matrix = ROUNDING + (TILE_ROUNDING if max(sizes) > FEW_TOKENS else 0)
    of_the_cache = 2 * n_layers * ROUNDING if kv == "int8" else 0
    return (4 * n_layers + 1) * of_a_matrix + of_the_cache


def errors(found: Tensor, wanted: Tensor) -> Tensor:
    """The relative squared error of each token, [T]."""
    assert found.shape == wanted.shape
    assert found.dtype == wanted.dtype == torch.float32
    return (found - wanted).square().sum(1) / wanted.square().sum(1)


def assert_within(found: Tensor, wanted: Tensor, expected: float) -> None:
    error = errors(found, wanted)
    assert error.mean() < MEAN_LIMIT * expected
    assert error.max() < TOKEN_LIMIT * expected, f"token {error.argmax()}"


def some_ids(model: TrellisModel, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, model.spec.n_vocab, (count,), generator=generator)


def answer_of_torch(model: TrellisModel, ids: Tensor) -> Answer:
    recording = Recording(model.in_torch(), len(model.spec.layers))
    with model.decoder(recording) as decoder:
        return Answer(in_chunks(decoder, ids, [256]), recording.routings())


@dataclass(frozen=True, slots=True)
class Golden:
    """A model, a text, and what torch makes of it."""

    model: TrellisModel
    ids: Tensor
    answer: Answer


def golden_of(model: TrellisModel, n_tokens: int = N_TOKENS) -> Golden:
    ids = some_ids(model, n_tokens)
    return Golden(model, ids, answer_of_torch(model, ids))


@pytest.fixture(scope="module", params=SHAPES | DEMANDING_SHAPES)
def golden(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Golden]:
    shape = (SHAPES | DEMANDING_SHAPES)[request.param]
    with trellis_model(tmp_path_factory.mktemp("model") / "folder", shape) as model:
        yield golden_of(model)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Golden]:
    """One shape, where what is tested has nothing to do with shapes."""
    shape = SHAPES["3 heads of 64 of their own, hidden 192, inner 200"]
    with trellis_model(tmp_path_factory.mktemp("model") / "folder", shape) as model:
        yield golden_of(model)


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


# --- the same bits


def test_threads_change_no_bit(golden: Golden) -> None:
    # Few passes: on a machine busy with something else, threads that wait for each other wait long.
    sizes = [30, 1, 2, 1, 26]
    with golden.model.decoder(golden.model.native()) as decoder:
        wanted = in_chunks(decoder, golden.ids, sizes)
    for n_threads in (2, 3):
        with golden.model.decoder(golden.model.native(n_threads=n_threads)) as decoder:
            assert torch.equal(in_chunks(decoder, golden.ids, sizes), wanted)


def test_threads_change_no_bit_where_a_token_is_attended_to_in_parts(tmp_path: Path) -> None:
    sizes = [250] * 9 + [1] * 4
    shape = Shape(config={"num_hidden_layers": 1})
    found = []
    with trellis_model(tmp_path / "folder", shape) as model:
        ids = some_ids(model, sum(sizes))
        for n_threads in (1, 2, 3):
            with model.decoder(model.native(n_threads=n_threads)) as decoder:
                found.append(in_chunks(decoder, ids, sizes))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("n_slots", [2, 3, 5, 9])
def test_logits_are_the_same_bits_whatever_the_budget(golden: Golden, n_slots: int) -> None:
    sizes = [11, 1, 1, 1, 20, 1, 2, 23]
    with golden.model.decoder(golden.model.native()) as decoder:
        wanted = in_chunks(decoder, golden.ids, sizes)
    with golden.model.decoder(golden.model.native(), n_slots=n_slots) as decoder:
        assert decoder.store.n_slots == min(n_slots, golden.model.spec.n_experts_total)
        for _ in range(2):  # with a cold store, then with a warm one
            assert torch.equal(in_chunks(decoder, golden.ids, sizes), wanted)
        assert decoder.store.traffic().disk_requests > 0


def fill(store: ExpertStore, spec: ModelSpec) -> None:
    """Have every expert read."""
    for layer_id, layer in enumerate(spec.layers):
        store.want(layer_id, range(layer.feed_forward.n_experts))
        for group in store.portions():
            with store.borrow(layer_id, group):
                pass


@pytest.mark.parametrize("sizes", CHUNKS.values(), ids=CHUNKS.keys())
def test_all_layers_in_one_call_give_the_bits_of_layer_by_layer(
    golden: Golden, sizes: list[int]
) -> None:
    native = golden.model.native()
    listener = Recording(native, LAYERS)  # which has to be asked layer by layer
    found, used = [], []
    for computation in (listener, native):
        with golden.model.decoder(computation) as decoder:
            fill(decoder.store, golden.model.spec)
            assert decoder.store.is_complete
            before = decoder.store.traffic()
            found.append(in_chunks(decoder, golden.ids, sizes))
            used.append(decoder.store.traffic() - before)
    assert listener.passes[0], "nothing was routed layer by layer"
    assert torch.equal(found[0], found[1])
    assert used[0] == used[1]
    assert used[0].ram_requests > 0
    assert used[0].disk_requests == 0


def test_a_computation_serves_one_store_after_another(plain: Golden) -> None:
    native, found = plain.model.native(), []
    for _ in range(2):
        with plain.model.decoder(native) as decoder:
            fill(decoder.store, plain.model.spec)
            found.append(in_chunks(decoder, plain.ids, [N_TOKENS]))
            assert decoder.store.traffic().ram_requests > 0
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize("isa", [isa for isa in cpu.isas() if isa != "scalar"])
def test_instruction_sets_agree(golden: Golden, isa: str) -> None:
    # Sums of floating-point numbers in another order: now and then one moves an activation across
    # the middle between two steps of int8, and all that follows from it may be rounded otherwise.
    for sizes in (CHUNKS["at once"], CHUNKS["one by one"]):
        found = []
        for name in (isa, "scalar"):
            guided = Guided(golden.model.native(isa=name), golden.answer.routings)
            with golden.model.decoder(guided) as decoder:
                found.append(in_chunks(decoder, golden.ids, sizes))
        error = errors(*found)
        assert error.min() < 1e-9, "no token at all for which nothing was rounded otherwise"
        assert error.mean() < expected_error(LAYERS, "float16", sizes) / 2


def test_a_chunk_longer_than_a_pass_may_have_is_cut_at_both_ends(plain: Golden) -> None:
    whole, short = plain.model.native(), plain.model.native(max_tokens=16)
    x = whole.embed(plain.ids, torch.arange(plain.ids.shape[0]))
    assert torch.equal(short.embed(plain.ids, torch.arange(plain.ids.shape[0])), x)
    # 60 tokens are 16 three times and 12: all of them more than few.
    assert torch.equal(short.logits(x), whole.logits(x))


def test_two_conversations_take_turns_and_do_not_hear_each_other(plain: Golden) -> None:
    with plain.model.decoder(plain.model.native()) as decoder:
        alone = [in_chunks(decoder, ids, [20]) for ids in (plain.ids, plain.ids.flip(0))]
        caches = [decoder.new_cache(N_TOKENS) for _ in range(2)]
        found: list[list[Tensor]] = [[], []]
        for first in range(0, N_TOKENS, 20):
            for which, ids in enumerate((plain.ids, plain.ids.flip(0))):
                hidden = decoder.forward(ids[first : first + 20], caches[which])
                found[which].append(decoder.logits(hidden))
    assert torch.equal(torch.cat(found[0]), alone[0])
    assert torch.equal(torch.cat(found[1]), alone[1])


def test_forgetting_the_latest_tokens_leaves_no_trace_of_them(plain: Golden) -> None:
    ids = plain.ids
    with plain.model.decoder(plain.model.native()) as decoder:
        wanted = in_chunks(decoder, ids, [10, 50])[10:]
        cache = decoder.new_cache(N_TOKENS)
        decoder.forward(ids[:10], cache)
        decoder.forward(ids[40:], cache)
        assert cache.keep(10) == 10
        assert torch.equal(decoder.logits(decoder.forward(ids[10:], cache)), wanted)
        assert cache.n_tokens == N_TOKENS


# --- memory


def test_a_pass_takes_no_native_memory_but_pages_of_the_cache(plain: Golden) -> None:
    native = plain.model.native(n_threads=2)
    with plain.model.decoder(native) as decoder:
        # What all layers at once need, they take once, when every expert has come into RAM.
        while not decoder.store.is_complete:
            in_chunks(decoder, plain.ids, [N_TOKENS])
        in_chunks(decoder, plain.ids, [N_TOKENS])
        before = cpu.allocated_bytes()
        cache = decoder.new_cache(600)
        assert cpu.allocated_bytes() == before  # nothing is taken before it is needed
        decoder.forward(plain.ids, cache)
        one_page = cpu.allocated_bytes()
        assert one_page - before == native.cache_bytes(N_TOKENS) == native.cache_bytes(256)
        for size in (1, 2, 57, 60, 60, 16):
            decoder.logits(decoder.forward(plain.ids[:size], cache))
        assert cache.n_tokens == 256
        assert cpu.allocated_bytes() == one_page
        decoder.forward(plain.ids[:1], cache)
        assert cpu.allocated_bytes() - before == native.cache_bytes(257) == 2 * (one_page - before)
        assert cache.keep(0) == 0  # what was taken is kept
        decoder.forward(plain.ids, cache)
        assert cpu.allocated_bytes() - before == native.cache_bytes(257)
        del cache
        assert cpu.allocated_bytes() == before


@pytest.mark.parametrize(
    ("n_kv_heads", "head_size"), [(2, 16), (8, 128), (20, 128), (32, 128)], ids=str
)
@pytest.mark.parametrize("kv", cpu.KV_FORMATS)
def test_a_page_takes_what_its_heads_do(kv: cpu.KvFormat, n_kv_heads: int, head_size: int) -> None:
    pages = cpu.KvPages(n_layers=3, n_kv_heads=n_kv_heads, head_size=head_size, format=kv)
    before = cpu.allocated_bytes()
    pages.reserve(1)
    of_a_page = 2 * cpu.kv_head_bytes(kv, head_size) * n_kv_heads * cpu.PAGE_TOKENS
    assert cpu.allocated_bytes() - before == 3 * of_a_page


@pytest.mark.parametrize("kv", cpu.KV_FORMATS)
def test_keys_and_values_take_the_bytes_of_their_format(plain: Golden, kv: cpu.KvFormat) -> None:
    # 3 key-value heads of 64; int8 has a float32 scale beside each.
    bytes_of_a_head = {"float32": 256, "float16": 128, "int8": 68}[kv]
    native = plain.model.native(kv=kv)
    assert native.cache_bytes(1) == 2 * LAYERS * 3 * 256 * bytes_of_a_head


@pytest.mark.parametrize("kv", cpu.KV_FORMATS)
def test_of_latents_only_one_row_a_token_is_kept(tmp_path: Path, kv: cpu.KvFormat) -> None:
    # 64 channels of a latent and 16 that turn; int8 has a float32 scale beside them.
    shape = DEMANDING_SHAPES["latents, sigmoids in groups, shared, lengthening rope"]
    with trellis_model(tmp_path / "folder", shape) as model:
        native = model.native(kv=kv)
        before = cpu.allocated_bytes()
        cache = native.new_cache(CONTEXT)
        cache.pages.reserve(1)
        assert cpu.allocated_bytes() - before == native.cache_bytes(1)
        bytes_of_a_row = {"float32": 320, "float16": 160, "int8": 84}[kv]
        assert native.cache_bytes(1) == LAYERS * 256 * bytes_of_a_row


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


def test_a_computation_gives_its_memory_back(plain: Golden) -> None:
    before = cpu.allocated_bytes()
    native = plain.model.native()
    assert cpu.allocated_bytes() - before > 0
    del native
    assert cpu.allocated_bytes() == before


def test_a_cache_that_is_full_is_not_written_beyond(plain: Golden) -> None:
    with plain.model.decoder(plain.model.native()) as decoder:
        cache = decoder.new_cache(10)
        assert isinstance(cache, NativeCache)
        with pytest.raises(AssertionError):
            decoder.forward(plain.ids[:11], cache)
        assert cache.pages.n_reserved == 0


def test_a_pass_of_more_tokens_than_there_is_scratch_for_is_refused(plain: Golden) -> None:
    native = plain.model.native(max_tokens=16)
    x = native.embed(plain.ids, torch.arange(plain.ids.shape[0]))
    for refused in (
        lambda: native.attend(x, 0, native.new_cache(N_TOKENS)),
        lambda: native.route(x, 0),
        lambda: native.foresee(x, 0),
    ):
        with pytest.raises(ValueError, match="more than the engine was made for"):
            refused()


# --- what goes wrong


def test_a_layer_that_an_error_broke_off_is_computed_anew(
    plain: Golden, monkeypatch: pytest.MonkeyPatch
) -> None:
    with plain.model.decoder(plain.model.native()) as decoder:
        wanted = in_chunks(decoder, plain.ids, [20])
    read_expert = ModelFolder.read_expert
    with plain.model.decoder(plain.model.native(), n_slots=2) as decoder:
        for n_good in (0, 1, 2, 5):
            left = n_good

            def failing(*what: Any, **how: Any) -> int:
                nonlocal left
                left -= 1
                if left < 0:
                    raise OSError("thrown by the test")
                return read_expert(*what, **how)

            cache = decoder.new_cache(N_TOKENS)
            with monkeypatch.context() as patch:
                patch.setattr(ModelFolder, "read_expert", failing)
                with pytest.raises(OSError, match="thrown by the test"):
                    decoder.forward(plain.ids[:20], cache)
            assert cache.n_tokens == 0
            hidden = decoder.forward(plain.ids[:20], cache)
            assert torch.equal(decoder.logits(hidden), wanted[:20])


POISONED: dict[str, Callable[[DenseWeights], Tensor]] = {
    "embedding's d": lambda w: w.embedding.d,  # type: ignore[union-attr]
    "attention's norm": lambda w: w.layers[1].attention_norm,
    "q, k and v's d": lambda w: w.layers[1].qkv.d,  # type: ignore[union-attr]
    "attention's output's d": lambda w: w.layers[1].attention_out.d,  # type: ignore[union-attr]
    "experts' norm": lambda w: w.layers[1].experts_norm,
    "router": lambda w: w.layers[1].router[2],
    "gate and up's d": lambda w: w.layers[1].transforms.d_in,
    "down's d": lambda w: w.layers[1].transforms.d_inner[2],
    "final norm": lambda w: w.final_norm,
    "head's d": lambda w: w.head.d,  # type: ignore[union-attr]
}


@pytest.mark.parametrize(
    ("which", "number"),
    [(which, number) for which in POISONED for number in (math.nan, math.inf)
     if (which, number) != ("router", math.inf)],  # an infinite score below 0 is one, never chosen
)  # fmt: skip
def test_a_weight_that_is_no_number_leaves_no_logit_that_is_one(
    tmp_path: Path, which: str, number: float
) -> None:
    # Rounded to int8 it could pass for a number, and a wrong answer for a right one.
    with trellis_model(tmp_path / "folder", SHAPES["4 heads of 16 over 2"]) as model:
        POISONED[which](model.weights)[5] = number
        ids = some_ids(model, 12)
        for isa in cpu.isas():
            with model.decoder(model.native(isa=isa)) as decoder:
                assert in_chunks(decoder, ids, [9, 1]).isnan().all()


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
