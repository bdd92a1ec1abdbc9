"""A store and a source that say when they read, wait and lend.

Knows:        what of them takes time.
Ignorant of:  how it is shown.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from torch import Tensor

from lowmoe.experts.policy import Popularity
from lowmoe.experts.source import CoarseFirst, ExpertSource
from lowmoe.experts.store import ExpertStore
from lowmoe.experts.uses import Uses
from lowmoe.timeline import CPU_EXPERTS, DISK, WAITS, Timeline


class TracedSource:
    """An ExpertSource; every thread that reads has a row."""

    def __init__(self, source: ExpertSource, timeline: Timeline) -> None:
        self._source, self._timeline = source, timeline
        self.buffer_bytes = source.buffer_bytes

    def read(self, layer_id: int, expert_id: int, buffers: list[Tensor]) -> int:
        timeline, n_bytes, begin = self._timeline, 0, Timeline.now()
        try:
            n_bytes = self._source.read(layer_id, expert_id, buffers)
        finally:
            name, facts = _name(layer_id, [expert_id]), {"bytes": n_bytes}
            timeline.add(timeline.row_of_thread(DISK), name, begin, Timeline.now(), **facts)
        return n_bytes


class TracedStore(ExpertStore):
    """computes: whether what is lent is computed with on the CPU until it is given back."""

    def __init__(
        self,
        source: ExpertSource,
        timeline: Timeline,
        *,
        ram_budget_bytes: int,
        n_experts_total: int,
        popularity: Popularity,
        coarse: CoarseFirst | None,
        uses: Uses | None,
        computes: bool,
    ) -> None:
        super().__init__(
            source,
            ram_budget_bytes=ram_budget_bytes,
            n_experts_total=n_experts_total,
            popularity=popularity,
            coarse=coarse,
            uses=uses,
        )
        self._timeline, self._computes = timeline, computes

    @contextmanager
    def borrow(
        self, layer_id: int, expert_ids: Collection[int]
    ) -> Iterator[dict[int, tuple[Tensor, ...]]]:
        timeline, name = self._timeline, _name(layer_id, expert_ids)
        has_all, begin = all(self.has(layer_id, e) for e in expert_ids), Timeline.now()
        with super().borrow(layer_id, expert_ids) as experts:
            lent = Timeline.now()
            if not has_all:
                timeline.add(timeline.row_of_thread(WAITS), f"disk, {name}", begin, lent)
            yield experts
            if self._computes:
                facts = {"layer": layer_id, "experts": sorted(expert_ids)}
                timeline.add(CPU_EXPERTS, name, lent, Timeline.now(), **facts)


def _name(layer_id: int, expert_ids: Collection[int]) -> str:
    return f"layer {layer_id}: {', '.join(map(str, sorted(expert_ids)))}"


def traced(source: ExpertSource, timeline: Timeline | None) -> ExpertSource:
    """A source, traced where there is a timeline."""
    return source if timeline is None else TracedSource(source, timeline)


def open_store(
    source: ExpertSource,
    timeline: Timeline | None,
    *,
    ram_budget_bytes: int,
    n_experts_total: int,
    popularity: Popularity,
    coarse: CoarseFirst | None = None,
    uses: Uses | None = None,
    computes: bool,
) -> ExpertStore:
    """A store, traced where there is a timeline; computes: see TracedStore."""
    if timeline is None:
        return ExpertStore(
            source,
            ram_budget_bytes=ram_budget_bytes,
            n_experts_total=n_experts_total,
            popularity=popularity,
            coarse=coarse,
            uses=uses,
        )
    return TracedStore(
        source,
        timeline,
        ram_budget_bytes=ram_budget_bytes,
        n_experts_total=n_experts_total,
        popularity=popularity,
        coarse=coarse,
        uses=uses,
        computes=computes,
    )
