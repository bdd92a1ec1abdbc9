"""What this server did, as Prometheus reads it; names are vLLM's where they mean the same.

Knows:        metrics and their names, how long clients waited.
Ignorant of:  where the numbers come from, dialects.
"""

import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping

from fastapi import APIRouter
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.responses import Response

from lowmoe.engine.statistics import PerTier
from lowmoe.server.asking import Ask, Event, Events, ModelCard, Reading, Service
from lowmoe.server.numbers import Numbers

# From a demo model's first token to a prompt of 100 000 tokens read from disk.
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)


class _Machine(Collector):
    """Asks for the numbers whenever somebody reads the metrics."""

    def __init__(self, numbers: Callable[[], Numbers]) -> None:
        self._numbers = numbers

    def collect(self) -> Iterator[Metric]:
        now = self._numbers()
        yield _gauge("num_requests_waiting", "Requests not begun.", now.n_waiting)
        yield _gauge("num_requests_running", "Answers that have a cache.", now.n_under_way)
        yield _gauge("num_prompts_reading", "Those whose prompt is being read.", now.n_reading)
        yield _gauge("max_num_seqs", "The most answers that may have a cache.", now.n_sequences)
        yield _total("requests", "Requests.", now.asked)
        not_answered = {"refused": now.refused, "failed": now.failed, "client_gone": now.closed}
        yield _totals("requests_unanswered", "By why.", "reason", not_answered)
        yield _totals("request_success", "Answers, by their end.", "finished_reason", now.ended)
        yield _total("prompt_tokens", "Tokens of prompts.", now.prompt_tokens)
        yield _total("prefix_cache_hits", "Those that were in a cache.", now.reused_tokens)
        yield _total("generation_tokens", "Tokens made.", now.new_tokens)
        yield _total("decode_steps", "Passes that made a token of each answer.", now.steps)
        yield from _tiers(now)
        achieved = "Of all answers together, in the last seconds with work."
        yield _gauge("achieved_tokens_per_second", achieved, now.tokens_per_s)
        if now.predicted_tokens_per_s is not None:
            expected = "Of one answer alone, as planned."
            yield _gauge("predicted_tokens_per_second", expected, now.predicted_tokens_per_s)


def _tiers(now: Numbers) -> Iterator[Metric]:
    of = now.traffic
    requests = PerTier(gpu=of.gpu_requests, ram=of.ram_requests, disk=of.disk_requests)
    n_bytes = PerTier(gpu=of.gpu_bytes, ram=of.ram_bytes, disk=of.disk_bytes)
    lent = "Experts asked for, by the tier that had them."
    yield _totals("expert_requests", lent, "tier", _by_tier(requests))
    yield _totals("expert_read_bytes", "Bytes of experts read.", "tier", _by_tier(n_bytes))
    yield _total("expert_to_gpu_bytes", "Bytes sent from RAM to the GPU.", of.copied_bytes)
    weights = GaugeMetricFamily("lowmoe_weight_bytes", "Bytes, by home.", labels=["tier"])
    for tier, value in _by_tier(now.placement).items():
        weights.add_metric([tier], value)
    yield weights


def _by_tier(of: PerTier) -> Mapping[str, float]:
    return {"gpu": of.gpu, "ram": of.ram, "disk": of.disk}


def _gauge(name: str, told: str, value: float) -> Metric:
    return GaugeMetricFamily(f"lowmoe_{name}", told, value=value)


def _total(name: str, told: str, value: float) -> Metric:
    return CounterMetricFamily(f"lowmoe_{name}", told, value=value)


def _totals(name: str, told: str, label: str, by_label: Mapping[str, float]) -> Metric:
    family = CounterMetricFamily(f"lowmoe_{name}", told, labels=[label])
    for value, n in by_label.items():
        family.add_metric([value], n)
    return family


class Measured:
    """A service whose clients' waits are measured; in all else the one it is made of."""

    def __init__(self, service: Service, numbers: Callable[[], Numbers] | None) -> None:
        self._service = service
        # Of its own: two servers in a process are two.
        self._registry = CollectorRegistry()
        if numbers is not None:
            self._registry.register(_Machine(numbers))
        self._first_token = self._histogram("time_to_first_token", "From request to first text.")
        self._whole = self._histogram("e2e_request_latency", "From request to last answer's end.")

    def _histogram(self, name: str, told: str) -> Histogram:
        return Histogram(f"lowmoe_{name}_seconds", told, buckets=_SECONDS, registry=self._registry)

    @property
    def model(self) -> ModelCard:
        """The one that is served."""
        return self._service.model

    def ask(self, ask: Ask) -> Events:
        """As the service's."""
        return _Timed(self._service.ask(ask), self._first_token, self._whole)

    async def count_tokens(self, ask: Ask) -> int:
        """As the service's."""
        return await self._service.count_tokens(ask)

    def exposition(self) -> bytes:
        """All metrics, in Prometheus' text format."""
        return generate_latest(self._registry)


class _Timed:
    """The events of one ask, timed as they pass."""

    def __init__(self, events: Events, first_token: Histogram, whole: Histogram) -> None:
        self._events, self._whole = events, whole
        self._first_token: Histogram | None = first_token
        self._asked_at = time.perf_counter()

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        try:
            event = await self._events.__anext__()
        except StopAsyncIteration:
            self._whole.observe(time.perf_counter() - self._asked_at)
            raise
        if self._first_token is not None and not isinstance(event, Reading):
            self._first_token.observe(time.perf_counter() - self._asked_at)
            self._first_token = None
        return event

    async def aclose(self) -> None:
        await self._events.aclose()


def routes(measured: Measured) -> APIRouter:
    """/metrics."""
    router = APIRouter(tags=["machine"])

    @router.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Prometheus' text format."""
        return Response(measured.exposition(), media_type=CONTENT_TYPE_PLAIN_0_0_4)

    return router
