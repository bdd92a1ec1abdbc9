"""How a run went: what was moved, how fast, and what the machine would have allowed.

Knows:        the fields of the statistics, and the arithmetic of the bound.
Ignorant of:  how they are shown.
"""

from dataclasses import asdict, dataclass
from typing import Any

from lowmoe.experts.ledger import LayerBytes, Traffic


@dataclass(frozen=True, slots=True, kw_only=True)
class PerTier:
    """One number for each place weights can live in."""

    gpu: float = 0
    ram: float = 0
    disk: float = 0

    def divided(self, by: float) -> "PerTier":
        """Each of them."""
        return PerTier(gpu=self.gpu / by, ram=self.ram / by, disk=self.disk / by)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bandwidths:
    """Bytes a second that each tier moves, and the bus to the GPU; None where nothing was read or
    measured.
    """

    gpu: float | None = None
    ram: float | None = None
    disk: float | None = None
    bus: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStatistics:
    """One run.

    ttft_s: from the request to the first token; placement: bytes of weights by tier at the end,
    those on disk only; hit_rate: share of expert requests served by a tier; bytes_per_token:
    bytes read by a tier for each token generated, those of answers decoded together included;
    bound_tokens_per_s: of this answer's tokens, what the bandwidths measured in this run allow for
    what was read; predicted_tokens_per_s: what the planner said beforehand of an answer alone, None
    where it does not know or others were decoded meanwhile; to_gpu_bytes: experts' bytes that
    crossed from RAM to the GPU in the whole run; promoted: experts that moved up there to stay;
    trades: of quality for speed, those that were on; coarse_rate: share of expert requests at fewer
    planes for it. None stands for what a run too short did not measure.
    """

    prompt_tokens: int
    new_tokens: int
    ttft_s: float
    prefill_tokens_per_s: float | None
    decode_tokens_per_s: float | None
    bits: int
    placement: PerTier
    hit_rate: PerTier
    bytes_per_token: PerTier
    bound_tokens_per_s: float | None
    predicted_tokens_per_s: float | None
    to_gpu_bytes: int
    promoted: int
    trades: tuple[str, ...]
    coarse_rate: float

    def to_json(self) -> dict[str, Any]:
        """Plain values, the keys in this order."""
        return asdict(self)


def hit_rate(traffic: Traffic) -> PerTier:
    """Shares of expert requests by the tier that had the expert."""
    requests = traffic.gpu_requests + traffic.ram_requests + traffic.disk_requests
    if not requests:
        return PerTier()
    return PerTier(
        gpu=traffic.gpu_requests / requests,
        ram=traffic.ram_requests / requests,
        disk=traffic.disk_requests / requests,
    )


def coarse_rate(traffic: Traffic) -> float:
    """Share of expert requests that were lent with their first parts only."""
    requests = traffic.gpu_requests + traffic.ram_requests + traffic.disk_requests
    return traffic.coarse / requests if requests else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """What some tokens moved.  dense: bytes that each of them reads beside experts."""

    traffic: Traffic
    n_tokens: int
    dense: PerTier

    @property
    def per_token(self) -> PerTier:
        """Bytes of each tier for a token.

        What is sent to the GPU is read from RAM, like what the CPU computes with.
        """
        of, n_tokens, dense = self.traffic, self.n_tokens, self.dense
        to_stay = of.copied_bytes - of.passed_bytes  # what passed through was lent by RAM as well
        return PerTier(
            gpu=dense.gpu + (of.gpu_bytes + of.passed_bytes) / n_tokens,
            ram=dense.ram + (of.ram_bytes + to_stay) / n_tokens,
            disk=dense.disk + of.disk_bytes / n_tokens,
        )

    def bound_tokens_per_s(self, bandwidths: Bandwidths) -> float | None:
        """Tokens a second if everything moved at full speed, at the same time where it may.

        Copies, reads from disk and a layer's experts in different places go on at the same time;
        layers, and what a layer reads before its experts, follow one another.
        """
        moved, layers = self.per_token, self.traffic.layers
        everywhere = [
            _seconds(moved.gpu, bandwidths.gpu),
            _seconds(moved.ram, bandwidths.ram),
            _seconds(moved.disk, bandwidths.disk),
            _seconds(self.traffic.copied_bytes / self.n_tokens, bandwidths.bus),
        ]
        dense = _seconds(self.dense.gpu, bandwidths.gpu) + _seconds(self.dense.ram, bandwidths.ram)
        experts = sum(n * _layer_seconds(of, bandwidths) for of, n in layers.items())
        slowest = max(*everywhere, dense + experts / self.n_tokens)
        return 1 / slowest if slowest > 0 else None


def _layer_seconds(of: LayerBytes, bandwidths: Bandwidths) -> float:
    speeds = (bandwidths.gpu, bandwidths.ram, bandwidths.bus)
    return max(_seconds(n_bytes, speed) for n_bytes, speed in zip(of, speeds, strict=True))


def _seconds(n_bytes: float, speed: float | None) -> float:
    return n_bytes / speed if speed else 0.0
