"""Assembles a model from a folder or a checkpoint: spec, weights, store, kernels, text.

Knows:        which parts make a running model, how memory is divided among them.
Ignorant of:  names and downloads; tokens and sampling.
"""

from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from lowmoe.checkpoint.files import ALIGNMENT
from lowmoe.checkpoint.folder import ModelFolder
from lowmoe.decoder.abilities import lacking
from lowmoe.decoder.computation import Computation
from lowmoe.decoder.decoder import Decoder
from lowmoe.decoder.in_torch import TorchComputation
from lowmoe.decoder.native import ABLE, NativeComputation
from lowmoe.decoder.open_checkpoint import open_checkpoint
from lowmoe.decoder.preference import Preference
from lowmoe.decoder.traced import Layered, TracedLayers
from lowmoe.decoder.weights import CheckpointTensors, from_checkpoint, from_folder
from lowmoe.engine.coarse import coarse_first
from lowmoe.engine.gpu import AUTO, NONE
from lowmoe.engine.load_on_gpu import load_on_gpu, place_on_gpu
from lowmoe.engine.load_options import DTYPES, TORCH, LoadOptions
from lowmoe.engine.machine import PROBE_BYTES, new_pool, physical_cores
from lowmoe.engine.memory import available_ram_bytes, promise_ram, ram_budget
from lowmoe.engine.report import Reporter, SilentReporter
from lowmoe.engine.runtime import Loading, Runtime
from lowmoe.engine.text_parts import TextParts
from lowmoe.errors import UsageError
from lowmoe.experts.source import CheckpointExperts, CoarseFirst, ExpertSource, FolderExperts
from lowmoe.experts.store import N_READERS, ExpertStore
from lowmoe.experts.traced import open_store, traced
from lowmoe.experts.uses import Uses
from lowmoe.families import read_config
from lowmoe.kernels import cpu
from lowmoe.kernels.reference import ReferenceKernels
from lowmoe.settings import read_settings
from lowmoe.spec import ModelSpec, SparseMixerRouter
from quant.expert import ExpertFormat
from quant.layout import SYMBOL_BITS, round_up

DEFAULT_CONTEXT = 8192
# Tokens of a prompt that pass through the model at once: enough that an expert's words are decoded
# for many, few enough for a quick interruption, and for torch's temporaries.
NATIVE_CHUNK, TORCH_CHUNK = 512, 256
# Of activations and cache where torch multiplies quantized weights: it does so in float32 anyway.
FOLDER_DTYPE = torch.float32


def load_folder(path: Path, options: LoadOptions, report: Reporter | None = None) -> Runtime:
    """A model folder, ready to run."""
    if options.dtype is not None:
        raise UsageError(
            f"dtype is for checkpoints, but {path} is a quantized model folder. Leave it out."
        )
    report = report or SilentReporter()
    with ExitStack() as closing:
        folder = closing.enter_context(ModelFolder(path))
        family = read_config(folder.manifest.config)
        loading = Loading(
            spec=family.spec,
            weights=from_folder(folder, family.spec),
            context=_context(family.spec, options),
            text=TextParts(folder.small_file),
            folder=folder,
            options=options,
            closing=closing,
        )
        place = place_on_gpu(loading, _planes_asked(folder, options), report)
        runtime = None if place is None else load_on_gpu(loading, place, report)
        return _on_cpu(loading, report) if runtime is None else runtime


def load_checkpoint(path: Path, options: LoadOptions) -> Runtime:
    """A checkpoint, unquantized, its experts read from the checkpoint as they are needed."""
    assert options.dtype is not None
    if options.miss_planes is not None:
        raise UsageError(
            f"miss_planes is {options.miss_planes}, but dtype runs unquantized weights, which have "
            "no planes. Leave out one of them."
        )
    if options.bits != "auto":
        raise UsageError(f"dtype runs unquantized weights, but bits is {options.bits}. Give one.")
    if options.gpu not in (AUTO, NONE) or options.vram is not None:
        raise UsageError(
            f"dtype runs unquantized weights, which the CPU computes, but gpu is {options.gpu!r} "
            f"and vram {options.vram!r}. Leave out dtype or both of them."
        )
    dtype = DTYPES[options.dtype]
    checkpoint = open_checkpoint(path)
    files, family = checkpoint.files, checkpoint.family
    source = CheckpointExperts(files, family, dtype)
    with ExitStack() as closing:
        loading = Loading(
            spec=family.spec,
            weights=from_checkpoint(CheckpointTensors(files, family), dtype),
            context=_context(family.spec, options),
            text=TextParts(checkpoint.small_file),
            folder=None,
            options=options,
            closing=closing,
        )
        how = _in_torch(loading, source.format, dtype)
        division = _divide(loading, how.computation)
        reading = N_READERS * source.reading_bytes
        division = replace(division, experts=division.experts - reading)
        return _with_store(loading, how, division, source, bits=dtype.itemsize * 8)


