"""How long a token takes: plain arithmetic, each number beside its source.

Decode reads every weight it uses once, so it lasts as long as its bytes take to come, or to be
decoded, where they live; tiers work side by side. A prompt reads each expert once for a whole chunk
of tokens, and multiplies.

Knows:        what overlaps with what, what is lost between layers.
Ignorant of:  where the numbers of a machine come from; what a user sees.
"""

from dataclasses import dataclass, replace

from lowmoe.experts.split import Misses
from lowmoe.experts.store import N_READERS
from lowmoe.plan.machine import Machine
from lowmoe.plan.sizes import ModelSizes
from lowmoe.plan.skew import Skew

# Of plain reads by the same threads, what streaming through all matrices of a model comes to when
# decoding them costs nothing (docs/cpu_kernels.md).
RAM_SHARE = 0.90
# How sharply the slower of reading and decoding hides the other: both at the same speed, each has
# 2 ** (-1 / 4) = .84 of it.
SHARPNESS = 4.0
LAYER_S = 20e-6  # a layer's norms, roundings, meetings of threads, on the CPU
SLOW_LAYER_S = 105e-6  # more where Python is between layers, since some experts are not in RAM
# Of choosing a token from its scores in torch, and for each of these more: .18 ms of 32000, .57 of
# 151936, with a temperature and top-k.
CHOICE_S, SCORE_S = 0.1e-3, 3.2e-9
TORCH_FACTOR = 40.0  # what torch takes, times what native code would (docs/families.md)
DISK_MORE = 1.05  # bytes read over bytes missing, the rest being guesses that did not come true
# Of a read of one part of an expert, beside its bytes: a thread woken, a call, the next one told.
# As many as go on at once share it. From what is left of the disk's time in 12 settings of
# benchmarks/plan_accuracy.py, parts of 1.2 to 78 MB, once their bytes are paid for.
READ_S = 360e-6
GPU_SHARE = 0.80  # of a card's bandwidth that decode reaches: a target, nobody measured it
GPU_LAYER_S = 15e-6  # between kernels of a layer: likewise
WAIT_S = 20e-6  # of a layer that CPU and GPU share: the host waits once
GPU_PRODUCTS_SHARE = 0.45  # of a card's int8 products that a prompt reaches: likewise


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Experts that the tiers hold: on the GPU, and in RAM beside those."""

    on_gpu: int
    in_ram: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Seconds of a token.  gpu, cpu, pcie, disk: that each is busy; rest: what overlaps nothing."""

    total: float
    gpu: float = 0.0
    cpu: float = 0.0
    pcie: float = 0.0
    disk: float = 0.0
    rest: float = 0.0

    @property
    def limit(self) -> str:
        """What takes longest."""
        busy = {
            "GPU memory": self.gpu,
            "CPU and RAM": self.cpu,
            "PCIe": self.pcie,
            "disk": self.disk,
            "overhead between layers": self.rest,
        }
        return max(busy, key=lambda name: busy[name])


def hit_rates(sizes: ModelSizes, places: Places, skew: Skew) -> tuple[float, float]:
    """Shares of a token's experts that are on the GPU, and in GPU or RAM."""
    n = max(sizes.n_experts, 1)
    on_gpu = skew.hit_rate(places.on_gpu / n)
    return on_gpu, skew.hit_rate((places.on_gpu + places.in_ram) / n)


@dataclass(frozen=True, slots=True, kw_only=True)
class MissHandling:
    """misses: where experts are computed that a GPU has no room for; n_planes: that those are
    computed at, or read from disk before they are wanted again; None for all.  See LoadOptions.
    """

    misses: Misses = "auto"
    n_planes: int | None = None

    def share(self, sizes: ModelSizes) -> float:
        """Of an expert's bytes; its planes are alike."""
        return 1.0 if self.n_planes is None else self.n_planes / sizes.n_planes


DEFAULT_HANDLING = MissHandling()


def decode(
    sizes: ModelSizes,
    machine: Machine,
    places: Places,
    skew: Skew,
    n_cached: int,
    handling: MissHandling = DEFAULT_HANDLING,
) -> Cost:
    """One token after n_cached others."""
    on_gpu, in_memory = hit_rates(sizes, places, skew)
    # One that is computed with stays where it is.
    at_once = max(1, min(N_READERS, places.in_ram - 1))
    return decode_with_hits(sizes, machine, on_gpu, in_memory, n_cached, handling, at_once=at_once)


