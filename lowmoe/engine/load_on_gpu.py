"""Puts a whole model of planes on a GPU, if there is one that can hold it.

Knows:        which parts go there, in which order.
Ignorant of:  which GPU, what fits on it: see gpu.py.
"""

from dataclasses import dataclass, replace

import torch

from lowmoe.decoder.decoder import Decoder
from lowmoe.decoder.gpu_buffers import why_not_shape
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
from lowmoe.engine.machine import PROBE_BYTES
from lowmoe.engine.report import Reporter
from lowmoe.engine.runtime import Loading, Runtime
from lowmoe.errors import GpuError
from lowmoe.experts.resident import ResidentExperts
from lowmoe.experts.source import FolderExperts
from lowmoe.kernels import cpu
from lowmoe.kernels.gpu import Gpu
from quant.layout import SYMBOL_BITS

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
        if find_gpu(options.gpu) is None:
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
        gpu = open_gpu(options.gpu, options.vram, report.note)
        assert gpu is not None
        needs = GpuNeeds(
            spec=loading.spec,
            dense_bytes=loading.weights.n_bytes,
            part_bytes=recipe.expert_format(loading.spec).part_bytes[0],
            n_context=loading.context,
            kv=options.kv_format,
        )
        division = needs.divided(gpu, planes)
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
    """Put all of it there, ready to run.  Raises what reading raises, and as gpu_memory."""
    torch.set_num_threads(1)  # of what is left on the CPU, sampling
    with gpu_memory():
        place.gpu.read_bandwidth()  # measured while there is memory left for it
        experts = _experts(loading, place, report)
        return _assembled(
            replace(loading, weights=loading.weights.at(place.gpu.place)), place, experts
        )


def _experts(loading: Loading, place: GpuPlace, report: Reporter) -> ResidentExperts:
    folder, n_planes = loading.opened, place.division.n_planes
    format = folder.recipe.expert_format(loading.spec, n_planes=n_planes)
    parts = folder.recipe.part_names[:n_planes]
    return ResidentExperts(
        FolderExperts(folder, parts, format.part_bytes),
        format.part_bytes,
        [layer.feed_forward.n_experts for layer in loading.spec.layers],
        place.gpu,
        lambda done, total: report.step("to the GPU", done, total, "B"),
    )


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
