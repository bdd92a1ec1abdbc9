"""Puts a model of planes on a GPU: all of it, or all but the experts that do not fit.

Knows:        which parts go there, in which order.
Ignorant of:  which GPU, what fits on it: see gpu.py.
"""

import gc
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from lowmoe.decoder.computation import Computation
from lowmoe.decoder.cpu_share import CpuShare
from lowmoe.decoder.decoder import Decoder
from lowmoe.decoder.gpu_buffers import can_prefer, why_not_shape
from lowmoe.decoder.hybrid import HybridComputation
from lowmoe.decoder.misses import MOST_ON_CPU
from lowmoe.decoder.on_gpu import GpuComputation
from lowmoe.decoder.preference import boost_of
from lowmoe.decoder.traced import TracedCpuShare, TracedPasses
from lowmoe.engine.coarse import coarse_first
from lowmoe.engine.gpu import (
    GpuDivision,
    GpuNeeds,
    GpuRefusal,
    find_gpu,
    gpu_failures,
    open_gpu,
    out_of_memory,
    settle,
)
from lowmoe.engine.load_options import TORCH
from lowmoe.engine.machine import PROBE_BYTES, new_pool
from lowmoe.engine.memory import available_ram_bytes, promise_ram, ram_budget
from lowmoe.engine.report import Reporter
from lowmoe.engine.runtime import Loading, Runtime
from lowmoe.errors import GpuError, MemoryBudgetError, UsageError
from lowmoe.experts.gpu_slots import GpuSlots
from lowmoe.experts.hybrid import HybridExperts
from lowmoe.experts.lender import Lender
from lowmoe.experts.pinned_ring import PinnedRing
from lowmoe.experts.resident import ResidentExperts
from lowmoe.experts.source import ExpertSource, FolderExperts
from lowmoe.experts.split import Costs, Misses, MissSplit
from lowmoe.experts.staging import Staging
from lowmoe.experts.to_gpu import Progress
from lowmoe.experts.traced import open_store, traced
from lowmoe.experts.uses import Uses
from lowmoe.kernels import cpu
from lowmoe.kernels.gpu import Gpu
from lowmoe.kernels.shortage import shortages
from lowmoe.kernels.traced_gpu import TracedGpu
from lowmoe.settings import read_settings
from quant.layout import SYMBOL_BITS

L = TypeVar("L", bound=Lender)

