"""Which GPU a model is computed on, if any, and how its memory is divided.

Knows:        whose place a card takes, what a model takes of its memory, what is said of a misfit.
Ignorant of:  CUDA; how a model is put there.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from cuda_ext.card import Card, CardError, find_card, is_without, look, why_none, why_not
from cuda_ext.compile import CompileError
from cuda_ext.on_card import LaunchError, RefusedLaunch
from lowmoe.cards import CARDS, profile_name
from lowmoe.checkpoint.files import ALIGNMENT
from lowmoe.decoder.gpu_buffers import Buffers
from lowmoe.decoder.gpu_parts import cache_bytes
from lowmoe.decoder.hybrid import share_bytes
from lowmoe.engine.memory import parse_budget
from lowmoe.errors import GpuError, LowMoeError, MemoryBudgetError, UsageError
from lowmoe.experts.gpu_slots import MIN_GPU_SLOTS, GpuSlots
from lowmoe.experts.resident import ResidentExperts
from lowmoe.experts.staging import Staging
from lowmoe.kernels import cpu
from lowmoe.kernels.cuda import kernels_home, open_card
from lowmoe.kernels.gpu import Gpu, GpuSizes
from lowmoe.kernels.shortage import shortages
from lowmoe.settings import read_settings
from lowmoe.spec import ModelSpec
from quant.layout import SYMBOL_BITS, round_up

AUTO, NONE = "auto", "none"
# Tokens of a prompt that pass through the layers at once, the most that fit: every expert's words
# are decoded once for all of them.
CHUNKS = (4096, 2048, 1024, 512, 256, 128)
# Of what is free, tokens of a prompt take at most one part of so many where experts want room too.
WORKING_SHARE = 8
LEAST_CONTEXT = 256  # tokens, of those that are advised


class GpuRefusal(Exception):
    """A GPU is not used after all: why, and what that is where it was asked for by name."""

    def __init__(self, reason: str, error: type[LowMoeError]) -> None:
        super().__init__(reason)
        self.reason, self.error = reason, error


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundCard:
    """A card, and what its memory is limited to where it stands in for a smaller one."""

    card: Card
    limit_bytes: int | None


def find_gpu(wanted: str) -> FoundCard | None:
    """The card to compute on.  wanted: "auto", "none" or a card's name.  None for none.

    Raises UsageError for a name if there is no such card, nor a larger one to stand in for it, and
    GpuRefusal for "auto" if there is a driver, and so a card, that cannot be used.
    """
    if wanted == NONE:
        return None
    facts = look()
    try:
        card = find_card(wanted, facts)
        if card is not None:
            return FoundCard(card=card, limit_bytes=None)
        if is_without(facts):
            return None
        raise GpuRefusal(why_none(facts) or why_not(facts.cards[0]) or "", GpuError)
    except CardError as e:
        profile = CARDS.get(profile_name(wanted))
        n_bytes = 0 if profile is None else profile.memory_bytes
        usable = [] if why_none(facts) else [c for c in facts.cards if why_not(c) is None]
        larger = [c for c in usable if c.memory_bytes >= n_bytes > 0]
        if not larger:
            raise UsageError(str(e)) from e
        return FoundCard(card=larger[0], limit_bytes=n_bytes)


def check_gpu(wanted: str, vram: str | int | None) -> None:
    """Raises UsageError for a card that is not here, or a budget without a card."""
    if wanted == AUTO and vram is None:
        return
    if wanted == NONE and vram is not None:
        raise UsageError(f"vram is {vram!r}, but gpu is none. Leave one of them out.")
    reason = None
    try:
        if find_gpu(wanted) is None:
            reason = why_none(look())
    except GpuRefusal as refusal:
        reason = refusal.reason
    if reason is not None and vram is not None:
        raise UsageError(f"vram is {vram!r}, but {reason}. Leave it out to run on the CPU.")


def open_gpu(
    found: FoundCard, wanted: str, vram: str | int | None, note: Callable[[str], None]
) -> Gpu:
    """A card that was found for what was wanted, ready to compute.

    vram: a budget for all that is put there.  Raises GpuRefusal if it cannot be used.
    """
    card, limit = found.card, found.limit_bytes
    if limit is not None:
        note(f"computing on {card.name} within the {limit / 1e9:.0f} GB of a {wanted}")
    if vram is not None:
        budget = parse_budget(vram, name="vram", whole_bytes=limit or card.memory_bytes)
        limit = min(budget, limit or card.memory_bytes)
    kernels = kernels_home(read_settings())
    try:
        return open_card(card, kernels=kernels, limit_bytes=limit, announce=note)
    except (CompileError, LaunchError, RuntimeError) as e:  # torch's own are RuntimeErrors
        raise GpuRefusal(_one_line(str(e)), GpuError) from e


def settle(
    refusal: GpuRefusal, wanted: str, vram: str | int | None, note: Callable[[str], None]
) -> None:
    """Say why the CPU computes; where a GPU was asked for, by name or by a budget, raise that."""
    if wanted == AUTO and vram is None:
        note(f"computing on the CPU: {refusal.reason}.")
        return
    raise refusal.error(
        f"gpu is {wanted!r}, but {refusal.reason}. Run on the CPU with gpu none."
    ) from refusal


@contextmanager
def gpu_failures() -> Iterator[None]:
    """Raises MemoryBudgetError where a GPU's memory does not do after all, GpuError where it fails
    otherwise.
    """
    try:
        with shortages():
            yield
    except torch.OutOfMemoryError as e:
        raise MemoryBudgetError(
            f"{out_of_memory(e)}. Give a smaller vram, fewer bits or a smaller context."
        ) from e
    except (torch.AcceleratorError, RefusedLaunch) as e:  # whoever notices first
        raise GpuError(
            f"the GPU failed: {_one_line(str(e))}. What it did is lost, and this process cannot "
            "use it again; start anew, with gpu none if it goes on."
        ) from e


def out_of_memory(error: torch.OutOfMemoryError) -> str:
    """What to say of it."""
    return f"the GPU ran out of memory: {_one_line(str(error)).partition('. ')[0]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuDivision:
    """How a card's memory is divided.

    n_planes: of experts; max_tokens: of a pass; n_slots: how many experts are there, None for all
    and for good.
    """

    n_planes: int
    max_tokens: int
    n_slots: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuNeeds:
    """What a model takes of a GPU's memory.

    part_bytes: of one part of an expert, which has one for each plane; n_sequences: caches.
    """

    spec: ModelSpec
    dense_bytes: int
    part_bytes: int
    n_context: int
    kv: cpu.KvFormat
    n_sequences: int

    def n_bytes(self, gpu: GpuSizes, n_planes: int, max_tokens: int) -> int:
        """All of it."""
        experts = ResidentExperts.needed_bytes(self._parts(n_planes), self._n_experts)
        return self._beside_experts(gpu, max_tokens) + experts

    def divided_bytes(self, gpu: GpuSizes, division: GpuDivision) -> int:
        """What a division takes."""
        n_planes, max_tokens = division.n_planes, division.max_tokens
        if division.n_slots is None:
            return self.n_bytes(gpu, n_planes, max_tokens)
        slots = division.n_slots * GpuSlots.slot_bytes(self._parts(n_planes))
        return self._beside_slots(gpu, n_planes, max_tokens) + slots

    def least_bytes(self, gpu: GpuSizes, n_planes: int, max_tokens: int) -> int:
        """All of it, or where that is less, all of it with as few experts as can be."""
        few = GpuDivision(n_planes=n_planes, max_tokens=max_tokens, n_slots=MIN_GPU_SLOTS)
        return min(self.divided_bytes(gpu, few), self.n_bytes(gpu, n_planes, max_tokens))

    def divided(
        self, gpu: GpuSizes, planes: Sequence[int], ram_bytes: int, available: int
    ) -> GpuDivision:
        """The first of the numbers of planes that fits, with the most tokens at once that do; if
        none does, the first that fits in GPU and RAM together, or the last.

        ram_bytes: that may be taken for experts; available: bytes of the GPU's memory.
        Raises GpuRefusal if nothing can be done.
        """
        longest = max(self.n_context, self.n_sequences)
        chunks = sorted({min(chunk, longest) for chunk in CHUNKS}, reverse=True)
        for n_planes in planes:
            for chunk in chunks:
                if self.n_bytes(gpu, n_planes, chunk) <= available:
                    return GpuDivision(n_planes=n_planes, max_tokens=chunk)
        parts = [self._in_part(gpu, n_planes, chunks, available) for n_planes in planes]
        possible = [division for division in parts if division is not None]
        if not possible:
            raise GpuRefusal(self._misfit(gpu, planes, chunks[-1], available), MemoryBudgetError)
        in_memory = (d for d in possible if self._rest_bytes(d) <= ram_bytes)
        return next(in_memory, possible[-1])

    def _in_part(
        self, gpu: GpuSizes, n_planes: int, chunks: list[int], available: int
    ) -> GpuDivision | None:
        """As many experts as there is room for beside the rest, and beside a chunk that is modest
        or the smallest.
        """
        share = available // WORKING_SHARE
        modest = (c for c in chunks if self._working_bytes(gpu, c) <= share)
        max_tokens = next(modest, chunks[-1])
        left = available - self._beside_slots(gpu, n_planes, max_tokens)
        n_slots = min(left // GpuSlots.slot_bytes(self._parts(n_planes)), sum(self._n_experts))
        if n_slots < MIN_GPU_SLOTS:
            return None
        return GpuDivision(n_planes=n_planes, max_tokens=max_tokens, n_slots=n_slots)

    def _rest_bytes(self, division: GpuDivision) -> int:
        """Of experts that are not on the GPU."""
        n_slots = division.n_slots or 0
        expert_bytes = division.n_planes * round_up(self.part_bytes, ALIGNMENT)
        return expert_bytes * (sum(self._n_experts) - n_slots)

    @property
    def _n_experts(self) -> list[int]:
        return self.spec.n_experts_by_layer

    def _parts(self, n_planes: int) -> tuple[int, ...]:
        return (self.part_bytes,) * n_planes

    def _working_bytes(self, gpu: GpuSizes, max_tokens: int) -> int:
        return Buffers.working_bytes(self.spec, gpu, max_tokens, self.n_context)

    def _beside_experts(self, gpu: GpuSizes, max_tokens: int) -> int:
        cache = cache_bytes(self.spec, self.n_context, self.kv)
        return self.dense_bytes + self.n_sequences * cache + self._working_bytes(gpu, max_tokens)

    def _beside_slots(self, gpu: GpuSizes, n_planes: int, max_tokens: int) -> int:
        parts, n_experts = self._parts(n_planes), self._n_experts
        return (
            self._beside_experts(gpu, max_tokens)
            + share_bytes(self.spec)
            + GpuSlots.table_bytes(n_experts)
            + Staging.needed_bytes(parts, max(n_experts))
        )

    def _misfit(self, gpu: GpuSizes, planes: Sequence[int], max_tokens: int, available: int) -> str:
        """What it needs, what there is, what would fit."""
        fewest = planes[-1]
        found = (
            f"{self.least_bytes(gpu, fewest, max_tokens)} bytes of GPU memory are needed at "
            f"{SYMBOL_BITS * fewest} bits with a context of {self.n_context} tokens, and "
            f"{available} of {gpu.memory_bytes} are free on {gpu.name}"
        )
        for n_planes in range(fewest - 1, 0, -1):
            if self.least_bytes(gpu, n_planes, max_tokens) <= available:
                return f"{found}; bits {SYMBOL_BITS * n_planes} would fit"
        n_context = self.n_context // 2
        while n_context >= LEAST_CONTEXT:
            shorter = replace(self, n_context=n_context)
            if shorter.least_bytes(gpu, fewest, min(max_tokens, n_context)) <= available:
                return f"{found}; context {n_context} would fit"
            n_context //= 2
        return found


def _one_line(text: str) -> str:
    return text.splitlines()[0].rstrip(".")
