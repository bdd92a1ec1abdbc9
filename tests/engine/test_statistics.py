"""The arithmetic of a run's statistics, by hand."""

from dataclasses import replace

import pytest

from lowmoe.engine.statistics import (
    Bandwidths,
    PerTier,
    RunStatistics,
    bound_tokens_per_s,
    bytes_per_token,
    hit_rate,
)
from lowmoe.experts.ledger import Traffic

KEYS = [
    "prompt_tokens",
    "new_tokens",
    "ttft_s",
    "prefill_tokens_per_s",
    "decode_tokens_per_s",
    "bits",
    "placement",
    "hit_rate",
    "bytes_per_token",
    "bound_tokens_per_s",
    "predicted_tokens_per_s",
    "to_gpu_bytes",
    "promoted",
    "trades",
    "coarse_rate",
]


def test_the_bound_is_set_by_the_tier_that_takes_longest() -> None:
    moved = PerTier(gpu=50e9, ram=8e9, disk=1e9)
    # 8 GB at 80 GB/s take 0.1 s; 1 GB at 5 GB/s takes 0.2 s, at 50 GB/s 0.02 s; 50 GB at 1 TB/s
    # take 0.05 s, at 200 GB/s 0.25 s.
    speeds = Bandwidths(gpu=1e12, ram=80e9, disk=5e9)
    assert bound_tokens_per_s(moved, speeds) == pytest.approx(5)
    assert bound_tokens_per_s(moved, replace(speeds, disk=50e9)) == pytest.approx(10)
    assert bound_tokens_per_s(moved, replace(speeds, gpu=200e9)) == pytest.approx(4)


def test_what_is_sent_to_the_gpu_is_read_from_ram_and_crosses_the_bus() -> None:
    # Of 10 tokens: 6 GB of RAM's experts were used, 2 GB of them on the GPU; 1 GB came to stay.
    traffic = Traffic(
        gpu_bytes=30 * 10**9,
        ram_bytes=6 * 10**9,
        disk_bytes=10**9,
        copied_bytes=3 * 10**9,
        passed_bytes=2 * 10**9,
    )
    moved = bytes_per_token(traffic, 10, PerTier(gpu=1e9))
    assert moved == PerTier(gpu=4.2e9, ram=0.7e9, disk=0.1e9)
    speeds = Bandwidths(gpu=1e12, ram=80e9)
    # 0.7 GB at 80 GB/s; 0.3 GB at 25 GB/s.
    assert bound_tokens_per_s(moved, speeds, 0.3e9) == pytest.approx(80 / 0.7)
    assert bound_tokens_per_s(moved, replace(speeds, bus=25e9), 0.3e9) == pytest.approx(25 / 0.3)


def test_a_disk_that_was_not_read_does_not_bound() -> None:
    assert bound_tokens_per_s(PerTier(ram=8e9), Bandwidths(ram=80e9)) == pytest.approx(10)


def test_nothing_moved_has_no_bound() -> None:
    assert bound_tokens_per_s(PerTier(), Bandwidths(ram=80e9)) is None
    assert bound_tokens_per_s(PerTier(), Bandwidths()) is None


def test_hit_rates_are_shares_of_all_requests() -> None:
    assert hit_rate(Traffic(ram_requests=3, disk_requests=1)) == PerTier(ram=0.75, disk=0.25)
    mixed = Traffic(gpu_requests=6, ram_requests=3, disk_requests=1)
    assert hit_rate(mixed) == PerTier(gpu=0.6, ram=0.3, disk=0.1)
    assert hit_rate(Traffic()) == PerTier()


def test_the_json_has_the_keys_of_the_design_in_its_order() -> None:
    statistics = RunStatistics(
        prompt_tokens=1,
        new_tokens=2,
        ttft_s=0.5,
        prefill_tokens_per_s=None,
        decode_tokens_per_s=None,
        bits=4,
        placement=PerTier(ram=1, disk=2),
        hit_rate=PerTier(),
        bytes_per_token=PerTier(),
        bound_tokens_per_s=None,
        predicted_tokens_per_s=None,
        to_gpu_bytes=0,
        promoted=0,
        trades=(),
        coarse_rate=0,
    )
    values = statistics.to_json()
    assert list(values) == KEYS
    assert values["placement"] == {"gpu": 0, "ram": 1, "disk": 2}
