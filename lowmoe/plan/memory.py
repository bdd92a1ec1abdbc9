"""Where a model's weights would live on a machine, and how much of each memory it would take.

The division of a card is the very one that loading makes (lowmoe/engine/gpu.py), asked about a
card that need not be here.

Knows:        what is beside experts: dense weights, cache, scratch.
Ignorant of:  speed.
"""

from dataclasses import dataclass, replace

from lowmoe.cards import CardProfile
from lowmoe.decoder.gpu_buffers import why_not_shape
from lowmoe.engine.gpu import GpuNeeds, GpuRefusal
from lowmoe.engine.load import NATIVE_CHUNK
from lowmoe.experts.gpu_slots import MIN_GPU_SLOTS
from lowmoe.experts.store import MIN_SLOTS
from lowmoe.kernels import cpu
from lowmoe.kernels.cuda import MARGIN_BYTES
from lowmoe.plan.cost import Places
from lowmoe.plan.machine import Machine
from lowmoe.plan.sizes import ModelSizes
from lowmoe.spec import (
    Attention,
    GatedDeltaNet,
    GroupedQueryAttention,
    LatentAttention,
    LightningAttention,
    ModelSpec,
)

FLOAT_BYTES = 4
ROUNDED_BYTES = 1 + FLOAT_BYTES / 128 + FLOAT_BYTES / 64  # a number as int8, its scale, its sum
PINNED_BYTES = 64 * 2**20  # the ring that experts cross the bus from, see experts/pinned_ring.py


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


def allot(
    spec: ModelSpec,
    sizes: ModelSizes,
    part_bytes: int,
    machine: Machine,
    n_context: int,
    kv: cpu.KvFormat,
) -> tuple[Machine, Allotment]:
    """Where everything goes; the machine without its card where that cannot be used.

    part_bytes: of one plane of an expert.
    """
    if machine.card is not None:
        on_card = _on_card(spec, sizes, part_bytes, machine, n_context, kv)
        if isinstance(on_card, Allotment):
            return machine, on_card
        machine = without_card(machine)
        return machine, _on_cpu(spec, sizes, machine, n_context, kv, why=on_card)
    return machine, _on_cpu(spec, sizes, machine, n_context, kv, why=None)


def _on_card(
    spec: ModelSpec,
    sizes: ModelSizes,
    part_bytes: int,
    machine: Machine,
    n_context: int,
    kv: cpu.KvFormat,
) -> Allotment | str:
    assert machine.card is not None
    if reason := why_not_shape(spec):
        return reason
    needs = GpuNeeds(
        spec=spec,
        dense_bytes=sizes.dense_bytes,
        part_bytes=part_bytes,
        n_context=n_context,
        n_sequences=1,
        kv=kv,
    )
    gpu = PlannedGpu(machine.card_name, machine.card, machine.vram_bytes)
    try:
        division = needs.divided(gpu, [sizes.n_planes], machine.ram_bytes, gpu.available_bytes())
    except GpuRefusal as refusal:
        return refusal.reason
    if division.n_slots is None:
        vram = needs.n_bytes(gpu, sizes.n_planes, division.max_tokens)
        places = Places(on_gpu=sizes.n_experts, in_ram=0)
        return Allotment(places=places, chunk=division.max_tokens, ram_bytes=0, vram_bytes=vram)
    n_slots = division.n_slots
    few = needs.least_bytes(gpu, sizes.n_planes, division.max_tokens)
    vram = few + (n_slots - MIN_GPU_SLOTS) * sizes.expert_bytes
    free = machine.ram_bytes - PINNED_BYTES
    in_ram = min(sizes.n_experts - n_slots, max(0, free // sizes.expert_bytes))
    if in_ram < min(MIN_SLOTS, sizes.n_experts - n_slots):
        return f"{max(free, 0)} bytes of RAM are left for experts beside the card's"
    return Allotment(
        places=Places(on_gpu=n_slots, in_ram=in_ram),
        chunk=division.max_tokens,
        ram_bytes=PINNED_BYTES + in_ram * sizes.expert_bytes,
        vram_bytes=vram,
    )


def _on_cpu(
    spec: ModelSpec,
    sizes: ModelSizes,
    machine: Machine,
    n_context: int,
    kv: cpu.KvFormat,
    *,
    why: str | None,
) -> Allotment:
    chunk = min(NATIVE_CHUNK, n_context)
    cache = sizes.kv_bytes_per_token * n_context + sizes.states_bytes
    beside = sizes.dense_bytes + cache + scratch_bytes(spec, chunk)
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


def scratch_bytes(spec: ModelSpec, n_tokens: int) -> int:
    """What a pass of so many tokens takes beside weights and cache: the largest buffers of
    lowmoe/kernels/cpu/{attention,delta_net,lightning,experts}.cpp; what else there is does not
    grow with tokens.
    """
    attentions = [layer.attention for layer in spec.layers]
    wide = max(_attention_floats(a) for a in attentions)
    out = max(a.q_size for a in attentions)
    feed = max((layer.feed_forward for layer in spec.layers), key=lambda f: f.n_experts)
    n_hidden, n_active = spec.n_hidden, feed.router.n_active
    attending = FLOAT_BYTES * (n_hidden + wide + out) + ROUNDED_BYTES * (n_hidden + out)
    shared = 0 if feed.shared is None else feed.shared.n_inner
    mixing = FLOAT_BYTES * (
        n_hidden + n_active * n_hidden + 3 * feed.n_experts + 3 * shared
    ) + ROUNDED_BYTES * (n_hidden + n_active * (n_hidden + feed.n_inner) + n_hidden + shared)
    between = FLOAT_BYTES * (2 * n_hidden + 3 * n_active) + 8
    return int(n_tokens * (attending + mixing + between)) + FLOAT_BYTES * spec.n_vocab


def _attention_floats(attention: Attention) -> int:
    """Of a token's queries, keys and values, gates and what becomes of them."""
    match attention:
        case GroupedQueryAttention():
            return (1 + attention.gated) * attention.q_size + 2 * attention.kv_size
        case LatentAttention():
            return attention.q_size
        case GatedDeltaNet():
            return 2 * attention.n_mixed + attention.q_size + 2 * attention.n_heads
        case LightningAttention():
            return 4 * attention.q_size


def without_card(machine: Machine) -> Machine:
    """The same, computing on its CPU."""
    return replace(machine, card=None, card_name="", vram_bytes=0)
