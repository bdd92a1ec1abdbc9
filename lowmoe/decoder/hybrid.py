"""A pass on a GPU that holds some of the experts: the CPU computes the others at the same time.

Few tokens: a layer is two pieces of work for the GPU. The first attends, routes, and copies to the
host where tokens go and what they are rounded to; the second computes the experts that are on the
GPU. The host waits for the first, computes what is missing while the second goes on, and the next
layer's first piece begins by adding its sum. So it waits once a layer that has experts, and never
for the second.
Experts that are brought to the GPU instead pass through it behind the second; nobody waits for them
but the GPU.

Many tokens: an expert that is missing serves enough of them to be worth its way to the GPU; the CPU
computes those that serve few.

Knows:        the order of a pass, what is captured, what is computed where.
Ignorant of:  which operations make up its parts, who has which expert, CUDA.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from cuda_ext.ops import MOST_DECODED
from lowmoe.decoder.computation import Cache
from lowmoe.decoder.cpu_share import CpuShare, HostTokens
from lowmoe.decoder.gpu_buffers import Buffers
from lowmoe.decoder.gpu_parts import GpuParts, cache_bytes
from lowmoe.decoder.weights import DenseWeights
from lowmoe.experts.hybrid import HybridExperts
from lowmoe.experts.split import MissSplit
from lowmoe.kernels import cpu
from lowmoe.kernels.gpu import Event, Gpu
from lowmoe.spec import ModelSpec
from quant.trellis import TrellisCode

MOST_ON_CPU = 256  # tokens of a prompt that the CPU is given at once

Piece = Callable[[], None]
T = TypeVar("T")


class InTurn(Protocol):
    """enumerate, or what does the same and looks at the clock."""

    def __call__(self, things: Iterable[T], /) -> Iterator[tuple[int, T]]: ...


@dataclass(slots=True, kw_only=True)
class HybridCache:
    """Keys and values of one conversation, of each layer [1, B, capacity, row].

    pieces: of one token's way through each layer, over this very memory.
    """

    keys: list[Tensor]
    values: list[Tensor]
    capacity: int
    pieces: list[tuple[Piece, Piece]]
    n_tokens: int = 0


@dataclass(frozen=True, slots=True)
class _MixedThere:
    """The GPU's work on some experts of a prompt.  n_more: tokens beside the first of each."""

    begin: Event
    end: Event
    n_experts: int
    n_more: int

    def seconds(self) -> float | None:
        return self.end.seconds_since(self.begin)