# --- on the CPU


def _on_cpu(loading: Loading, report: Reporter) -> Runtime:
    folder = loading.opened
    how = _choose_computation(loading, report)
    division = _divide(loading, how.computation)
    format, parts = _choose_planes(loading, division.experts)
    source = FolderExperts(folder, parts, format.part_bytes)
    coarse = coarse_first(loading, format.part_bytes)
    return _with_store(loading, how, division, source, coarse=coarse, bits=_bits(folder, format))


@dataclass(frozen=True, slots=True, kw_only=True)
class _How:
    """A computation, and what to say of it."""

    computation: Layered
    isa: str
    pool: cpu.Pool | None


def _choose_computation(loading: Loading, report: Reporter) -> _How:
    """Native code where it can compute such a model and reads all its planes; else torch."""
    folder, options = loading.opened, loading.options
    recipe, forced = folder.recipe, read_settings().isa
    if recipe.format != "trellis" or forced == TORCH:
        return _in_torch(loading, recipe.expert_format(loading.spec), FOLDER_DTYPE)
    if lacks := lacking(loading.spec, ABLE):
        report.note(
            f"torch computes this model, many times slower than native code, which has no "
            f"{', '.join(lacks)} yet"
        )
        return _in_torch(loading, recipe.expert_format(loading.spec), FOLDER_DTYPE)
    if recipe.code.window_bits > cpu.WINDOW_BITS:
        raise UsageError(
            f"{folder.path} has codes with windows of {recipe.code.window_bits} bits, but this "
            f"version's kernels read {cpu.WINDOW_BITS}. Make it again from its checkpoint."
        )
    isa = cpu.choose_isa(forced)
    # What torch still does, sampling, is small; its threads would spin on the cores that ours are
    # pinned to for milliseconds after each of its operations.
    torch.set_num_threads(1)
    if options.threads is not None and options.threads > physical_cores():
        report.note(
            f"{options.threads} threads wait for each other on {physical_cores()} cores: slower "
            f"than {physical_cores()}"
        )
    pool = new_pool(options.threads)
    computation = NativeComputation(
        loading.spec,
        loading.weights,
        recipe.code,
        pool,
        isa=isa,
        kv=options.kv_format,
        max_tokens=max(min(NATIVE_CHUNK, loading.context), options.sequences),
        n_context=loading.context,
        n_sequences=options.sequences,
        preference=_preference(loading),
    )
    return _How(computation=computation, isa=isa, pool=pool)


def _preference(loading: Loading) -> Preference | None:
    """Raises UsageError for a router that knows no likelihoods."""
    budget = loading.options.cache_aware_routing
    if budget is None:
        return None
    if any(isinstance(of.feed_forward.router, SparseMixerRouter) for of in loading.spec.layers):
        raise UsageError(
            f"cache_aware_routing is {budget}, but routers of {loading.spec.model_type} compare no "
            "likelihoods. Leave it out."
        )
    return Preference(loading.spec, budget)


def _in_torch(loading: Loading, format: ExpertFormat, dtype: torch.dtype) -> _How:
    options = loading.options
    if options.kv is not None:
        raise UsageError(
            f"kv is {options.kv}, but only native code, for folders of planes, has a choice of "
            "caches, and torch computes here. Leave it out."
        )
    torch.set_num_threads(options.threads or physical_cores())
    computation = TorchComputation(
        spec=loading.spec,
        weights=loading.weights,
        format=format,
        kernels=ReferenceKernels(),
        dtype=dtype,
        max_tokens=max(min(TORCH_CHUNK, loading.context), options.sequences),
        n_context=loading.context,
        preference=_preference(loading),
    )
    return _How(computation=computation, isa=TORCH, pool=None)


