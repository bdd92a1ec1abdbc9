"""How a run went: what was moved, how fast, and what the machine would have allowed.

Knows:        the fields of the statistics, and the arithmetic of the bound.
Ignorant of:  how they are shown.
"""

from dataclasses import asdict, dataclass
from typing import Any

from lowmoe.experts.ledger import Traffic


@dataclass(frozen=True, slots=True, kw_only=True)
class PerTier:
    """One number for each place weights can live in."""

    gpu: float = 0
    ram: float = 0
    disk: float = 0


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
    bytes read by a tier for each token generated; bound_tokens_per_s: what the bandwidths measured
    in this run allow for these bytes; predicted_tokens_per_s: what the planner said beforehand,
    None until there is one; to_gpu_bytes: experts' bytes that crossed from RAM to the GPU in the
    whole run; promoted: experts that moved up there to stay; trades: of quality
    for speed, those that were on; coarse_rate: share of expert requests at fewer planes for it.
    None stands for what a run too short did not measure.
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


def bytes_per_token(traffic: Traffic, n_tokens: int, dense: PerTier) -> PerTier:
    """What each tier moved for a token.  traffic: of n_tokens; dense: weights that each one reads.

    What is sent to the GPU is read from RAM like what the CPU computes with.
    """
    to_stay = traffic.copied_bytes - traffic.passed_bytes  # the others were lent by RAM as well
    return PerTier(
        gpu=dense.gpu + (traffic.gpu_bytes + traffic.passed_bytes) / n_tokens,
        ram=dense.ram + (traffic.ram_bytes + to_stay) / n_tokens,
        disk=dense.disk + traffic.disk_bytes / n_tokens,
    )


def bound_tokens_per_s(
    bytes_per_token: PerTier, bandwidths: Bandwidths, bus_bytes: float = 0
) -> float | None:
    """Tokens a second if every tier moved its bytes at full speed, all at the same time.

    bus_bytes: sent to the GPU for a token.
    """
    tiers = [
        (bytes_per_token.gpu, bandwidths.gpu),
        (bytes_per_token.ram, bandwidths.ram),
        (bytes_per_token.disk, bandwidths.disk),
        (bus_bytes, bandwidths.bus),
    ]
    slowest = max((n_bytes / speed for n_bytes, speed in tiers if speed), default=0.0)
    return 1 / slowest if slowest > 0 else None