class HybridComputation:
    """Operations bound to a model's dense weights, which are in the GPU's memory."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: DenseWeights,
        code: TrellisCode,
        experts: HybridExperts,
        gpu: Gpu,
        on_cpu: CpuShare,
        split: MissSplit,
        *,
        kv: cpu.KvFormat,
        max_tokens: int,
        n_context: int,
        in_turn: InTurn = enumerate,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """max_tokens: of one pass; n_context: of a cache; in_turn: how layers are counted; clock:
        seconds.
        """
        self.max_tokens = max_tokens
        self.working_bytes = Buffers.working_bytes(spec, gpu, max_tokens, n_context)
        self._spec, self._kv, self._experts, self._gpu = spec, kv, experts, gpu
        self._on_cpu, self._split, self._clock = on_cpu, split, clock
        self._in_turn = in_turn
        self._mixed_there: deque[_MixedThere] = deque()
        self._parts = GpuParts(
            spec, weights, code, gpu, kv=kv, max_tokens=max_tokens, n_context=n_context
        )
        self._tokens = _host_tokens(self._parts.buffers(min(MOST_DECODED, max_tokens)), gpu)
        self._share = torch.zeros_like(self._tokens.share, device=gpu.place)

    # --- the cache

    def new_cache(self, capacity: int) -> HybridCache:
        """All of it at once, since captured pieces know where it lies."""
        keys, values = self._parts.new_cache(capacity)
        b = self._parts.begin_with_zeros()  # capturing runs it
        self._tokens.share.zero_()
        capture = self._gpu.capture
        pieces = [
            (capture(first), capture(second)) for first, second in self._pieces(b, keys, values)
        ]
        return HybridCache(keys=keys, values=values, capacity=capacity, pieces=pieces)

    def cache_bytes(self, n_tokens: int) -> int:
        return cache_bytes(self._spec, n_tokens, self._kv)

    # --- a pass

    def embed(self, ids: Tensor) -> Tensor:
        """In a buffer, until the next pass."""
        return self._parts.embed(ids)

    def run_layers(self, x: Tensor, cache: Cache, store: HybridExperts) -> Tensor:
        """x: what `embed` returned.  Raises what reading raises; the next pass does not mind."""
        assert isinstance(cache, HybridCache)
        assert store is self._experts
        b = self._parts.embedded(x, cache.n_tokens, cache.capacity)
        store.move_up()
        if b.n_tokens == 1:
            self._decode(b, cache.pieces)
        elif b.n_tokens <= MOST_DECODED:
            self._decode(b, self._pieces(b, cache.keys, cache.values))
        else:
            self._prompt(b, cache)
        return b.x.clone()

    def logits(self, x: Tensor) -> Tensor:
        """On the host, which waits for them."""
        return self._parts.logits(x)

    # --- few tokens

    def _pieces(
        self, b: Buffers, keys: list[Tensor], values: list[Tensor]
    ) -> list[tuple[Piece, Piece]]:
        """The work of each layer up to where the host knows what to do, and after that."""
        tokens = self._tokens.of(b.n_tokens)
        return [
            (
                partial(self._until_routed, layer_id, b, tokens, keys[layer_id], values[layer_id]),
                partial(self._mix_there, layer_id, b),
            )
            for layer_id in range(len(self._spec.layers))
        ]

    def _until_routed(
        self, layer_id: int, b: Buffers, tokens: HostTokens, keys: Tensor, values: Tensor
    ) -> None:
        if layer_id > 0:
            self._add_share(layer_id - 1, b, tokens)
        self._parts.attend(layer_id, b, keys, values, 0)
        self._parts.route(layer_id, b)
        if not self._parts.has_experts(layer_id):
            return
        for target, source in (
            (tokens.x, b.x),
            (tokens.weights, b.weights),
            (tokens.experts, b.experts),
            (tokens.codes, b.normed_codes),
            (tokens.scales, b.normed_scales),
        ):
            self._gpu.copy(target, source)

    def _add_share(self, layer_id: int, b: Buffers, tokens: HostTokens) -> None:
        """b.x += what the CPU has computed of this layer."""
        if not self._parts.has_experts(layer_id):
            return
        share = self._share[: b.n_tokens]
        self._gpu.copy(share, tokens.share)
        self._gpu.add(b.x, share)

    def _mix_there(self, layer_id: int, b: Buffers) -> None:
        """b.x += the experts that are on the GPU."""
        slots = self._experts.slots
        if self._parts.has_experts(layer_id):
            self._parts.mix(layer_id, b, slots.tables[layer_id], slots.n_parts)
        self._parts.share(layer_id, b)

    def _decode(self, b: Buffers, pieces: list[tuple[Piece, Piece]]) -> None:
        tokens = self._tokens.of(b.n_tokens)
        for layer_id, (until_routed, mix_there) in self._in_turn(pieces):
            until_routed()
            routed = self._gpu.event()
            mix_there()
            if self._parts.has_experts(layer_id):
                routed.wait()
                self._mix_missing_few(layer_id, b, tokens)
        self._add_share(len(pieces) - 1, b, tokens)

    def _mix_missing_few(self, layer_id: int, b: Buffers, tokens: HostTokens) -> None:
        """tokens.share = the experts that the CPU computes; b.x += those brought to the GPU."""
        counts = Counter(tokens.experts.flatten().tolist())
        missing = self._experts.ask(layer_id, sorted(counts))
        self._foresee(layer_id + 1, tokens.x)
        if not missing:
            tokens.share.zero_()
            return
        here = self._here(layer_id, missing, counts)
        ram = self._experts.ram
        self._on_cpu.begin(layer_id, tokens)
        for group in ram.portions():
            with ram.borrow(layer_id, group) as experts:
                self._mix_lent(layer_id, b, experts, here, counts)
        self._on_cpu.finish(layer_id, tokens)

    def _here(self, layer_id: int, missing: list[int], counts: Mapping[int, int]) -> set[int]:
        """The missing experts that the CPU computes: those of the fewest tokens, and of these the
        last to come into RAM.
        """
        self._learn()
        ram = self._experts.ram
        order = sorted(missing, key=lambda e: (counts[e], ram.has(layer_id, e)))
        return set(order[: self._split.n_here([counts[e] for e in order])])

    def _mix_lent(
        self,
        layer_id: int,
        b: Buffers,
        experts: dict[int, tuple[Tensor, ...]],
        here: set[int],
        counts: Mapping[int, int],
    ) -> None:
        """Some of the missing experts: on the CPU or, meanwhile on their way, on the GPU."""
        staying = {e: parts for e, parts in experts.items() if e in here}
        passing = {e: parts for e, parts in experts.items() if e not in here}
        if not passing:
            self._run_here(layer_id, staying, counts, 0)
            return
        with self._experts.passing(passing) as passage:
            if staying:
                self._run_here(layer_id, staying, counts, len(passing))
            for table in passage.tables():
                self._parts.mix(layer_id, b, table, self._experts.slots.n_parts)

    def _run_here(
        self,
        layer_id: int,
        experts: dict[int, tuple[Tensor, ...]],
        counts: Mapping[int, int],
        n_copied: int,
    ) -> None:
        begin = self._clock()
        self._on_cpu.run(layer_id, experts)
        n_more = sum(counts[e] for e in experts) - len(experts)
        self._split.computed_here(len(experts), n_more, n_copied, self._clock() - begin)

    def _foresee(self, layer_id: int, x: Tensor) -> None:
        """Begin to read what a layer will likely miss; see layer_by_layer."""
        if layer_id < len(self._spec.layers) and not self._experts.has_all:
            likely = self._on_cpu.foresee(layer_id, x).by_weight()
            self._experts.ram.prefetch(layer_id, self._experts.missing(layer_id, likely))

    # --- many tokens

    def _prompt(self, b: Buffers, cache: HybridCache) -> None:
        end = cache.n_tokens + b.n_tokens
        for layer_id, _ in self._in_turn(self._spec.layers):
            self._parts.attend(layer_id, b, cache.keys[layer_id], cache.values[layer_id], end)
            self._parts.route(layer_id, b)
            if not self._parts.has_experts(layer_id):
                self._mix_there(layer_id, b)
                continue
            ids = b.experts.cpu().long()  # [T, K]; waits
            counts = {e: n for e, n in enumerate(torch.bincount(ids.flatten()).tolist()) if n}
            missing = self._experts.ask(layer_id, list(counts))
            here = self._here_of_prompt(missing, counts)
            share = self._taken(layer_id, b, ids, here)
            self._mix_there_timed(layer_id, b, missing, counts)
            ram = self._experts.ram
            for group in ram.portions_in_order(self._experts.staging.n_staged):
                with ram.borrow(layer_id, group) as experts:
                    self._mix_lent(layer_id, b, experts, here, counts)
            if share is not None:
                rows, tokens = share
                self._on_cpu.finish(layer_id, tokens)
                b.x.index_add_(0, rows, tokens.share.to(b.x.device))

    def _here_of_prompt(self, missing: list[int], counts: Mapping[int, int]) -> set[int]:
        """The missing experts that the CPU computes, those of the fewest tokens."""
        self._learn()
        order = sorted(missing, key=counts.__getitem__)
        few: set[int] = set()
        n_tokens = 0
        for expert_id in order[: self._split.n_here_of_prompt([counts[e] for e in order])]:
            n_tokens += counts[expert_id]
            if n_tokens > MOST_ON_CPU:
                break
            few.add(expert_id)
        return few

    def _mix_there_timed(
        self, layer_id: int, b: Buffers, missing: list[int], counts: Mapping[int, int]
    ) -> None:
        there = counts.keys() - set(missing)
        n_more = sum(counts[e] for e in there) - len(there)
        begin = self._gpu.event()
        self._mix_there(layer_id, b)
        if there:
            timed = _MixedThere(begin, self._gpu.event(), len(there), n_more)
            self._mixed_there.append(timed)

    def _learn(self) -> None:
        """What copies and the GPU took, as far as they are done."""
        for n_experts, seconds in self._experts.copied():
            self._split.copied(n_experts, seconds)
        while self._mixed_there and (took := self._mixed_there[0].seconds()) is not None:
            mixed = self._mixed_there.popleft()
            self._split.computed_there(mixed.n_experts, mixed.n_more, took)

    def _taken(
        self, layer_id: int, b: Buffers, ids: Tensor, here: set[int]
    ) -> tuple[Tensor, HostTokens] | None:
        """Give the CPU the tokens of the experts it is to compute: which, and what it is told."""
        if not here:
            return None
        at = torch.isin(ids, torch.tensor(sorted(here))).any(1).nonzero().flatten()
        rows = at.to(b.x.device)
        tokens = HostTokens(
            x=torch.empty(0),
            weights=b.weights[rows].cpu(),
            experts=ids[at],
            codes=b.normed_codes[rows].cpu(),
            scales=b.normed_scales[rows].cpu(),
            share=torch.empty(at.shape[0], self._spec.n_hidden),
        )
        self._on_cpu.begin(layer_id, tokens)
        return rows, tokens


def share_bytes(spec: ModelSpec) -> int:
    """GPU memory for the CPU's share of a layer.

    A prompt's, with what it is computed from, is made anew each time: at most 2 * MOST_ON_CPU rows,
    megabytes, which the margin of kernels/cuda.py is for.
    """
    return MOST_DECODED * spec.n_hidden * torch.float32.itemsize


def _host_tokens(b: Buffers, gpu: Gpu) -> HostTokens:
    """For as many tokens as the buffers."""

    def like(tensor: Tensor) -> Tensor:
        return gpu.staging(tensor.nbytes).view(tensor.dtype).view(tensor.shape)

    return HostTokens(
        x=like(b.x),
        weights=like(b.weights),
        experts=like(b.experts),
        codes=like(b.normed_codes),
        scales=like(b.normed_scales),
        share=like(b.x),
    )
