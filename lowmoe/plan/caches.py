"""How many conversations a server should have caches for, said before a model is loaded.

Knows:        what a cache of a whole context takes, of which memory.
Ignorant of:  who asks, how answers are decoded together.
"""

from dataclasses import dataclass

from lowmoe.decoder.state_cache import states_bytes
from lowmoe.engine.gpu import GpuRefusal, find_gpu
from lowmoe.engine.load import DEFAULT_CONTEXT
from lowmoe.engine.load_options import MOST_SEQUENCES, LoadOptions
from lowmoe.engine.memory import available_ram_bytes, parse_budget, ram_budget
from lowmoe.plan.sizes import kv_bytes_per_token
from lowmoe.spec import ModelSpec

# What caches may take of the memory that experts want too. A model that does not fit loses so much
# of its hits at most, while a second conversation costs little beside the steps of the first.
SHARE = 1 / 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Caches:
    """n: conversations; cache_bytes: of each, of a whole context."""

    n: int
    cache_bytes: int


def advised_caches(spec: ModelSpec, options: LoadOptions) -> Caches:
    """As many as can be decoded together, or as fit into SHARE of the memory they live in; at least
    one.
    """
    context = options.context or min(DEFAULT_CONTEXT, spec.context_length)
    cache_bytes = kv_bytes_per_token(spec, options.kv_format) * context + states_bytes(spec)
    n_fitting = int(SHARE * _memory_bytes(options)) // max(1, cache_bytes)
    return Caches(n=max(1, min(MOST_SEQUENCES, n_fitting)), cache_bytes=cache_bytes)


def _memory_bytes(options: LoadOptions) -> int:
    """Of the GPU, if one computes; else RAM."""
    try:
        found = find_gpu(options.gpu)
    except GpuRefusal:  # loading says so
        found = None
    if found is not None:
        whole = found.limit_bytes or found.card.memory_bytes
        if options.vram is None:
            return whole
        return min(whole, parse_budget(options.vram, name="vram", whole_bytes=whole))
    if options.ram is None:
        return available_ram_bytes()
    return ram_budget(options.ram)
