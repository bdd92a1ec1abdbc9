"""Passes whose experts are on a GPU, in RAM and on disk, on a stand-in for a GPU.

What is rounded is what native code and GPU kernels round; tolerances: native_goldens.py,
planes added up in int8 where the CPU does so. Tokens go where torch sent them.
"""

import ctypes
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from native_goldens import (
    CHUNKS,
    N_TOKENS,
    Golden,
    assert_within,
    expected_error,
    golden_of,
    some_ids,
)
from test_on_gpu import GuidedRoute, Uncaptured, card, on_gpu
from tiny_models import in_chunks
from torch import Tensor
from trellis_models import TrellisModel, trellis_model
from trellis_shapes import CONTEXT, GPU_SHAPES, LAYERS, SHAPES

from cuda_ext.ops import MOST_DECODED
from lowmoe.checkpoint.buffers import page_aligned
from lowmoe.decoder.cpu_share import CpuShare
from lowmoe.decoder.decoder import Decoder
from lowmoe.decoder.gpu_parts import GpuParts
from lowmoe.decoder.hybrid import HybridComputation
from lowmoe.decoder.misses import MOST_ON_CPU
from lowmoe.errors import FolderError
from lowmoe.experts import staging as staging_module
from lowmoe.experts.gpu_slots import GpuSlots
from lowmoe.experts.hybrid import HybridExperts
from lowmoe.experts.pinned_ring import PinnedRing
from lowmoe.experts.source import FolderExperts
from lowmoe.experts.split import MISSES, Costs, Misses, MissSplit
from lowmoe.experts.staging import Staging
from lowmoe.experts.store import ExpertStore
from lowmoe.experts.uses import Uses
from lowmoe.kernels import cpu
from lowmoe.kernels.cuda import CudaGpu
from lowmoe.kernels.gpu import Gpu
from tests.cuda_emulator.emulated import EmulatedLaunch
from tests.cuda_ext import oracle
from tests.stand_in_gpu import (
    Operation,
    StandInEvent,
    StandInGpu,
    with_kernels,
)

__all__ = ["card"]  # a fixture
SIZES = {**CHUNKS, "eight by eight": [MOST_DECODED]}
ALL = 1000


class Flaky(FolderExperts):
    """A source that fails while it is told to."""

    fails = False

    def read(self, layer_id: int, expert_id: int, buffers: list[Tensor]) -> int:
        if self.fails:
            raise FolderError("the disk is gone")
        return super().read(layer_id, expert_id, buffers)


@contextmanager
def hybrid(
    model: TrellisModel,
    operations: Mapping[str, Operation] = oracle.OPERATIONS,
    *,
    n_slots: int,
    n_in_ram: int = ALL,
    on: Gpu | None = None,
    misses: Misses = "cpu",
) -> Iterator[Decoder[HybridExperts]]:
    """With slots for so many experts on the GPU, and RAM for so many.

    On a stand-in with these operations, or on a card with its own.
    """
    gpu = StandInGpu(operations) if on is None else on
    format = model.recipe.expert_format(model.spec)
    source = Flaky(model.folder, model.recipe.part_names, format.part_bytes)
    n_experts = [layer.feed_forward.n_experts for layer in model.spec.layers]
    ring = PinnedRing(gpu, sum(format.part_bytes))
    slots = GpuSlots(format.part_bytes, n_experts, gpu, ring, n_slots=n_slots)
    slots.fill(source, lambda done, total: None)
    budget, total = n_in_ram * sum(source.buffer_bytes), model.spec.n_experts_total
    with ExpertStore(source, ram_budget_bytes=budget, n_experts_total=total) as ram:
        experts = HybridExperts(
            slots=slots,
            staging=Staging(format.part_bytes, max(n_experts), gpu, ring),
            ring=ring,
            ram=ram,
            n_experts_total=total,
            uses=Uses(n_experts),
        )
        on_cpu = CpuShare(
            model.spec,
            model.weights,
            model.recipe.code,
            cpu.Pool(1, []),
            isa=cpu.isas()[0],
            max_tokens=MOST_ON_CPU,
        )
        computation = HybridComputation(
            model.spec,
            model.weights.at(gpu.place),
            model.recipe.code,
            experts,
            gpu,
            on_cpu,
            MissSplit(misses, Costs(sum(format.part_bytes), 1e12)),
            kv="float16",
            max_tokens=256,
            n_context=CONTEXT,
        )
        yield Decoder(spec=model.spec, store=experts, computation=computation)
    ring.close()


