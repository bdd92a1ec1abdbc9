"""The arithmetic of a run's statistics, by hand."""

from collections import Counter
from dataclasses import replace

import pytest

from lowmoe.engine.statistics import (
    Bandwidths,
    Moved,
    PerTier,
    RunStatistics,
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


def moved(**traffic: int) -> Moved:
    """By one token."""
    return Moved(traffic=Traffic(**traffic), n_tokens=1, dense=PerTier())


def test_the_bound_is_set_by_the_tier_that_takes_longest() -> None:
    of = moved(gpu_bytes=50 * 10**9, ram_bytes=8 * 10**9, disk_bytes=10**9)
    # 8 GB at 80 GB/s take 0.1 s; 1 GB at 5 GB/s takes 0.2 s, at 50 GB/s 0.02 s; 50 GB at 1 TB/s
    # take 0.05 s, at 200 GB/s 0.25 s.
    speeds = Bandwidths(gpu=1e12, ram=80e9, disk=5e9)
    assert of.bound_tokens_per_s(speeds) == pytest.approx(5)
    assert of.bound_tokens_per_s(replace(speeds, disk=50e9)) == pytest.approx(10)
    assert of.bound_tokens_per_s(replace(speeds, gpu=200e9)) == pytest.approx(4)


def test_what_is_sent_to_the_gpu_is_read_from_ram_and_crosses_the_bus() -> None:
    # Of 10 tokens: 6 GB of RAM's experts were used, 2 GB of them on the GPU; 1 GB came to stay.
    traffic = Traffic(
        gpu_bytes=30 * 10**9,
        ram_bytes=6 * 10**9,
        disk_bytes=10**9,
        copied_bytes=3 * 10**9,
        passed_bytes=2 * 10**9,
    )
    of = Moved(traffic=traffic, n_tokens=10, dense=PerTier(gpu=1e9))
    assert of.per_token == PerTier(gpu=4.2e9, ram=0.7e9, disk=0.1e9)
    speeds = Bandwidths(gpu=1e12, ram=80e9)
    # 0.7 GB at 80 GB/s; 0.3 GB at 25 GB/s.
    assert of.bound_tokens_per_s(speeds) == pytest.approx(80 / 0.7)
    assert of.bound_tokens_per_s(replace(speeds, bus=25e9)) == pytest.approx(25 / 0.3)


def test_layers_follow_one_another_and_what_is_not_of_experts_comes_first() -> None:
    # Two tokens of two layers each. Dense weights: 10 ms a token. One layer reads 1.6 GB from RAM
    # for 20 ms, one computes 5 GB on the GPU in 5 ms beside .16 GB in 2, two compute 10 GB in 10.
    layers = {(0, 16, 0): 1, (50, 2, 0): 1, (100, 0, 0): 2}
    in_bytes = {tuple(n * 10**8 for n in of): count for of, count in layers.items()}
    traffic = Traffic(
        gpu_bytes=25 * 10**9,
        ram_bytes=1800 * 10**6,
        layers=Counter(in_bytes),  # type: ignore[arg-type]
    )
    of = Moved(traffic=traffic, n_tokens=2, dense=PerTier(gpu=10e9))
    bound = of.bound_tokens_per_s(Bandwidths(gpu=1e12, ram=80e9))
    assert bound == pytest.approx(1 / (0.010 + (0.020 + 0.005 + 2 * 0.010) / 2))


def test_what_passes_through_the_gpu_takes_the_buss_time() -> None:
    layers = Counter({(10**9, 2 * 10**9, 10**9): 1})
    of = Moved(traffic=Traffic(ram_bytes=1, layers=layers), n_tokens=1, dense=PerTier())
    speeds = Bandwidths(gpu=1e12, ram=80e9, bus=20e9)
    assert of.bound_tokens_per_s(speeds) == pytest.approx(20)
    assert of.bound_tokens_per_s(replace(speeds, bus=50e9)) == pytest.approx(40)


def test_a_disk_that_was_not_read_does_not_bound() -> None:
    bound = moved(ram_bytes=8 * 10**9).bound_tokens_per_s(Bandwidths(ram=80e9))
    assert bound == pytest.approx(10)


def test_nothing_moved_has_no_bound() -> None:
    assert moved().bound_tokens_per_s(Bandwidths(ram=80e9)) is None
    assert moved().bound_tokens_per_s(Bandwidths()) is None


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