def decode_with_hits(
    sizes: ModelSizes,
    machine: Machine,
    on_gpu: float,
    in_memory: float,
    n_cached: int,
    handling: MissHandling = DEFAULT_HANDLING,
    *,
    at_once: int = N_READERS,
) -> Cost:
    """The same where hit rates are known: of the GPU, and of GPU and RAM together.  at_once: reads
    from disk.
    """
    kv = sizes.kv_bytes_per_token * n_cached + 2 * sizes.state_bytes  # read, and written
    disk = _disk_seconds(sizes, machine, in_memory, handling, at_once)
    choice = CHOICE_S + SCORE_S * sizes.n_vocab
    if machine.card is None:
        experts = _cpu_seconds(sizes, machine, sizes.active_expert_bytes, 0)
        cpu = _cpu_seconds(sizes, machine, sizes.dense_bytes_per_token, kv) + experts
        rest = choice + sizes.n_layers * (LAYER_S + (SLOW_LAYER_S if disk else 0.0))
        hidden = min(disk, experts * _beside_misses(sizes, in_memory))
        return _with_disk(Cost(total=cpu + rest - hidden, cpu=cpu, rest=rest), disk)
    speed = machine.card.bandwidth * GPU_SHARE
    dense = (sizes.dense_bytes_per_token + kv) / speed
    hits = on_gpu * sizes.active_expert_bytes / speed
    missed = (1 - on_gpu) * sizes.active_expert_bytes * handling.share(sizes)
    rest = choice + sizes.n_layers * (GPU_LAYER_S + (WAIT_S if missed else 0.0))
    if handling.misses == "page":  # computed there behind what is there, as they come
        hits += missed / speed
        pcie, cpu = missed / machine.card.bus_bandwidth, 0.0
    else:
        pcie, cpu = 0.0, _missed_seconds(sizes, machine, missed, handling.misses)
    total = dense + max(hits, cpu, pcie) + rest
    return _with_disk(Cost(total=total, gpu=dense + hits, cpu=cpu, pcie=pcie, rest=rest), disk)


def _beside_misses(sizes: ModelSizes, in_memory: float) -> float:
    """Share of a token's experts that are found while another of their layer is not: they are
    computed while that is read.
    """
    n_others = max(0.0, sizes.n_active / sizes.n_layers - 1)
    return in_memory * (1.0 - float(in_memory**n_others))


def _disk_seconds(
    sizes: ModelSizes, machine: Machine, in_memory: float, handling: MissHandling, at_once: int
) -> float:
    """Of reading what is missing.  What came in part is read to the end if it is wanted again,
    which is taken to be as likely as any expert is found.
    """
    first = handling.share(sizes)
    n_experts = (1 - in_memory) * (first + in_memory * (1 - first)) * sizes.n_active * DISK_MORE
    n_bytes = n_experts * sizes.expert_bytes
    return n_bytes / machine.disk_bytes_per_s + n_experts * sizes.n_planes * READ_S / at_once


def _missed_seconds(sizes: ModelSizes, machine: Machine, missed: float, misses: Misses) -> float:
    """Of packed bytes that a GPU does not have, on the CPU: with "auto" some cross the bus where it
    alone is slower than RAM (decoder/hybrid.py); what crosses is read from RAM too.
    """
    alone = _cpu_seconds(sizes, machine, missed, 0)
    if misses == "cpu" or not alone:
        return alone
    assert machine.card is not None
    helped = missed / (missed / alone + machine.card.bus_bandwidth)
    return max(helped, missed / (machine.ram_bytes_per_s * RAM_SHARE))


def _cpu_seconds(sizes: ModelSizes, machine: Machine, packed: float, plain: float) -> float:
    """Of reading and multiplying packed bytes, and reading plain ones."""
    reading = machine.ram_bytes_per_s * RAM_SHARE
    decoding = machine.cpu.word_bytes_per_s
    together = float((reading**-SHARPNESS + decoding**-SHARPNESS) ** (1 / SHARPNESS))
    slower = 1.0 if sizes.is_native else TORCH_FACTOR
    return slower * packed * together + plain / reading


def _with_disk(cost: Cost, disk: float) -> Cost:
    """A layer waits for its reads, and they for its router (docs/plan.md)."""
    return replace(cost, total=cost.total + disk, disk=disk)


def prefill(sizes: ModelSizes, machine: Machine, places: Places, n_tokens: int, chunk: int) -> Cost:
    """One token of a prompt of n_tokens that passes in chunks.  Every expert is taken to be used
    by every chunk, by many tokens or few."""
    together = min(n_tokens, chunk)
    used = _used(sizes, together)
    in_memory = min(1.0, (places.on_gpu + places.in_ram) / max(sizes.n_experts, 1))
    disk = used * (1 - in_memory) * sizes.experts_bytes / machine.disk_bytes_per_s / together
    if machine.card is None:
        slower = 1.0 if sizes.is_native else TORCH_FACTOR
        products = slower * sizes.active_weights / machine.cpu.products_per_s
        words = used * sizes.experts_bytes + sizes.dense_bytes_per_token
        cpu = products + words / (machine.ram_bytes_per_s * RAM_SHARE) / together
        return _with_disk(Cost(total=cpu, cpu=cpu), disk)
    products = sizes.active_weights / (machine.card.int8_products * GPU_PRODUCTS_SHARE)
    on_gpu = places.on_gpu / max(sizes.n_experts, 1)
    crossing = used * (1 - on_gpu) * sizes.experts_bytes
    pcie = crossing / machine.card.bus_bandwidth / together
    total = max(products, pcie)
    return _with_disk(Cost(total=total, gpu=products, pcie=pcie), disk)


def _used(sizes: ModelSizes, n_tokens: int) -> float:
    """Share of experts that any of so many tokens uses, if all are alike."""
    share = sizes.n_active / max(sizes.n_experts, 1)
    return 1 - (1 - share) ** n_tokens