class Guided:
    """A computation whose texts begin where their caches do."""

    def __init__(self, computation: Any, route: GuidedRoute) -> None:
        self._computation, self._route = computation, route

    def __getattr__(self, name: str) -> Any:
        return getattr(self._computation, name)

    def new_cache(self, capacity: int) -> Any:
        self._route.begin()
        cache = self._computation.new_cache(capacity)  # which captures, and so runs, a step
        self._route.begin()
        return cache


@contextmanager
def guided(
    golden: Golden,
    *,
    operations: Mapping[str, Operation] = oracle.OPERATIONS,
    on: CudaGpu | None = None,
    **how: Any,
) -> Iterator[Decoder[Any]]:
    """Where torch sent its tokens."""
    by_name = operations if on is None else vars(Uncaptured(on).operations)
    route = GuidedRoute(by_name["norm_route"], by_name["group"], golden.answer.routings)
    card: Any = None if on is None else Uncaptured(on, route)
    with hybrid(golden.model, {**by_name, "norm_route": route}, on=card, **how) as decoder:
        computation: Any = Guided(decoder.computation, route)
        yield Decoder(spec=decoder.spec, store=decoder.store, computation=computation)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Golden]:
    with trellis_model(tmp_path_factory.mktemp("model") / "folder", SHAPES["top 4 of 8"]) as model:
        yield golden_of(model)


def expected(sizes: list[int]) -> float:
    return expected_error(LAYERS, "float16", sizes)


# --- logits


@pytest.mark.parametrize("n_in_ram", [2, 7, ALL])
@pytest.mark.parametrize("n_slots", [2, 5, 17, ALL])
@pytest.mark.parametrize("chunks", SIZES)
def test_logits_are_torchs_but_for_rounding_whatever_the_budgets(
    plain: Golden, chunks: str, n_slots: int, n_in_ram: int
) -> None:
    with guided(plain, n_slots=n_slots, n_in_ram=n_in_ram) as decoder:
        found = in_chunks(decoder, plain.ids, SIZES[chunks])
    assert_within(found, plain.answer.logits, expected(SIZES[chunks]))


@pytest.mark.parametrize(
    "name",
    [
        "hidden 48, inner 40",
        "window of 7",
        "top 1",
        "top 3 of 9, not renormalized",
        *GPU_SHAPES,
    ],
)
def test_so_they_are_of_other_shapes(tmp_path: Path, name: str) -> None:
    with trellis_model(tmp_path / "folder", (SHAPES | GPU_SHAPES)[name]) as model:
        golden = golden_of(model)
        for chunks in ("at once", "in all sizes"):
            with guided(golden, n_slots=5, n_in_ram=3) as decoder:
                found = in_chunks(decoder, golden.ids, SIZES[chunks])
            assert_within(found, golden.answer.logits, expected(SIZES[chunks]))


@pytest.mark.parametrize("chunks", SIZES)
def test_with_all_experts_on_the_gpu_they_are_the_bits_of_a_model_that_fits(
    plain: Golden, chunks: str
) -> None:
    wanted = in_chunks(on_gpu(plain.model, StandInGpu()), plain.ids, SIZES[chunks])
    with hybrid(plain.model, n_slots=ALL, n_in_ram=2) as decoder:
        assert torch.equal(in_chunks(decoder, plain.ids, SIZES[chunks]), wanted)
        traffic = decoder.store.traffic()
        assert (traffic.ram_requests, traffic.disk_requests) == (0, 0)


def test_with_room_in_ram_a_text_has_the_same_bits_every_time(plain: Golden) -> None:
    found = []
    for _ in range(2):
        with hybrid(plain.model, n_slots=6) as decoder:
            found.append(in_chunks(decoder, plain.ids, [20, 1, 1, 5, 1]))
    assert torch.equal(*found)


