"""Puts a model of planes on a GPU: all of it, or all but the experts that do not fit.

Knows:        which parts go there, in which order.
Ignorant of:  which GPU, what fits on it: see gpu.py.
"""

from dataclasses import dataclass, replace

import torch

from lowmoe.decoder.cpu_share import CpuShare
from lowmoe.decoder.decoder import Decoder
from lowmoe.decoder.gpu_buffers import why_not_shape
from lowmoe.decoder.hybrid import HybridComputation
from lowmoe.decoder.misses import MOST_ON_CPU
from lowmoe.decoder.on_gpu import GpuComputation
from lowmoe.engine.gpu import (
    GpuDivision,
    GpuNeeds,
    GpuRefusal,
    find_gpu,
    gpu_memory,
    open_gpu,
    settle,
)
from lowmoe.engine.load_options import TORCH
from lowmoe.engine.machine import PROBE_BYTES, new_pool
from lowmoe.engine.memory import available_ram_bytes, parse_budget, total_ram_bytes
from lowmoe.engine.report import Reporter
from lowmoe.engine.runtime import Loading, Runtime
from lowmoe.errors import GpuError
from lowmoe.experts.gpu_slots import GpuSlots
from lowmoe.experts.hybrid import HybridExperts
from lowmoe.experts.pinned_ring import PinnedRing
from lowmoe.experts.resident import ResidentExperts
from lowmoe.experts.source import FolderExperts
from lowmoe.experts.split import Costs, Misses, MissSplit
from lowmoe.experts.staging import Staging
from lowmoe.experts.store import ExpertStore
from lowmoe.experts.to_gpu import Progress
from lowmoe.kernels import cpu
from lowmoe.kernels.gpu import Gpu
from lowmoe.settings import read_settings
from quant.layout import SYMBOL_BITS

_WHERE_OTHERS: dict[Misses, str] = {
    "cpu": "the CPU computes the others",
    "page": "the others pass through it",
    "auto": "the others are computed by the CPU or pass through it, whichever is faster",
}
CUDA = "cuda"  # what computes there, where others name the CPU's instruction set


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuPlace:
    """A GPU with room for a model."""

    gpu: Gpu
    division: GpuDivision


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
        needs = GpuNeeds(
            spec=loading.spec,
            dense_bytes=loading.weights.n_bytes,
            part_bytes=recipe.expert_format(loading.spec).part_bytes[0],
            n_context=loading.context,
            kv=options.kv_format,
        )
        division = needs.divided(gpu, planes, _ram_bytes(loading))
        if division.n_slots is not None and read_settings().isa == TORCH:
            raise GpuRefusal(
                "some experts have to be computed on the CPU, and LOWMOE_ISA is torch", GpuError
            )
        if division.n_planes < planes[0]:
            report.note(
                f"experts at {SYMBOL_BITS * division.n_planes} bits, which fit on {gpu.name}; with "
                f"gpu none the CPU computes at up to {SYMBOL_BITS * planes[0]}"
            )
        return GpuPlace(gpu=gpu, division=division)
    except GpuRefusal as refusal:
        settle(refusal, options.gpu, options.vram, report.note)
        return None


def load_on_gpu(loading: Loading, place: GpuPlace, report: Reporter) -> Runtime:
    """Put it there, ready to run.  Raises what reading raises, and as gpu_memory."""
    torch.set_num_threads(1)  # of what is left on the CPU, sampling
    with gpu_memory():
        place.gpu.read_bandwidth()  # measured while there is memory left for it
        if place.division.n_slots is not None:
            return _load_in_part(loading, place, place.division.n_slots, report)
        experts = _experts(loading, place, report)
        return _assembled(
            replace(loading, weights=loading.weights.at(place.gpu.place)), place, experts
        )


def _experts(loading: Loading, place: GpuPlace, report: Reporter) -> ResidentExperts:
    source, part_bytes = _source(loading, place.division.n_planes)
    return ResidentExperts(
        source, part_bytes, loading.spec.n_experts_by_layer, place.gpu, _progress(report)
    )


