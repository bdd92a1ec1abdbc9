"""Where a model's weights would live on a machine, and how much of each memory it would take.

The division of a card is the very one that loading makes (lowmoe/engine/gpu.py), asked about a
card that need not be here.

Knows:        what is beside experts: dense weights, cache, scratch.
Ignorant of:  speed.
"""

from dataclasses import dataclass, replace

from lowmoe.cards import CardProfile
from lowmoe.decoder.gpu_buffers import why_not_shape
from lowmoe.decoder.misses import MOST_ON_CPU
from lowmoe.engine.gpu import GpuNeeds, GpuRefusal
from lowmoe.engine.load import NATIVE_CHUNK
from lowmoe.engine.machine import PROBE_BYTES
from lowmoe.experts.pinned_ring import PinnedRing
from lowmoe.experts.store import MIN_SLOTS
from lowmoe.kernels import cpu
from lowmoe.kernels.cuda import MARGIN_BYTES
from lowmoe.plan.cost import Places
from lowmoe.plan.machine import Machine
from lowmoe.plan.sizes import ModelSizes
from lowmoe.spec import (
    Attention,
    ExpertsFeedForward,
    GatedDeltaNet,
    GroupedQueryAttention,
    LatentAttention,
    LightningAttention,
    ModelSpec,
)
from quant.layout import round_up

FLOAT_BYTES = 4
UNIT_ROWS = 256  # kUnitRows of lowmoe/kernels/cpu/engine.h
ROUNDED_BYTES = 1 + FLOAT_BYTES / 128 + FLOAT_BYTES / 64  # a number as int8, its scale, its sum


@dataclass(frozen=True, slots=True, kw_only=True)
class Allotment:
    """Bytes taken of each memory; where nothing runs, the RAM that the least would take.

    chunk: tokens of a prompt that pass at once; why: what keeps it off the card, or from running at
    all, None for nothing.
    """

    places: Places
    chunk: int
    ram_bytes: int
    vram_bytes: int
    why: str | None = None

    @property
    def fits(self) -> bool:
        """Whether it can run."""
        return self.places.on_gpu + self.places.in_ram > 0


