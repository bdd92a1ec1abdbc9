"""Replays a trace through the store and the slots that run in production, without their bytes.

Every expert is a page long, is read at once, and is copied at once: what is asked for, what stays
and what leaves is decided by the very classes that decide it in a run, with nothing read ahead but
what completes a memory that has room for all.

Knows:        the order in which a run asks.
Ignorant of:  how long anything takes: see cost.py.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from lowmoe.checkpoint.files import ALIGNMENT
from lowmoe.experts.gpu_slots import GpuSlots
from lowmoe.experts.hybrid import HybridExperts
from lowmoe.experts.pinned_ring import PinnedRing
from lowmoe.experts.policy import Policy
from lowmoe.experts.staging import Staging
from lowmoe.experts.store import ExpertStore
from lowmoe.experts.trace import RoutingTrace
from lowmoe.kernels.gpu import Copies, Event
from lowmoe.timeline import Mark

P = ParamSpec("P")
T = TypeVar("T")


class _Pages:
    """A source of experts that says nothing."""

    buffer_bytes = (ALIGNMENT,)

    def read(self, layer_id: int, expert_id: int, buffers: list[Tensor]) -> int:
        return ALIGNMENT


class _AtOnce(Executor):
    """What is asked of it is done when it returns."""

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        done: Future[T] = Future()
        done.set_result(fn(*args, **kwargs))
        return done


class _Done:
    """An event that has happened."""

    def wait(self) -> None: ...

    def seconds_since(self, earlier: Any) -> float:
        return 0.0

    def time_s(self) -> float:
        return 0.0


class _Copies:
    """Copies that are done when they are asked for."""

    def copy(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source)

    def wait_for(self, event: Event) -> None: ...

    def mark(self) -> Mark:
        return _Done()

    def event(self) -> Event:
        return _Done()


class _Nowhere:
    """A GPU that has memory and no work."""

    name, memory_bytes, n_multiprocessors = "nowhere", 2**62, 1
    place = torch.device("cpu")
    operations: Any = None

    def available_bytes(self) -> int:
        return self.memory_bytes

    def release_unused(self) -> None: ...

    def staging(self, n_bytes: int) -> Tensor:
        return torch.empty(n_bytes, dtype=torch.uint8)

    def copy(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source)

    def add(self, target: Tensor, source: Tensor) -> None:
        target += source

    def event(self) -> Event:
        return _Done()

    def wait_for(self, event: Any) -> None: ...

    def mark(self) -> Mark:
        return _Done()

    def copies(self) -> Copies:
        return _Copies()

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        return work

    def read_bandwidth(self) -> float:
        return 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """Shares of requests that found their expert on the GPU, and in RAM beside it.

    promoted: experts copied to the GPU for each token.
    """

    gpu: float
    ram: float
    promoted: float


def replay(
    trace: RoutingTrace,
    *,
    n_gpu: int,
    n_ram: int,
    policy: Callable[[], Policy],
    warm: int = 64,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Replayed:
    """n_gpu, n_ram: slots, no GPU for 0; warm: tokens that do not count; policy: makes one a tier.

    Raises MemoryBudgetError for too few slots.
    """
    total = sum(trace.n_experts)
    warm = min(warm, trace.n_tokens // 2)
    with ExpertStore(
        _Pages(),
        ram_budget_bytes=max(n_ram, 2) * ALIGNMENT,
        n_experts_total=total,
        policy=policy(),
        readers=_AtOnce(),
    ) as ram:
        if n_gpu == 0:
            _complete(ram, total, trace.n_experts)
            before = ram.traffic()
            for token in range(trace.n_tokens):
                if token == warm:
                    before = ram.traffic()
                _pass(trace.experts[token], ram.want, ram)
                progress(token + 1, trace.n_tokens)
            after = ram.traffic() - before
        else:
            experts = _on_gpu(trace.n_experts, n_gpu, ram, policy())
            _complete(experts, total, trace.n_experts)
            before = experts.traffic()
            for token in range(trace.n_tokens):
                if token == warm:
                    before = experts.traffic()
                experts.move_up()
                _pass(trace.experts[token], experts.ask, ram)
                progress(token + 1, trace.n_tokens)
            after = experts.traffic() - before
            experts.ring.close()
    asked = after.gpu_requests + after.ram_requests + after.disk_requests
    return Replayed(
        gpu=after.gpu_requests / asked,
        ram=after.ram_requests / asked,
        promoted=after.promoted / (trace.n_tokens - warm),
    )


def _complete(experts: ExpertStore | HybridExperts, total: int, n_experts: Sequence[int]) -> None:
    """What a run reads in its first seconds where memory has room for all."""
    for _ in range(total):
        experts.read_rest(n_experts)


def _pass(routed: Any, ask: Callable[[int, list[int]], object], ram: ExpertStore) -> None:
    """One token through all layers.  routed: [L, K]."""
    for layer_id in range(routed.shape[0]):
        ask(layer_id, sorted(set(routed[layer_id].tolist())))
        for group in ram.portions():
            with ram.borrow(layer_id, group):
                pass  # this is where a run computes


def _on_gpu(
    n_experts: Sequence[int], n_slots: int, ram: ExpertStore, policy: Policy
) -> HybridExperts:
    gpu, parts = _Nowhere(), (ALIGNMENT,)
    ring = PinnedRing(gpu, ALIGNMENT)
    slots = GpuSlots(parts, n_experts, gpu, ring, n_slots=n_slots, policy=policy)
    slots.fill(_Pages(), lambda done, total: None)
    return HybridExperts(
        slots=slots,
        staging=Staging(parts, max(n_experts), gpu, ring),
        ring=ring,
        ram=ram,
        n_experts_total=sum(n_experts),
    )