def test_what_is_on_disk_has_the_bits_of_what_is_in_ram(
    plain: Golden, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As long as nothing moves up, which depends on what is in RAM.
    monkeypatch.setattr(HybridExperts, "move_up", lambda experts: None)
    found = []
    for n_in_ram in (2, ALL):
        with hybrid(plain.model, n_slots=6, n_in_ram=n_in_ram) as decoder:
            found.append(in_chunks(decoder, plain.ids, [1]))
    assert torch.equal(*found)


def test_many_experts_pass_through_a_few_places(
    plain: Golden, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hybrid(plain.model, n_slots=2) as decoder:
        wanted = in_chunks(decoder, plain.ids, [N_TOKENS])
    monkeypatch.setattr(staging_module, "SET_BYTES", 1)
    with hybrid(plain.model, n_slots=2) as decoder:
        assert decoder.store.staging.n_staged == 1
        found = in_chunks(decoder, plain.ids, [N_TOKENS])
    # The same outputs, added to x one by one: another order of sums, and what follows from it
    # where an activation is rounded otherwise.
    assert_within(found, wanted, expected([1]))


# --- misses that pass through the GPU


@pytest.mark.parametrize("misses", ["page", "auto"])
@pytest.mark.parametrize(("n_slots", "n_in_ram"), [(2, 2), (5, ALL), (17, 7)])
@pytest.mark.parametrize("chunks", SIZES)
def test_logits_are_torchs_wherever_misses_are_computed(
    plain: Golden, chunks: str, n_slots: int, n_in_ram: int, misses: Misses
) -> None:
    with guided(plain, n_slots=n_slots, n_in_ram=n_in_ram, misses=misses) as decoder:
        found = in_chunks(decoder, plain.ids, SIZES[chunks])
    assert_within(found, plain.answer.logits, expected(SIZES[chunks]))


@pytest.mark.parametrize("n_staged", [1, 2])
@pytest.mark.parametrize("chunks", ["one by one", "in all sizes"])
def test_where_all_pass_through_the_cpu_computes_nothing(
    plain: Golden, monkeypatch: pytest.MonkeyPatch, chunks: str, n_staged: int
) -> None:
    monkeypatch.setattr(CpuShare, "run", lambda *anything: pytest.fail("the CPU computes"))
    if n_staged == 1:
        monkeypatch.setattr(staging_module, "SET_BYTES", 1)
    with guided(plain, n_slots=5, misses="page") as decoder:
        assert decoder.store.staging.n_staged == n_staged
        found = in_chunks(decoder, plain.ids, SIZES[chunks])
        traffic = decoder.store.traffic()
    assert_within(found, plain.answer.logits, expected(SIZES[chunks]))
    n_missed = traffic.ram_requests + traffic.disk_requests
    assert traffic.passed_bytes == n_missed * decoder.store.expert_bytes > 0
    assert traffic.copied_bytes >= traffic.passed_bytes
    assert traffic.copied_s > 0


@pytest.mark.parametrize("misses", MISSES)
def test_a_long_prompts_experts_are_on_their_way_before_it_is_routed(
    plain: Golden, monkeypatch: pytest.MonkeyPatch, misses: Misses
) -> None:
    asked: list[str] = []
    bring, route = Staging.bring, GpuParts.route
    monkeypatch.setattr("lowmoe.decoder.hybrid.SURELY_USED", N_TOKENS * 4 // 8)
    with guided(plain, n_slots=5, misses=misses) as decoder:
        in_chunks(decoder, plain.ids, [N_TOKENS])  # after which all of them are in memory
        cache = decoder.new_cache(N_TOKENS)
        monkeypatch.setattr(Staging, "bring", lambda *of: asked.append("bring") or bring(*of))
        monkeypatch.setattr(GpuParts, "route", lambda *of: asked.append("route") or route(*of))
        found = decoder.logits(decoder.forward(plain.ids, cache))
        assert_within(found, plain.answer.logits, expected([N_TOKENS]))
        assert asked[:2] == ["bring", "route"]
        assert asked.count("route") == LAYERS
        shorter = decoder.new_cache(N_TOKENS)
        asked.clear()
        decoder.forward(plain.ids[:-1], shorter)
        assert asked[0] == "route", "some may not be needed"


def test_the_same_text_passes_through_with_the_same_bits_every_time(plain: Golden) -> None:
    found = []
    for _ in range(2):
        with hybrid(plain.model, n_slots=6, misses="page") as decoder:
            found.append(in_chunks(decoder, plain.ids, [20, 1, 1, 5, 1]))
    assert torch.equal(*found)


def test_the_host_does_not_wait_at_a_layer_without_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits, wait = [0], StandInEvent.wait

    def counted(event: StandInEvent) -> None:
        waits[0] += threading.current_thread() is threading.main_thread()
        wait(event)

    shape = GPU_SHAPES["normed heads, plain first and last"]
    with trellis_model(tmp_path / "folder", shape) as model, hybrid(model, n_slots=2) as decoder:
        ids = some_ids(model, 12)
        cache = decoder.new_cache(12)
        decoder.forward(ids[:9], cache)
        monkeypatch.setattr(StandInGpu, "wait_for", lambda gpu, event: wait(event))
        monkeypatch.setattr(StandInEvent, "wait", counted)
        for one in ids[9:].split(1):
            decoder.forward(one, cache)
        assert decoder.store.traffic().ram_requests > 0
        assert waits[0] == 3  # tokens, each through one layer that has experts


@pytest.mark.parametrize("misses", MISSES)
def test_the_host_waits_once_a_layer(
    plain: Golden, monkeypatch: pytest.MonkeyPatch, misses: Misses
) -> None:
    waits, wait = [0], StandInEvent.wait

    def counted(event: StandInEvent) -> None:
        # Who sends in the background may wait for buffers as long as he likes.
        waits[0] += threading.current_thread() is threading.main_thread()
        wait(event)

    with hybrid(plain.model, n_slots=6, misses=misses) as decoder:
        cache = decoder.new_cache(N_TOKENS)
        decoder.forward(plain.ids[:9], cache)
        monkeypatch.setattr(StandInGpu, "wait_for", lambda gpu, event: wait(event))
        monkeypatch.setattr(StandInEvent, "wait", counted)
        for ids in plain.ids[9:12].split(1):
            decoder.forward(ids, cache)
        assert decoder.store.traffic().ram_requests > 0
        assert waits[0] == 3 * LAYERS


# --- what is where


def bytes_at(address: int, n_bytes: int) -> bytes:
    return bytes((ctypes.c_uint8 * n_bytes).from_address(address))


def assert_places_hold_their_experts(model: TrellisModel, slots: GpuSlots) -> None:
    format = model.recipe.expert_format(model.spec)
    source = FolderExperts(model.folder, model.recipe.part_names, format.part_bytes)
    buffers = [page_aligned(n) for n in source.buffer_bytes]
    seen: set[int] = set()
    for layer_id, table in enumerate(slots.tables):
        for expert_id, addresses in enumerate(table.tolist()):
            if not slots.has(layer_id, expert_id):
                assert addresses == [0, 0, 0]
                continue
            source.read(layer_id, expert_id, buffers)
            for address, n_bytes, part in zip(addresses, format.part_bytes, buffers, strict=False):
                assert bytes_at(address, n_bytes) == bytes(part[:n_bytes].tolist())
            seen.add(addresses[0])
    assert len(seen) == len(slots.residents()) <= slots.n_slots


def test_popular_experts_move_up_and_every_place_holds_whom_the_table_says(plain: Golden) -> None:
    with hybrid(plain.model, n_slots=9) as decoder:
        slots, cache = decoder.store.slots, decoder.new_cache(N_TOKENS)
        there, n_moved = slots.residents(), 0
        assert len(there) == slots.n_slots == 9
        for token in plain.ids:
            decoder.forward(token[None], cache)
            assert_places_hold_their_experts(plain.model, slots)
            n_moved += slots.residents() != there
            there = slots.residents()
            # One may be on its way.
            assert len(there) in (8, 9)
        assert n_moved > 4
        # Layers keep their shares.
        assert {layer_id for layer_id, _ in there} == set(range(LAYERS))


def test_slots_are_filled_layer_by_layer_in_turn(plain: Golden) -> None:
    with hybrid(plain.model, n_slots=7) as decoder:
        assert decoder.store.residents() == {0: [0, 1, 2], 1: [0, 1], 2: [0, 1]}


def test_memory_is_counted_by_the_uppermost_tier(plain: Golden) -> None:
    with hybrid(plain.model, n_slots=6, n_in_ram=4) as decoder:
        in_chunks(decoder, plain.ids, [20, 1])
        experts = decoder.store.in_memory()
        assert len(experts["gpu"]) in (5, 6)
        assert 0 < len(experts["ram"]) <= 4
        assert not set(experts["gpu"]) & set(experts["ram"])
        assert decoder.store.ram.resident_bytes <= 4 * decoder.store.ram.expert_bytes


def test_every_use_is_counted_where_it_is_served(plain: Golden) -> None:
    with hybrid(plain.model, n_slots=6, n_in_ram=4) as decoder:
        in_chunks(decoder, plain.ids, [1])
        traffic = decoder.store.traffic()
        served = traffic.gpu_requests + traffic.ram_requests + traffic.disk_requests
        assert served == N_TOKENS * LAYERS * 4
        assert min(traffic.gpu_requests, traffic.ram_requests, traffic.disk_requests) > 0
        assert traffic.gpu_bytes == traffic.gpu_requests * decoder.store.expert_bytes
        assert decoder.store.uses is not None
        assert sum(decoder.store.uses.counts) == served


def test_where_ram_has_room_for_the_rest_nothing_stays_on_disk(plain: Golden) -> None:
    total = plain.model.spec.n_experts_total
    with hybrid(plain.model, n_slots=9, n_in_ram=total - 9) as decoder:
        store, cache, n_moved = decoder.store, decoder.new_cache(N_TOKENS), 0
        for token, ids in enumerate(plain.ids.split(1)):
            there = store.slots.residents()
            decoder.forward(ids, cache)
            n_moved += store.slots.residents() != there
            for slot in list(store.ram._tier.residents.values()):
                if slot.filling is not None:
                    slot.filling.result()
            if token >= 20:
                # But the one that leaves the GPU, until another has come there.
                assert len(store.slots.keys() | store.ram.keys()) >= total - 1
        assert n_moved > 4


# --- what goes wrong, and what is broken off


@pytest.mark.parametrize("misses", ["cpu", "page"])
@pytest.mark.parametrize("size", [1, 5, 20])
def test_a_pass_that_an_error_broke_off_is_computed_anew(
    plain: Golden, size: int, misses: Misses
) -> None:
    with hybrid(plain.model, n_slots=5, n_in_ram=2, misses=misses) as decoder:
        cache = decoder.new_cache(N_TOKENS)
        decoder.forward(plain.ids[:10], cache)
        source: Any = decoder.store.ram._source
        source.fails = True
        with pytest.raises(FolderError, match="the disk is gone"):
            decoder.forward(plain.ids[10 : 10 + size], cache)
        source.fails = False
        assert cache.n_tokens == 10
        found = decoder.logits(decoder.forward(plain.ids[10 : 10 + size], cache))
        again = decoder.logits(decoder.forward(plain.ids[10 + size : 12 + size], cache))
    assert found.isfinite().all()
    with hybrid(plain.model, n_slots=5, n_in_ram=2, misses=misses) as decoder:
        wanted = in_chunks(decoder, plain.ids[: 12 + size], [10, size, 2])
    # What moved up meanwhile may differ, and who computes an expert rounds it his way.
    assert_within(torch.cat([found, again]), wanted[10:], expected([size]))


def test_an_expert_that_cannot_move_up_is_told_once_and_later_ones_move(
    plain: Golden, monkeypatch: pytest.MonkeyPatch
) -> None:
    send = PinnedRing.send

    def fail(ring: PinnedRing, *given: Any) -> Any:
        monkeypatch.setattr(PinnedRing, "send", send)
        raise OSError("the bus is gone")

    with hybrid(plain.model, n_slots=9) as decoder:
        cache, slots = decoder.new_cache(N_TOKENS), decoder.store.slots
        decoder.forward(plain.ids[:1], cache)
        monkeypatch.setattr(PinnedRing, "send", fail)
        there, n_raised, n_moved = slots.residents(), 0, 0
        while cache.n_tokens < N_TOKENS:
            try:
                decoder.forward(plain.ids[cache.n_tokens][None], cache)
            except OSError:
                n_raised += 1
            n_moved += slots.residents() != there
            there = slots.residents()
            assert_places_hold_their_experts(plain.model, slots)
        assert n_raised == 1
        assert n_moved > 4
        copied_s = decoder.store.traffic().copied_s
        decoder.store._lent.close()  # when the last one has been sent
        decoder.store.copied()
        assert decoder.store.traffic().copied_s >= copied_s > 0
        assert not decoder.store._sent


def test_forgetting_the_latest_tokens_leaves_no_trace_of_them(plain: Golden) -> None:
    with hybrid(plain.model, n_slots=ALL) as decoder:
        wanted = in_chunks(decoder, plain.ids, [10, 49, 1])[10:]
        cache = decoder.new_cache(N_TOKENS)
        decoder.forward(plain.ids[:10], cache)
        decoder.forward(plain.ids[40:], cache)
        assert cache.keep(10) == 10
        found = [
            decoder.logits(decoder.forward(part, cache))
            for part in (plain.ids[10:59], plain.ids[59:])
        ]
    assert torch.equal(torch.cat(found), wanted)


def test_a_step_is_the_same_work_whatever_the_token_and_its_position(plain: Golden) -> None:
    with hybrid(plain.model, n_slots=6) as decoder:
        gpu: Any = decoder.computation._gpu  # type: ignore[attr-defined]
        in_chunks(decoder, plain.ids, [1])
        assert (gpu.n_captured, gpu.n_replayed) == (2 * LAYERS, 2 * LAYERS * N_TOKENS)


# --- the kernels, emulated


@pytest.mark.parametrize("sizes", [[3, 1, MOST_DECODED, 1], [17, 13]])
@pytest.mark.parametrize(
    "name",
    [
        "4 heads of 16 over 2",
        "top 3 of 9, not renormalized",
        "half of a head turns, sigmoids in groups, biases, shared",
        "sinks, biases everywhere, another activation, odd sizes",
    ],
)
def test_kernels_leave_out_experts_that_are_not_there(
    tmp_path: Path, name: str, sizes: list[int]
) -> None:
    with trellis_model(tmp_path / "folder", (SHAPES | GPU_SHAPES)[name]) as model:
        golden = golden_of(model, sum(sizes))
        kernels = with_kernels(EmulatedLaunch())
        with guided(golden, operations=kernels, n_slots=5) as decoder:
            found = in_chunks(decoder, golden.ids, sizes)
    assert_within(found, golden.answer.logits, expected([17]))


# --- on a card


@pytest.mark.gpu
@pytest.mark.parametrize("misses", MISSES)
@pytest.mark.parametrize("n_slots", [2, 9, ALL])
@pytest.mark.parametrize("chunks", SIZES)
def test_a_cards_logits_are_torchs_but_for_rounding(
    card: CudaGpu, plain: Golden, chunks: str, n_slots: int, misses: Misses
) -> None:
    with guided(plain, on=card, n_slots=n_slots, n_in_ram=7, misses=misses) as decoder:
        found = in_chunks(decoder, plain.ids, SIZES[chunks])
    assert_within(found, plain.answer.logits, expected(SIZES[chunks]))


@pytest.mark.gpu
def test_graphs_replay_what_a_card_does_step_by_step(card: CudaGpu, plain: Golden) -> None:
    found = []
    for gpu in (card, Uncaptured(card)):
        with hybrid(plain.model, n_slots=6, on=gpu) as decoder:  # type: ignore[arg-type]
            found.append(in_chunks(decoder, plain.ids, [20, 1, 1, 7, 1]))
    assert torch.equal(*found)
