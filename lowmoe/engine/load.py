"""Assembles a model from a folder or a checkpoint: spec, weights, store, kernels, text.

Knows:        which parts make a running model, how memory is divided among them.
Ignorant of:  names and downloads; tokens and sampling.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from lowmoe.checkpoint.files import ALIGNMENT
from lowmoe.checkpoint.folder import ModelFolder
from lowmoe.checkpoint.reader import Checkpoint
from lowmoe.decoder.abilities import lacking
from lowmoe.decoder.computation import Computation
from lowmoe.decoder.decoder import Decoder
from lowmoe.decoder.in_torch import TorchComputation
from lowmoe.decoder.native import ABLE, NativeComputation
from lowmoe.decoder.weights import CheckpointTensors, DenseWeights, from_checkpoint, from_folder
from lowmoe.engine.machine import PROBE_BYTES, new_pool, physical_cores
from lowmoe.engine.memory import available_ram_bytes, parse_budget, total_ram_bytes
from lowmoe.engine.report import Reporter, SilentReporter
from lowmoe.engine.text_parts import TextParts
from lowmoe.errors import UsageError
from lowmoe.experts.source import CheckpointExperts, ExpertSource, FolderExperts
from lowmoe.experts.store import ExpertStore
from lowmoe.families import Family, read_config
from lowmoe.kernels import cpu
from lowmoe.kernels.reference import ReferenceKernels
from lowmoe.settings import read_settings
from lowmoe.spec import ModelSpec
from quant.expert import ExpertFormat
from quant.layout import SYMBOL_BITS, round_up

DEFAULT_CONTEXT = 8192
# Tokens of a prompt that pass through the model at once: enough that an expert's words are decoded
# for many, few enough for a quick interruption, and for torch's temporaries.
NATIVE_CHUNK, TORCH_CHUNK = 512, 256
DEFAULT_KV: cpu.KvFormat = "float16"
# Of activations and cache where torch multiplies quantized weights: it does so in float32 anyway.
FOLDER_DTYPE = torch.float32
MAX_THREADS = 1024
TORCH = "torch"  # what LOWMOE_ISA says to have no native code
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """How to run a model.  None, or "auto", leaves the choice to us.

    gpu: "auto", "none" or a card's name; bits: 2, 4, 6 or "auto"; ram, vram: sizes like "24GiB";
    threads: of computation; context: tokens; kv: how keys and values are kept, "float16", "int8" or
    "float32", for folders of planes; dtype: of unquantized weights, for checkpoints only.
    """

    gpu: str = "auto"
    bits: int | str = "auto"
    ram: str | int | None = None
    vram: str | int | None = None
    threads: int | None = None
    context: int | None = None
    kv: str | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        if self.bits not in ("auto", 2, 4, 6):
            raise UsageError(f"bits is {self.bits!r}, but must be 2, 4, 6 or auto.")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise UsageError(f"dtype is {self.dtype!r}, but must be one of {', '.join(DTYPES)}.")
        if self.kv is not None and self.kv not in cpu.KV_FORMATS:
            raise UsageError(f"kv is {self.kv!r}, but must be one of {', '.join(cpu.KV_FORMATS)}.")
        if self.threads is not None and self.threads > MAX_THREADS:
            raise UsageError(f"threads is {self.threads}, but must be at most {MAX_THREADS}.")
        for name, value in (("threads", self.threads), ("context", self.context)):
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}, but must be at least 1.")
        self._check_gpu()

    @property
    def kv_format(self) -> cpu.KvFormat:
        """The format that `kv` names, or the default."""
        return next((kv for kv in cpu.KV_FORMATS if kv == self.kv), DEFAULT_KV)

    def _check_gpu(self) -> None:
        if self.vram is not None:
            raise UsageError(
                "vram is given, but this version computes on the CPU only. Leave it out."
            )
        if self.gpu in ("auto", "none"):
            return
        found = (
            f"found {torch.cuda.get_device_name()}, but this version has no CUDA kernels yet"
            if torch.cuda.is_available()
            else "no CUDA device was found"
        )
        raise UsageError(f"gpu is {self.gpu!r}, but {found}. Run on the CPU with gpu none.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """A model in memory.  bits: what experts are computed at, 2, 4, 6 or the dtype's 16 or 32.

    n_context: tokens a conversation may have; working_bytes: RAM set aside for temporaries, of
    which a given budget has no more; dense_bytes_per_token: read for every token; isa: of the
    native code that computes, or torch; pool: its threads; folder: None for a checkpoint.
    """

    spec: ModelSpec
    decoder: Decoder
    store: ExpertStore
    text: TextParts
    bits: int
    n_context: int
    dense_bytes: int
    dense_bytes_per_token: int
    working_bytes: int
    isa: str
    pool: cpu.Pool | None
    folder: ModelFolder | None
    _closing: ExitStack

    def close(self) -> None:
        """Give memory, files and threads back."""
        self._closing.close()


def load_folder(path: Path, options: LoadOptions, report: Reporter | None = None) -> Runtime:
    """A model folder, ready to run.  report: hears what computes it where that is slow."""
    report = report or SilentReporter()
    if options.dtype is not None:
        raise UsageError(
            f"dtype is for checkpoints, but {path} is a quantized model folder. Leave it out."
        )
    with ExitStack() as closing:
        folder = closing.enter_context(ModelFolder(path))
        family = read_config(folder.manifest.config)
        weights = from_folder(folder, family.spec)
        context = _context(family.spec, options)
        how = _choose_computation(folder, family.spec, weights, context, options, report)
        division = _divide(weights, context, how.computation, options)
        format, parts = _choose_planes(folder, family.spec, division.experts, options)
        return _assemble(
            family=family,
            weights=weights,
            source=FolderExperts(folder, parts, format.part_bytes),
            how=how,
            division=division,
            context=context,
            text=TextParts(folder.small_file),
            bits=_bits(folder, format),
            folder=folder,
            closing=closing,
        )


def load_checkpoint(path: Path, options: LoadOptions) -> Runtime:
    """A checkpoint, unquantized, its experts read from the checkpoint as they are needed."""
    assert options.dtype is not None
    if options.bits != "auto":
        raise UsageError(f"dtype runs unquantized weights, but bits is {options.bits}. Give one.")
    dtype = DTYPES[options.dtype]
    checkpoint = Checkpoint(path)
    family = read_config(checkpoint.config)
    weights = from_checkpoint(CheckpointTensors(checkpoint, family), dtype)
    source = CheckpointExperts(checkpoint, family, dtype)
    context = _context(family.spec, options)
    how = _in_torch(family.spec, weights, source.format, dtype, context, options)
    with ExitStack() as closing:
        return _assemble(
            family=family,
            weights=weights,
            source=source,
            how=how,
            division=_divide(weights, context, how.computation, options),
            context=context,
            text=TextParts(lambda name: _optional_file(path / name)),
            bits=dtype.itemsize * 8,
            folder=None,
            closing=closing,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _How:
    """A computation, and what to say of it."""

    computation: Computation
    isa: str
    pool: cpu.Pool | None


def _choose_computation(
    folder: ModelFolder,
    spec: ModelSpec,
    weights: DenseWeights,
    context: int,
    options: LoadOptions,
    report: Reporter,
) -> _How:
    """Native code where it can compute such a model and reads its planes; else torch."""
    recipe, forced = folder.recipe, read_settings().isa
    lacks = lacking(spec, ABLE)
    if lacks:
        report.note(
            f"torch computes this model, many times slower than native code, which has no "
            f"{', '.join(lacks)} yet"
        )
    if recipe.format != "trellis" or forced == TORCH or lacks:
        format = recipe.expert_format(spec)
        return _in_torch(spec, weights, format, FOLDER_DTYPE, context, options)
    if recipe.code.window_bits > cpu.WINDOW_BITS:
        raise UsageError(
            f"{folder.path} has codes with windows of {recipe.code.window_bits} bits, but this "
            f"version's kernels read {cpu.WINDOW_BITS}. Make it again from its checkpoint."
        )
    isa = cpu.choose_isa(forced)
    # What torch still does, sampling, is small; its threads would spin on the cores that ours are
    # pinned to for milliseconds after each of its operations.
    torch.set_num_threads(1)
    pool = new_pool(options.threads)
    computation = NativeComputation(
        spec,
        weights,
        recipe.code,
        pool,
        isa=isa,
        kv=options.kv_format,
        max_tokens=min(NATIVE_CHUNK, context),
        n_context=context,
    )
    return _How(computation=computation, isa=isa, pool=pool)


def _in_torch(
    spec: ModelSpec,
    weights: DenseWeights,
    format: ExpertFormat,
    dtype: torch.dtype,
    context: int,
    options: LoadOptions,
) -> _How:
    if options.kv is not None:
        raise UsageError(
            f"kv is {options.kv}, but only native code, for folders of planes, has a choice of "
            "caches, and torch computes here. Leave it out."
        )
    torch.set_num_threads(options.threads or physical_cores())
    computation = TorchComputation(
        spec=spec,
        weights=weights,
        format=format,
        kernels=ReferenceKernels(),
        dtype=dtype,
        max_tokens=min(TORCH_CHUNK, context),
        n_context=context,
    )
    return _How(computation=computation, isa=TORCH, pool=None)


def _assemble(
    *,
    family: Family,
    weights: DenseWeights,
    source: ExpertSource,
    how: _How,
    division: "_Division",
    context: int,
    text: TextParts,
    bits: int,
    folder: ModelFolder | None,
    closing: ExitStack,
) -> Runtime:
    spec = family.spec
    store = closing.enter_context(
        ExpertStore(source, ram_budget_bytes=division.experts, n_experts_total=spec.n_experts_total)
    )
    return Runtime(
        spec=spec,
        decoder=Decoder(spec=spec, store=store, computation=how.computation),
        store=store,
        text=text,
        bits=bits,
        n_context=context,
        dense_bytes=weights.n_bytes,
        dense_bytes_per_token=weights.bytes_per_token,
        working_bytes=division.working,
        isa=how.isa,
        pool=how.pool,
        folder=folder,
        _closing=closing.pop_all(),
    )


def _bits(folder: ModelFolder, format: ExpertFormat) -> int:
    recipe = folder.recipe
    if recipe.format == "trellis":
        return SYMBOL_BITS * len(format.part_bytes)
    return 4 if recipe.dense_dtype is None else recipe.dense_dtype.itemsize * 8


def _choose_planes(
    folder: ModelFolder, spec: ModelSpec, budget: int, options: LoadOptions
) -> tuple[ExpertFormat, tuple[str, ...]]:
    """As many planes as were asked for; else the most whose experts all fit in RAM, or one."""
    recipe = folder.recipe
    parts = recipe.part_names
    if recipe.format != "trellis":
        if options.bits != "auto":
            raise UsageError(
                f"bits is {options.bits}, but {folder.path} holds {recipe.format} experts, which "
                "have one width. Leave it out."
            )
        return recipe.expert_format(spec), parts
    if options.bits == "auto":
        fitting = [
            n
            for n in range(1, len(parts) + 1)
            if _bytes_in_ram(recipe.expert_format(spec, n_planes=n)) * spec.n_experts_total
            <= budget
        ]
        n_planes = max(fitting, default=1)
    else:
        n_planes = int(options.bits) // SYMBOL_BITS
        if n_planes > len(parts):
            raise UsageError(
                f"bits is {options.bits}, but {folder.path} holds {SYMBOL_BITS * len(parts)} bits "
                f"a weight. Make it again with --bits {options.bits}, or ask for fewer."
            )
    return recipe.expert_format(spec, n_planes=n_planes), parts[:n_planes]


def _bytes_in_ram(expert: ExpertFormat) -> int:
    return sum(round_up(n_bytes, ALIGNMENT) for n_bytes in expert.part_bytes)


def _context(spec: ModelSpec, options: LoadOptions) -> int:
    if options.context is None:
        return min(spec.context_length, DEFAULT_CONTEXT)
    if options.context > spec.context_length:
        raise UsageError(
            f"context is {options.context} tokens, but this model was made for "
            f"{spec.context_length}."
        )
    return options.context


@dataclass(frozen=True, slots=True, kw_only=True)
class _Division:
    """RAM beside dense weights and cache, in bytes."""

    experts: int
    working: int


def _divide(
    weights: DenseWeights, context: int, computation: Computation, options: LoadOptions
) -> _Division:
    """What was given for the whole model goes to experts, less all its other parts."""
    cache, working = computation.cache_bytes(context), computation.working_bytes
    if options.ram is None:
        # The probe of RAM and a pass are never at the same time; dense weights are already in RAM.
        working = max(working, PROBE_BYTES)
        return _Division(experts=available_ram_bytes() - cache - working, working=working)
    whole = parse_budget(options.ram, name="ram", whole_bytes=total_ram_bytes())
    return _Division(experts=whole - weights.n_bytes - cache - working, working=working)


def _optional_file(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None