@dataclass(frozen=True, slots=True)
class PlannedGpu:
    """A card that need not be here, for what asks of a GPU only how large it is."""

    name: str
    card: CardProfile
    memory_bytes: int

    @property
    def n_multiprocessors(self) -> int:
        return self.card.n_multiprocessors

    def available_bytes(self) -> int:
        return max(0, self.memory_bytes - MARGIN_BYTES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What is to have room.  part_bytes: of one plane of an expert; n_context: tokens of each of
    n_sequences conversations.
    """

    spec: ModelSpec
    sizes: ModelSizes
    part_bytes: int
    n_context: int
    kv: cpu.KvFormat
    n_sequences: int = 1


def allot(wanted: Wanted, machine: Machine) -> tuple[Machine, Allotment]:
    """Where everything goes; the machine without its card where that cannot be used."""
    if machine.card is None:
        return machine, _on_cpu(wanted, machine, why=None)
    on_card = _on_card(wanted, machine, machine.card)
    if isinstance(on_card, Allotment):
        return machine, on_card
    machine = without_card(machine)
    return machine, _on_cpu(wanted, machine, why=on_card)


def _on_card(wanted: Wanted, machine: Machine, card: CardProfile) -> Allotment | str:
    spec, sizes = wanted.spec, wanted.sizes
    if reason := why_not_shape(spec):
        return reason
    needs = GpuNeeds(
        spec=spec,
        dense_bytes=sizes.dense_bytes,
        part_bytes=wanted.part_bytes,
        n_context=wanted.n_context,
        n_sequences=wanted.n_sequences,
        kv=wanted.kv,
    )
    gpu = PlannedGpu(machine.card_name, card, machine.vram_bytes)
    try:
        division = needs.divided(gpu, [sizes.n_planes], machine.ram_bytes, gpu.available_bytes())
    except GpuRefusal as refusal:
        return refusal.reason
    vram = needs.divided_bytes(gpu, division)
    if division.n_slots is None:
        places = Places(on_gpu=sizes.n_experts, in_ram=0)
        return Allotment(places=places, chunk=division.max_tokens, ram_bytes=0, vram_bytes=vram)
    n_slots, beside = division.n_slots, _beside_misses(wanted)
    free = machine.ram_bytes - beside
    in_ram = min(sizes.n_experts - n_slots, max(0, free // sizes.expert_bytes))
    if in_ram < min(MIN_SLOTS, sizes.n_experts - n_slots):
        return f"{max(free, 0)} bytes of RAM are left for experts beside the card's"
    return Allotment(
        places=Places(on_gpu=n_slots, in_ram=in_ram),
        chunk=division.max_tokens,
        ram_bytes=beside + in_ram * sizes.expert_bytes,
        vram_bytes=vram,
    )


def _beside_misses(wanted: Wanted) -> int:
    """RAM that loading keeps from experts where a card has the rest of the model: the ring that
    they cross the bus from, the CPU's scratch, what RAM's speed is measured with.
    """
    ring = PinnedRing.needed_bytes(wanted.sizes.n_planes * wanted.part_bytes)
    return ring + PROBE_BYTES + int(MOST_ON_CPU * _mixing_bytes(wanted.spec))


def _on_cpu(wanted: Wanted, machine: Machine, *, why: str | None) -> Allotment:
    sizes, n_context = wanted.sizes, wanted.n_context
    chunk = max(min(NATIVE_CHUNK, n_context), wanted.n_sequences)
    in_pages = round_up(n_context, cpu.PAGE_TOKENS)
    cache = sizes.kv_bytes_per_token * in_pages + sizes.states_bytes
    beside = (
        sizes.dense_bytes
        + wanted.n_sequences * cache
        + scratch_bytes(wanted.spec, chunk, machine.cpu.n_threads)
    )
    n_slots = min(sizes.n_experts, max(0, machine.ram_bytes - beside) // sizes.expert_bytes)
    if n_slots < min(MIN_SLOTS, sizes.n_experts):
        least = beside + MIN_SLOTS * sizes.expert_bytes
        why = f"{least} bytes of RAM are needed, and {machine.ram_bytes} may be taken"
        return Allotment(
            places=Places(on_gpu=0, in_ram=0), chunk=chunk, ram_bytes=least, vram_bytes=0, why=why
        )
    return Allotment(
        places=Places(on_gpu=0, in_ram=n_slots),
        chunk=chunk,
        ram_bytes=beside + n_slots * sizes.expert_bytes,
        vram_bytes=0,
        why=why,
    )


def scratch_bytes(spec: ModelSpec, n_tokens: int, n_threads: int) -> int:
    """What a pass of so many tokens takes beside weights and cache: the buffers of
    lowmoe/kernels/cpu/{engine,attention,latent,delta_net,lightning,experts,ends}.cpp and what goes
    from call to call; what else there is does not grow with tokens.
    """
    by_kind: dict[type[Attention], float] = {}
    for attention in {layer.attention for layer in spec.layers}:
        kind, n_bytes = type(attention), _attention_bytes(attention, spec)
        by_kind[kind] = max(by_kind.get(kind, 0.0), n_bytes)
    n_active = _widest(spec).router.n_active
    ends = (FLOAT_BYTES + ROUNDED_BYTES) * spec.n_hidden
    between = FLOAT_BYTES * (2 * spec.n_hidden + 3 * n_active) + 8
    rows = FLOAT_BYTES * UNIT_ROWS * n_threads
    per_token = sum(by_kind.values()) + _mixing_bytes(spec) + ends + between + rows
    return int(n_tokens * per_token) + FLOAT_BYTES * spec.n_vocab


def _mixing_bytes(spec: ModelSpec) -> float:
    """Of a token: the layer with most experts, the widest shared ones."""
    feed = _widest(spec)
    n_hidden, n_active = spec.n_hidden, feed.router.n_active
    floats = n_hidden + n_active * (n_hidden + 3) + 3 * feed.n_experts
    rounded = n_hidden + n_active * (n_hidden + feed.n_inner)
    every = (layer.feed_forward.shared for layer in spec.layers)
    if shared := max((of.n_inner for of in every if of is not None), default=0):
        floats += 3 * shared
        rounded += n_hidden + shared
    return FLOAT_BYTES * floats + ROUNDED_BYTES * rounded


def _widest(spec: ModelSpec) -> ExpertsFeedForward:
    return max((layer.feed_forward for layer in spec.layers), key=lambda f: f.n_experts)


def _attention_bytes(attention: Attention, spec: ModelSpec) -> float:
    """Of a token: the norm of what comes in, queries, keys and values, gates, what comes out."""
    floats, rounded = spec.n_hidden + attention.q_size, spec.n_hidden + attention.q_size
    match attention:
        case GroupedQueryAttention():
            floats += (1 + attention.gated) * attention.q_size + 2 * attention.kv_size
            floats += attention.head_size
        case LatentAttention():
            # Each head attends over the latent itself, which one head of keys and values is.
            kept, q_rank = attention.kv_rank + attention.rope_size, attention.q_rank or 0
            floats += attention.n_heads * (kept + attention.kv_rank + attention.key_size)
            floats += 4 * kept + q_rank
            rounded += q_rank
        case GatedDeltaNet():
            floats += 2 * attention.n_mixed + 2 * attention.n_heads
        case LightningAttention():
            floats += 4 * attention.q_size
    return FLOAT_BYTES * floats + ROUNDED_BYTES * rounded


def without_card(machine: Machine) -> Machine:
    """The same, computing on its CPU."""
    return replace(machine, card=None, card_name="", vram_bytes=0)
