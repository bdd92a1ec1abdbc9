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
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from cuda_ext.ops import MOST_DECODED
from lowmoe.decoder.computation import Cache, Together
from lowmoe.decoder.cpu_share import CpuShare, HostTokens
from lowmoe.decoder.gpu_buffers import Buffers
from lowmoe.decoder.gpu_parts import GpuParts, cache_bytes
from lowmoe.decoder.misses import MissingExperts
from lowmoe.decoder.weights import DenseWeights
from lowmoe.experts.hybrid import HybridExperts
from lowmoe.experts.split import MissSplit
from lowmoe.experts.staging import Passage
from lowmoe.kernels import cpu
from lowmoe.kernels.gpu import Gpu
from lowmoe.spec import ModelSpec
from quant.trellis import TrellisCode

# Of a prompt, choices for each expert from which on hardly any is left without one: e ** -16, if
# they were chosen alike.
SURELY_USED = 16

Piece = Callable[[], None]
Attend = Callable[[int], None]  # b.x += the attention of a layer
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

    def keep(self, n_tokens: int) -> int:
        """Forget all but the first n_tokens."""
        self.n_tokens = n_tokens
        return n_tokens


@dataclass(frozen=True, slots=True)
class _Ahead:
    """Experts of a prompt's layer that were sent before it was known who is needed."""

    experts: frozenset[int]
    passage: Passage | None


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
        boost: float = 0.0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """max_tokens: of one pass; n_context: of a cache; in_turn: how layers are counted; boost:
        how much higher experts that are on the GPU score when they are chosen; clock: seconds.
        """
        self.max_tokens = max_tokens
        self.working_bytes = Buffers.working_bytes(spec, gpu, max_tokens, n_context)
        self._spec, self._kv, self._experts, self._gpu = spec, kv, experts, gpu
        self._on_cpu, self._in_turn, self._boost = on_cpu, in_turn, boost
        self._parts = GpuParts(
            spec, weights, code, gpu, kv=kv, max_tokens=max_tokens, n_context=n_context
        )
        self._misses = MissingExperts(self._parts, experts, on_cpu, split, clock)
        self._tokens = _host_tokens(self._parts.buffers(min(MOST_DECODED, max_tokens)), gpu)
        self._share = torch.zeros_like(self._tokens.share, device=gpu.place)

    # --- the cache

    def new_cache(self, capacity: int) -> HybridCache:
        """All of it at once, since captured pieces know where it lies."""
        keys, values = self._parts.new_cache(capacity)
        b = self._parts.begin_with_zeros()  # capturing runs it
        self._tokens.share.zero_()
        capture = self._gpu.capture
        attend = self._attend_one(b, keys, values)
        pieces = [(capture(first), capture(second)) for first, second in self._pieces(b, attend)]
        return HybridCache(keys=keys, values=values, capacity=capacity, pieces=pieces)

    def cache_bytes(self, n_tokens: int) -> int:
        return cache_bytes(self._spec, n_tokens, self._kv)

    # --- a pass

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """In a buffer, until the next pass."""
        return self._parts.embed(ids)

    def run_layers(self, x: Tensor, cache: Cache | Together, store: HybridExperts) -> Tensor:
        """x: what `embed` returned.  Raises what reading raises; the next pass does not mind."""
        assert store is self._experts
        if isinstance(cache, Together):
            return self._run_together(x, cache, store)
        assert isinstance(cache, HybridCache)
        b = self._parts.embedded(x, cache.n_tokens, cache.capacity)
        store.move_up()
        if b.n_tokens == 1:
            self._decode(b, cache.pieces)
        elif b.n_tokens <= MOST_DECODED:
            self._decode(b, self._pieces(b, self._attend_one(b, cache.keys, cache.values)))
        else:
            self._prompt(b, cache)
        return b.x.clone()

    def _run_together(self, x: Tensor, together: Together, store: HybridExperts) -> Tensor:
        """Not captured: which conversations are together changes as they come and go."""
        caches = [cache for cache in together.caches if isinstance(cache, HybridCache)]
        assert len(caches) == x.shape[0] <= MOST_DECODED
        b = self._parts.embedded_each(x, [cache.n_tokens for cache in caches])
        store.move_up()

        def attend(layer_id: int) -> None:
            of_layer = [(cache.keys[layer_id], cache.values[layer_id]) for cache in caches]
            self._parts.attend_each(layer_id, b, of_layer)

        self._decode(b, self._pieces(b, attend))
        return b.x.clone()

    def logits(self, x: Tensor) -> Tensor:
        """On the host, which waits for them."""
        return self._parts.logits(x)

    # --- few tokens

    def _attend_one(self, b: Buffers, keys: list[Tensor], values: list[Tensor]) -> Attend:
        """A layer's attention of few tokens over one cache."""
        return lambda i: self._parts.attend(i, b, keys[i], values[i], 0)

    def _pieces(self, b: Buffers, attend: Attend) -> list[tuple[Piece, Piece]]:
        """The work of each layer up to where the host knows what to do, and after that."""
        tokens = self._tokens.of(b.n_tokens)
        return [
            (
                partial(self._until_routed, layer_id, b, tokens, attend),
                partial(self._mix_there, layer_id, b),
            )
            for layer_id in range(len(self._spec.layers))
        ]

    def _until_routed(self, layer_id: int, b: Buffers, tokens: HostTokens, attend: Attend) -> None:
        if layer_id > 0:
            self._add_share(layer_id - 1, b, tokens)
        attend(layer_id)
        self._route(layer_id, b)
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

    def _route(self, layer_id: int, b: Buffers) -> None:
        self._parts.route(layer_id, b)
        if self._boost and self._parts.has_experts(layer_id):
            self._parts.prefer(layer_id, b, self._experts.slots.tables[layer_id], self._boost)

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
        here = self._misses.here(layer_id, missing, counts)
        self._on_cpu.begin(layer_id, tokens)
        for group in self._misses.portions():
            with self._experts.ram.borrow(layer_id, group) as experts:
                self._misses.mix(layer_id, b, experts, here, counts)
        self._on_cpu.finish(layer_id, tokens)
        self._experts.ram.read_on()  # while the next layer attends

    def _foresee(self, layer_id: int, x: Tensor) -> None:
        """Begin to read what a layer will likely miss; see layer_by_layer."""
        if layer_id < len(self._spec.layers) and not self._experts.has_all:
            likely = self._on_cpu.foresee(layer_id, x).by_weight()
            self._experts.ram.prefetch(layer_id, self._experts.missing(layer_id, likely))

    # --- many tokens

    def _prompt(self, b: Buffers, cache: HybridCache) -> None:
        end = cache.n_tokens + b.n_tokens
        for layer_id, _ in self._in_turn(self._spec.layers):
            keys, values = cache.keys[layer_id], cache.values[layer_id]
            with self._ahead(layer_id, b.n_tokens) as ahead:
                self._parts.attend(layer_id, b, keys, values, end)
                self._route(layer_id, b)
                if self._parts.has_experts(layer_id):
                    self._mix_many(layer_id, b, ahead)
                else:
                    self._mix_there(layer_id, b)

    @contextmanager
    def _ahead(self, layer_id: int, n_tokens: int) -> Iterator[_Ahead]:
        """Begin to bring experts while their layer attends and routes, where all will be needed."""
        experts, feed_forward = self._experts, self._spec.layers[layer_id].feed_forward
        n_chosen = n_tokens * feed_forward.router.n_active
        is_sure = feed_forward.n_experts > 0 and n_chosen >= SURELY_USED * feed_forward.n_experts
        if not experts.has_all or not is_sure:
            yield _Ahead(frozenset(), None)
            return
        missing = experts.missing(layer_id, range(feed_forward.n_experts))
        first = missing[: experts.staging.n_staged]
        n_parts = experts.staging.n_parts
        with experts.ram.borrow(layer_id, first) as lent:
            whole = {e: parts[:n_parts] for e, parts in lent.items()}
            with experts.passing(whole) as passage:
                yield _Ahead(frozenset(first), passage)

    def _mix_many(self, layer_id: int, b: Buffers, ahead: _Ahead) -> None:
        ids = b.experts.cpu().long()  # [T, K]; waits
        counts = {e: n for e, n in enumerate(torch.bincount(ids.flatten()).tolist()) if n}
        missing = self._experts.ask(layer_id, list(counts))
        here = self._misses.here_of_prompt([e for e in missing if e not in ahead.experts], counts)
        share = self._taken(layer_id, b, ids, here)
        begin = self._gpu.event()
        self._mix_there(layer_id, b)
        there = sorted(counts.keys() - set(missing))
        self._misses.mixed_there(begin, self._gpu.event(), there, counts)
        if ahead.passage is not None:
            self._misses.mix_on_gpu(layer_id, b, ahead.passage)
        ram = self._experts.ram
        for group in ram.portions_in_order(self._experts.staging.n_staged):
            with ram.borrow(layer_id, [e for e in group if e not in ahead.experts]) as experts:
                self._misses.mix(layer_id, b, experts, here, counts)
        if share is not None:
            rows, tokens = share
            self._on_cpu.finish(layer_id, tokens)
            b.x.index_add_(0, rows, tokens.share.to(b.x.device))

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

    A prompt's, with what it is computed from, is made anew each time: at most twice as many rows as
    misses.py gives the CPU, megabytes, which the margin of kernels/cuda.py is for.
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
