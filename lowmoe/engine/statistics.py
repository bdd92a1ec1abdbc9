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

    def divided(self, by: float) -> "PerTier":
        """Each of them."""
        return PerTier(gpu=self.gpu / by, ram=self.ram / by, disk=self.disk / by)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bandwidths:
    """Bytes a second that each tier moves; None where nothing was read or measured."""

    gpu: float | None = None
    ram: float | None = None
    disk: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStatistics:
    """One run.

    ttft_s: from the request to the first token; placement: bytes of weights by tier at the end,
    those on disk only; hit_rate: share of expert requests served by a tier; bytes_per_token:
    bytes read by a tier for each token generated, those of answers decoded together included;
    bound_tokens_per_s: of this answer's tokens, what the bandwidths measured in this run allow for
    what was read; predicted_tokens_per_s: what the planner said beforehand,
    None until there is one. None stands for what a run too short did not measure.
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


def bound_tokens_per_s(bytes_per_token: PerTier, bandwidths: Bandwidths) -> float | None:
    """Tokens a second if every tier moved its bytes at full speed, all at the same time."""
    tiers = [
        (bytes_per_token.gpu, bandwidths.gpu),
        (bytes_per_token.ram, bandwidths.ram),
        (bytes_per_token.disk, bandwidths.disk),
    ]
    slowest = max((n_bytes / speed for n_bytes, speed in tiers if speed), default=0.0)
    return 1 / slowest if slowest > 0 else None
