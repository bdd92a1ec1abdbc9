"""What a user may say about how a model is run.

Knows:        which values make sense, and on which machines.
Ignorant of:  models, how they are loaded.
"""

from dataclasses import dataclass

import torch

from lowmoe.engine.gpu import AUTO, check_gpu
from lowmoe.errors import UsageError
from lowmoe.experts.split import MISSES, Misses
from lowmoe.kernels import cpu
from lowmoe.timeline import Timeline

DEFAULT_KV: cpu.KvFormat = "float16"
MAX_THREADS = 1024
# Whose tokens are decoded together: as many as the products of few tokens take at once, on the CPU
# (kernels/cpu/trellis_tile.h) and on a GPU (MOST_DECODED in cuda_ext/ops.py).
MOST_SEQUENCES = 8
TORCH = "torch"  # what LOWMOE_ISA says to have no native code
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """How to run a model.  None, or "auto", leaves the choice to us.

    gpu: "auto", "none" or a card's name; bits: 2, 4, 6 or "auto"; ram, vram: sizes like "24GiB", of
    the machine's memory and the GPU's; threads: of computation; context: tokens; kv: how keys and
    values are kept, "float16", "int8" or "float32", for folders of planes; dtype: of unquantized
    weights, for checkpoints only; sequences: conversations whose tokens are decoded together, each
    with a cache of its own; misses: where experts are computed that a GPU has no room for, on
    the CPU ("cpu"), on the GPU, where they pass through ("page"), or where it is faster as this
    run measures it ("auto"). Of a prompt, "cpu" brings those that have many tokens. timeline: is
    told when everything begins and ends. What trades quality for speed, None for not to:
    cache_aware_routing: see lowmoe/decoder/preference.py; miss_planes: how many planes are read of
    an expert that is not in RAM, until it is wanted again.
    """

    gpu: str = AUTO
    bits: int | str = "auto"
    ram: str | int | None = None
    vram: str | int | None = None
    threads: int | None = None
    context: int | None = None
    kv: str | None = None
    dtype: str | None = None
    sequences: int = 1
    misses: str = "auto"
    timeline: Timeline | None = None
    cache_aware_routing: float | None = None
    miss_planes: int | None = None

    def __post_init__(self) -> None:
        if self.bits not in ("auto", 2, 4, 6):
            raise UsageError(f"bits is {self.bits!r}, but must be 2, 4, 6 or auto.")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise UsageError(f"dtype is {self.dtype!r}, but must be one of {', '.join(DTYPES)}.")
        if self.kv is not None and self.kv not in cpu.KV_FORMATS:
            raise UsageError(f"kv is {self.kv!r}, but must be one of {', '.join(cpu.KV_FORMATS)}.")
        if self.misses not in MISSES:
            raise UsageError(f"misses is {self.misses!r}, but must be one of {', '.join(MISSES)}.")
        if self.threads is not None and self.threads > MAX_THREADS:
            raise UsageError(f"threads is {self.threads}, but must be at most {MAX_THREADS}.")
        counts = ("threads", self.threads), ("context", self.context)
        for name, value in (*counts, ("miss_planes", self.miss_planes)):
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}, but must be at least 1.")
        if not 1 <= self.sequences <= MOST_SEQUENCES:
            raise UsageError(f"sequences is {self.sequences}, but must be 1 to {MOST_SEQUENCES}.")
        budget = self.cache_aware_routing
        if budget is not None and not 0 < budget < 1:
            raise UsageError(
                f"cache_aware_routing is {budget}, but must be above 0 and below 1, such as 0.1."
            )
        check_gpu(self.gpu, self.vram)

    @property
    def trades(self) -> tuple[str, ...]:
        """What of it trades quality for speed, in words."""
        budget, n_planes = self.cache_aware_routing, self.miss_planes
        found = [] if budget is None else [f"cache-aware routing within {budget:.0%}"]
        if n_planes is not None:
            found.append(f"misses at {n_planes} plane{'s' * (n_planes > 1)}")
        return tuple(found)

    @property
    def kv_format(self) -> cpu.KvFormat:
        """The format that `kv` names, or the default."""
        return next((kv for kv in cpu.KV_FORMATS if kv == self.kv), DEFAULT_KV)

    @property
    def misses_kind(self) -> Misses:
        """The one that `misses` names."""
        return next(kind for kind in MISSES if kind == self.misses)