def _source(loading: Loading, n_planes: int) -> tuple[FolderExperts, tuple[int, ...]]:
    """Where experts are read from, and the bytes of their parts."""
    folder = loading.opened
    format = folder.recipe.expert_format(loading.spec, n_planes=n_planes)
    parts = folder.recipe.part_names[:n_planes]
    return FolderExperts(folder, parts, format.part_bytes), format.part_bytes


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
        Decoder(spec=loading.spec, store=experts, computation=computation),
        bits=SYMBOL_BITS * place.division.n_planes,
        working_bytes=PROBE_BYTES,
        isa=CUDA,
        gpu=place.gpu,
    )


# --- what does not fit as a whole


def _ram_bytes(loading: Loading) -> int:
    """RAM for all that is there once dense weights are on the GPU."""
    ram = loading.options.ram
    if ram is None:
        return available_ram_bytes() + loading.weights.n_bytes
    return parse_budget(ram, name="ram", whole_bytes=total_ram_bytes())


def _load_in_part(loading: Loading, place: GpuPlace, n_slots: int, report: Reporter) -> Runtime:
    report.note(
        f"{n_slots} of {loading.spec.n_experts_total} experts fit on {place.gpu.name}; "
        f"{_WHERE_OTHERS[loading.options.misses_kind]}."
    )
    isa, pool = cpu.choose_isa(read_settings().isa), new_pool(loading.options.threads)
    on_cpu = CpuShare(
        loading.spec,
        loading.weights,
        loading.opened.recipe.code,
        pool,
        isa=isa,
        max_tokens=MOST_ON_CPU,
    )
    experts, working_bytes = _hybrid_experts(loading, place, n_slots, on_cpu, report)
    there = replace(loading, weights=loading.weights.at(place.gpu.place))
    computation = HybridComputation(
        there.spec,
        there.weights,
        there.opened.recipe.code,
        experts,
        place.gpu,
        on_cpu,
        MissSplit(
            there.options.misses_kind, Costs(experts.expert_bytes, place.gpu.read_bandwidth())
        ),
        kv=there.options.kv_format,
        max_tokens=place.division.max_tokens,
        n_context=there.context,
    )
    return there.runtime(
        Decoder(spec=there.spec, store=experts, computation=computation),
        bits=SYMBOL_BITS * place.division.n_planes,
        working_bytes=working_bytes,
        isa=f"{CUDA} and {isa}",
        pool=pool,
        gpu=place.gpu,
    )


def _hybrid_experts(
    loading: Loading, place: GpuPlace, n_slots: int, on_cpu: CpuShare, report: Reporter
) -> tuple[HybridExperts, int]:
    """Those that fit on the GPU, RAM for the others; and the bytes of RAM that are not for them."""
    source, part_bytes = _source(loading, place.division.n_planes)
    n_experts, total = loading.spec.n_experts_by_layer, loading.spec.n_experts_total
    ring_bytes = PinnedRing.needed_bytes(sum(part_bytes))
    # The probe of RAM and a pass are never at the same time.
    working_bytes = max(on_cpu.working_bytes, PROBE_BYTES)
    budget = _ram_bytes(loading) - working_bytes - ring_bytes
    ram = loading.closing.enter_context(
        ExpertStore(source, ram_budget_bytes=budget, n_experts_total=total)
    )
    ring = PinnedRing(place.gpu, sum(part_bytes))
    loading.closing.callback(ring.close)
    slots = GpuSlots(part_bytes, n_experts, place.gpu, ring, n_slots=n_slots)
    slots.fill(source, _progress(report))
    staging = Staging(part_bytes, max(n_experts), place.gpu, ring)
    experts = HybridExperts(slots=slots, staging=staging, ring=ring, ram=ram, n_experts_total=total)
    return experts, working_bytes