_WHERE_OTHERS: dict[Misses, str] = {
    "cpu": "the CPU computes the others",
    "page": "the others pass through it",
    "auto": "the others are computed by the CPU or pass through it, whichever is faster",
}
# Of experts that a GPU had no memory for after all, one part of so many less is tried next.
PARTS_GIVEN_UP = 8
CUDA = "cuda"  # what computes there, where others name the CPU's instruction set


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuPlace:
    """A GPU with room for a model."""

    gpu: Gpu
    needs: GpuNeeds
    division: GpuDivision

    def with_less(self, ram_bytes: int) -> "GpuPlace":
        """The next smaller division of less memory.  Raises GpuRefusal if there is none."""
        of, total = self.division, self.needs.spec.n_experts_total
        n_slots = total if of.n_slots is None else of.n_slots
        n_slots -= max(1, n_slots // PARTS_GIVEN_UP)
        # What is staged for fewer slots may weigh as much as they do where layers are few.
        available = min(
            self.needs.divided_bytes(self.gpu, replace(of, n_slots=n_slots)),
            self.needs.divided_bytes(self.gpu, of) - 1,
        )
        division = self.needs.divided(self.gpu, [of.n_planes], ram_bytes, available)
        return replace(self, division=division)


def place_on_gpu(loading: Loading, planes: list[int], report: Reporter) -> GpuPlace | None:
    """Where a model is put; None where the CPU computes, which is said if there is a GPU.

    planes: how many experts may be computed at, the best first.
    Raises what is said where the GPU was asked for by name.
    """
    folder, options = loading.opened, loading.options
    try:
        found = find_gpu(options.gpu)
        if found is None:
            return None
        recipe = folder.recipe
        if recipe.format != "trellis":
            raise GpuRefusal(f"no GPU kernel reads the {recipe.format} of {folder.path}", GpuError)
        if recipe.code.window_bits > cpu.WINDOW_BITS:
            raise GpuRefusal(
                f"no GPU kernel reads windows of {recipe.code.window_bits} bits, as in "
                f"{folder.path}",
                GpuError,
            )
        if reason := why_not_shape(loading.spec):
            raise GpuRefusal(reason, GpuError)
        gpu = open_gpu(found, options.gpu, options.vram, report.note)
        if options.timeline is not None:
            gpu = TracedGpu(gpu, options.timeline)
        needs = GpuNeeds(
            spec=loading.spec,
            dense_bytes=loading.weights.n_bytes,
            part_bytes=recipe.expert_format(loading.spec).part_bytes[0],
            n_context=loading.context,
            kv=options.kv_format,
            n_sequences=options.sequences,
        )
        division = needs.divided(gpu, planes, _ram_bytes(loading), gpu.available_bytes())
        if division.n_slots is not None:
            _check_in_part(loading)
        if division.n_planes < planes[0]:
            report.note(
                f"experts at {SYMBOL_BITS * division.n_planes} bits, which fit on {gpu.name}; with "
                f"gpu none the CPU computes at up to {SYMBOL_BITS * planes[0]}"
            )
        return GpuPlace(gpu=gpu, needs=needs, division=division)
    except GpuRefusal as refusal:
        settle(refusal, options.gpu, options.vram, report.note)
        return None


def load_on_gpu(loading: Loading, place: GpuPlace, report: Reporter) -> Runtime | None:
    """Put it there, ready to run: where memory does not do after all, with fewer experts there.

    Returns None where the CPU computes, as place_on_gpu.  Raises what reading raises, and GpuError.
    """
    torch.set_num_threads(1)  # of what is left on the CPU, sampling
    while True:
        with gpu_failures():
            try:
                with shortages():
                    return _attempt(loading, place, report)
            except torch.OutOfMemoryError as e:
                shortage = out_of_memory(e)
        gc.collect()  # what of the attempt refers to itself holds memory as well
        try:
            place = place.with_less(_ram_bytes(loading))
            _check_in_part(loading)
        except GpuRefusal:
            refusal = GpuRefusal(shortage, MemoryBudgetError)
            settle(refusal, loading.options.gpu, loading.options.vram, report.note)
            return None
        report.note(f"{shortage}; trying with fewer experts there")


def _attempt(loading: Loading, place: GpuPlace, report: Reporter) -> Runtime:
    """What one that fails has opened is closed again, but not what was open before."""
    with ExitStack() as closing:
        runtime = _load(replace(loading, closing=closing), place, report)
    loading.closing.callback(runtime.close)
    return replace(runtime, _closing=loading.closing.pop_all())


def _load(loading: Loading, place: GpuPlace, report: Reporter) -> Runtime:
    place.gpu.read_bandwidth()  # measured while there is memory left for it
    if place.division.n_slots is not None:
        return _load_in_part(loading, place, place.division.n_slots, report)
    experts = _experts(loading, place, report)
    there = replace(loading, weights=loading.weights.at(place.gpu.place))
    return _assembled(there, place, experts)


def _experts(loading: Loading, place: GpuPlace, report: Reporter) -> ResidentExperts:
    source, part_bytes = _source(loading, place.division.n_planes)
    return ResidentExperts(
        source, part_bytes, loading.spec.n_experts_by_layer, place.gpu, _progress(report)
    )


def _source(loading: Loading, n_planes: int) -> tuple[ExpertSource, tuple[int, ...]]:
    """Where experts are read from, and the bytes of their parts."""
    folder = loading.opened
    format = folder.recipe.expert_format(loading.spec, n_planes=n_planes)
    parts = folder.recipe.part_names[:n_planes]
    source = FolderExperts(folder, parts, format.part_bytes)
    return traced(source, loading.options.timeline), format.part_bytes


def _decoder(loading: Loading, experts: L, computation: Computation[L]) -> Decoder[L]:
    timeline = loading.options.timeline
    if timeline is not None:
        computation = TracedPasses(computation, timeline)
    return Decoder(spec=loading.spec, store=experts, computation=computation)


def _progress(report: Reporter) -> Progress:
    return lambda done, total: report.step("to the GPU", done, total, "B")


def _assembled(loading: Loading, place: GpuPlace, experts: ResidentExperts) -> Runtime:
    """loading: with its weights on the GPU."""
    computation = GpuComputation(
        loading.spec,
        loading.weights,
        loading.opened.recipe.code,
        experts,
        place.gpu,
        kv=loading.options.kv_format,
        max_tokens=place.division.max_tokens,
        n_context=loading.context,
    )
    return loading.runtime(
        _decoder(loading, experts, computation),
        bits=SYMBOL_BITS * place.division.n_planes,
        isa=CUDA,
        gpu=place.gpu,
    )


# --- what does not fit as a whole


def _check_in_part(loading: Loading) -> None:
    """Raises GpuRefusal where experts are not all there and that does not do."""
    if read_settings().isa == TORCH:
        raise GpuRefusal(
            "some experts have to be computed on the CPU, and LOWMOE_ISA is torch", GpuError
        )
    budget = loading.options.cache_aware_routing
    if budget is not None and not all(map(can_prefer, loading.spec.layers)):
        raise GpuRefusal(
            f"cache_aware_routing is {budget}, and there it is for routers by a softmax without "
            f"biases only, which those of {loading.spec.model_type} are not",
            UsageError,
        )


def _ram_bytes(loading: Loading) -> int:
    """RAM for all that is there once dense weights are on the GPU."""
    ram = loading.options.ram
    if ram is None:
        return available_ram_bytes() + loading.weights.n_bytes
    return ram_budget(ram)


def _load_in_part(loading: Loading, place: GpuPlace, n_slots: int, report: Reporter) -> Runtime:
    report.note(
        f"{n_slots} of {loading.spec.n_experts_total} experts fit on {place.gpu.name}; "
        f"{_WHERE_OTHERS[loading.options.misses_kind]}."
    )
    isa, pool = cpu.choose_isa(read_settings().isa), new_pool(loading.options.threads)
    on_cpu = _cpu_share(loading, pool, isa)
    experts = _hybrid_experts(loading, place, n_slots, on_cpu, report)
    there = replace(loading, weights=loading.weights.at(place.gpu.place))
    budget = loading.options.cache_aware_routing
    computation = HybridComputation(
        there.spec,
        there.weights,
        there.opened.recipe.code,
        experts,
        place.gpu,
        on_cpu,
        MissSplit(
            there.options.misses_kind,
            Costs(experts.staging.expert_bytes, place.gpu.read_bandwidth()),
        ),
        kv=there.options.kv_format,
        max_tokens=place.division.max_tokens,
        n_context=there.context,
        boost=0.0 if budget is None else boost_of(budget),
        in_turn=enumerate if there.options.timeline is None else there.options.timeline.in_turn,
    )
    return there.runtime(
        _decoder(there, experts, computation),
        bits=SYMBOL_BITS * place.division.n_planes,
        isa=f"{CUDA} and {isa}",
        pool=pool,
        gpu=place.gpu,
    )


def _cpu_share(loading: Loading, pool: cpu.Pool, isa: str) -> CpuShare:
    of = (loading.spec, loading.weights, loading.opened.recipe.code, pool)
    timeline = loading.options.timeline
    if timeline is None:
        return CpuShare(*of, isa=isa, max_tokens=MOST_ON_CPU)
    return TracedCpuShare(*of, timeline, isa=isa, max_tokens=MOST_ON_CPU)


def _hybrid_experts(
    loading: Loading, place: GpuPlace, n_slots: int, on_cpu: CpuShare, report: Reporter
) -> HybridExperts:
    """Those that fit on the GPU, RAM for the others."""
    source, part_bytes = _source(loading, place.division.n_planes)
    coarse = coarse_first(loading, part_bytes)
    of_misses = part_bytes if coarse is None else part_bytes[: coarse.n_first]
    n_experts, total = loading.spec.n_experts_by_layer, loading.spec.n_experts_total
    popularity = loading.popularity()
    ring_bytes = PinnedRing.needed_bytes(sum(part_bytes))
    # Dense weights are on the GPU, so RAM's speed is measured by memory of its own.
    budget = _ram_bytes(loading) - on_cpu.working_bytes - PROBE_BYTES - ring_bytes
    ram = open_store(
        source,
        loading.options.timeline,
        ram_budget_bytes=budget,
        n_experts_total=total,
        popularity=popularity,
        coarse=coarse,
        computes=False,
    )
    loading.closing.enter_context(ram)
    promise_ram(ram)
    ring = PinnedRing(place.gpu, sum(part_bytes))
    loading.closing.callback(ring.close)
    slots = GpuSlots(part_bytes, n_experts, place.gpu, ring, n_slots=n_slots, popularity=popularity)
    slots.fill(source, _progress(report))
    staging = Staging(of_misses, max(n_experts), place.gpu, ring)
    return HybridExperts(
        slots=slots,
        staging=staging,
        ring=ring,
        ram=ram,
        n_experts_total=total,
        note=report.note,
        uses=Uses(n_experts),
    )