def _with_store(
    loading: Loading,
    how: _How,
    division: "_Division",
    source: ExpertSource,
    *,
    coarse: CoarseFirst | None = None,
    bits: int,
) -> Runtime:
    spec = loading.spec
    timeline = loading.options.timeline
    store = open_store(
        traced(source, timeline),
        timeline,
        ram_budget_bytes=division.experts,
        n_experts_total=spec.n_experts_total,
        popularity=loading.popularity(),
        coarse=coarse,
        uses=Uses(spec.n_experts_by_layer),
        computes=True,
    )
    loading.closing.enter_context(store)
    promise_ram(store)
    computation: Computation[ExpertStore] = how.computation
    if timeline is not None:
        computation = TracedLayers(how.computation, len(spec.layers), timeline)
    return loading.runtime(
        Decoder(spec=spec, store=store, computation=computation),
        bits=bits,
        isa=how.isa,
        pool=how.pool,
        probe=division.probe,
    )


def _bits(folder: ModelFolder, format: ExpertFormat) -> int:
    recipe = folder.recipe
    if recipe.format == "trellis":
        return SYMBOL_BITS * len(format.part_bytes)
    return 4 if recipe.dense_dtype is None else recipe.dense_dtype.itemsize * 8


def _planes_asked(folder: ModelFolder, options: LoadOptions) -> list[int]:
    """How many planes experts may be computed at, the best first."""
    recipe, most = folder.recipe, len(folder.recipe.part_names)
    if options.bits == "auto":
        return list(range(most, 0, -1))
    if recipe.format != "trellis":
        raise UsageError(
            f"bits is {options.bits}, but {folder.path} holds {recipe.format} experts, which "
            "have one width. Leave it out."
        )
    n_planes = int(options.bits) // SYMBOL_BITS
    if n_planes > most:
        raise UsageError(
            f"bits is {options.bits}, but {folder.path} holds {SYMBOL_BITS * most} bits "
            f"a weight. Make it again with --bits {options.bits}, or ask for fewer."
        )
    return [n_planes]


def _choose_planes(loading: Loading, budget: int) -> tuple[ExpertFormat, tuple[str, ...]]:
    """As many planes as were asked for; else the most whose experts all fit in RAM, or one."""
    folder, spec = loading.opened, loading.spec
    recipe = folder.recipe
    asked = _planes_asked(folder, loading.options)
    if recipe.format != "trellis":
        return recipe.expert_format(spec), recipe.part_names
    fitting = (
        n
        for n in asked
        if _bytes_in_ram(recipe.expert_format(spec, n_planes=n)) * spec.n_experts_total <= budget
    )
    n_planes = next(fitting, asked[-1])
    return recipe.expert_format(spec, n_planes=n_planes), recipe.part_names[:n_planes]


def _bytes_in_ram(expert: ExpertFormat) -> int:
    return sum(round_up(n_bytes, ALIGNMENT) for n_bytes in expert.part_bytes)


def _context(spec: ModelSpec, options: LoadOptions) -> int:
    if options.context is None:
        return min(spec.context_length, DEFAULT_CONTEXT)
    if options.context > spec.context_length:
        raise UsageError(
            f"context is {options.context} tokens, but this model was made for "
            f"{spec.context_length}, or only so many are implemented. Give at most that."
        )
    return options.context


@dataclass(frozen=True, slots=True, kw_only=True)
class _Division:
    """RAM beside dense weights and cache.  experts: bytes; probe: see Runtime."""

    experts: int
    probe: Tensor | None


def _divide(loading: Loading, computation: Computation[ExpertStore]) -> _Division:
    """What was given for the whole model goes to experts, less all its other parts."""
    ram, weights = loading.options.ram, loading.weights.largest_piece()
    cache = loading.options.sequences * computation.cache_bytes(loading.context)
    working = computation.working_bytes
    if ram is None:
        # Dense weights are already in RAM; what little fits into a cache says nothing of its speed.
        if weights.numel() >= PROBE_BYTES:
            return _Division(experts=available_ram_bytes() - cache - working, probe=weights)
        experts = available_ram_bytes() - cache - working - PROBE_BYTES
        return _Division(experts=experts, probe=None)
    whole = ram_budget(ram)
    return _Division(experts=whole - loading.weights.n_bytes - cache - working, probe=weights)
