"""What a model that is loaded should achieve, by the same arithmetic that planned it.

Knows:        how a running model's tiers are asked for their sizes.
Ignorant of:  where predictions are shown.
"""

from dataclasses import dataclass

from lowmoe.cards import CardProfile
from lowmoe.engine.load_options import TORCH, LoadOptions
from lowmoe.engine.machine import PROBE_BYTES, ram_read_bandwidth
from lowmoe.engine.runtime import Runtime
from lowmoe.engine.statistics import RunStatistics
from lowmoe.experts.hybrid import HybridExperts
from lowmoe.experts.store import ExpertStore
from lowmoe.plan.cost import DEFAULT_HANDLING, MissHandling, Places, decode
from lowmoe.plan.here import remember_run, remembered
from lowmoe.plan.machine import DISK_BYTES_PER_S, Machine
from lowmoe.plan.sizes import ModelSizes, model_sizes
from lowmoe.plan.skew import Skew, expected
from lowmoe.settings import Settings
from quant.layout import SYMBOL_BITS

LEAST_TOKENS = 16  # of an answer, for its speed to say something of the machine
# Read for a token, likewise: what fits into caches says nothing of RAM.
LEAST_BYTES = 100 * 10**6


@dataclass(frozen=True, slots=True, kw_only=True)
class Predictor:
    """Tokens a second of decode after so many tokens, in the middle of what texts differ by."""

    sizes: ModelSizes
    machine: Machine
    places: Places
    skew: Skew
    handling: MissHandling = DEFAULT_HANDLING

    def __call__(self, n_cached: int) -> float:
        cost = decode(self.sizes, self.machine, self.places, self.skew, n_cached, self.handling)
        return self.machine.factor / cost.total


def predictor(
    runtime: Runtime, options: LoadOptions, card: CardProfile | None, settings: Settings
) -> Predictor | None:
    """What should come of a model that is loaded.  options: that it was loaded with.

    card: the one that computes, if it has a profile.  None where nobody can say: unquantized
    weights, torch, a card without a profile.
    """
    folder = runtime.folder
    if folder is None or folder.recipe.format != "trellis" or runtime.isa == TORCH:
        return None
    if runtime.gpu is not None and card is None:
        return None
    sizes = model_sizes(
        runtime.spec, folder.recipe, options.kv_format, n_planes=runtime.bits // SYMBOL_BITS
    )
    places = _places(runtime)
    machine = _machine(runtime, sizes, places, card, settings)
    powers = [skew.power for skew in expected(sizes.most_experts)]
    middle = Skew(sum(powers) / len(powers))
    handling = MissHandling(misses=options.misses_kind, n_planes=options.miss_planes)
    return Predictor(sizes=sizes, machine=machine, places=places, skew=middle, handling=handling)


def keep_run(runtime: Runtime, run: RunStatistics, settings: Settings) -> bool:
    """Remember how far a run came of what was predicted, if it was long enough to tell and did
    nothing that is not predicted; whether it was.
    """
    predict, achieved = runtime.predict, run.decode_tokens_per_s
    if run.trades:
        return False
    if not isinstance(predict, Predictor) or achieved is None or run.new_tokens < LEAST_TOKENS:
        return False
    if run.predicted_tokens_per_s is None or predict.sizes.bytes_per_token < LEAST_BYTES:
        return False
    plain = run.predicted_tokens_per_s / predict.machine.factor
    threads = None if runtime.pool is None else runtime.pool.n_threads
    remember_run(settings, threads, plain, achieved)
    return True


def _places(runtime: Runtime) -> Places:
    store, n = runtime.store, runtime.spec.n_experts_total
    if isinstance(store, HybridExperts):
        on_gpu = store.slots.n_slots
        return Places(on_gpu=on_gpu, in_ram=min(n - on_gpu, store.ram.n_slots))
    if isinstance(store, ExpertStore):
        return Places(on_gpu=0, in_ram=min(n, store.n_slots))
    return Places(on_gpu=n, in_ram=0)


def _machine(
    runtime: Runtime,
    sizes: ModelSizes,
    places: Places,
    card: CardProfile | None,
    settings: Settings,
) -> Machine:
    needs_disk = places.on_gpu + places.in_ram < sizes.n_experts
    threads = None if runtime.pool is None else runtime.pool.n_threads
    memo = remembered(settings, threads, with_disk=needs_disk)
    return Machine(
        ram_bytes=0,
        ram_bytes_per_s=_ram_now(runtime) or memo.ram_bytes_per_s,
        disk_bytes_per_s=memo.disk_bytes_per_s or DISK_BYTES_PER_S,
        cpu=memo.cpu,
        card=card if runtime.gpu is not None else None,
        measured=True,
        factor=memo.factor,
    )


def _ram_now(runtime: Runtime) -> float | None:
    """Bytes a second, 20 ms to measure: a virtual machine's RAM may have half the speed it had when
    the machine was measured.  None where that cannot be told of the memory at hand.
    """
    probe = runtime.probe
    if runtime.pool is None or (probe is not None and probe.numel() < PROBE_BYTES):
        return None
    return ram_read_bandwidth(runtime.pool, probe)
