"""Arithmetic of a token: what must hold for any machine, and what others have worked out."""

import functools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowmoe.cards import CARDS
from lowmoe.checkpoint.layout import Recipe
from lowmoe.families import read_config
from lowmoe.families.aliases import ALIASES
from lowmoe.plan.cost import GPU_SHARE, RAM_SHARE, Places, decode, prefill
from lowmoe.plan.machine import Machine, processor
from lowmoe.plan.sizes import ModelSizes, model_sizes
from lowmoe.plan.skew import UNIFORM, Skew, expected

PC = Machine(
    ram_bytes=64 * 10**9,
    ram_bytes_per_s=80e9,
    disk_bytes_per_s=5e9,
    cpu=processor("avx512", 8),
)
WITH_4090 = replace(PC, card=CARDS["4090"], card_name="4090", vram_bytes=24 * 10**9)
EVEN = Skew(UNIFORM)


@functools.cache
def sizes_of(name: str, n_planes: int = 2) -> ModelSizes:
    spec = read_config(ALIASES[name].config).spec
    return model_sizes(spec, Recipe(expert_planes=n_planes), "float16")


shares = st.floats(0, 1)


@settings(deadline=None)  # the first builds sizes, and machines are busy
@given(shares, shares, st.floats(0.1, 1), st.sampled_from([PC, WITH_4090]))
def test_more_memory_is_never_slower(a: float, b: float, power: float, machine: Machine) -> None:
    sizes = sizes_of("mixtral-8x22b")

    def seconds(share: float) -> float:
        places = Places(on_gpu=0, in_ram=int(share * sizes.n_experts))
        return decode(sizes, machine, places, Skew(power), 4096).total

    few, many = sorted([a, b])
    # A run of which nothing is read from disk loses less between layers, too.
    assert seconds(many) <= seconds(few) * (1 + 1e-9)


@settings(deadline=None)  # the first builds sizes, and machines are busy
@given(st.floats(1.01, 4), st.sampled_from(["ram_bytes_per_s", "disk_bytes_per_s"]))
def test_a_faster_part_is_never_slower(factor: float, part: str) -> None:
    sizes, places = sizes_of("qwen3-235b-a22b"), Places(on_gpu=0, in_ram=4000)
    faster = replace(PC, **{part: factor * getattr(PC, part)})
    before, after = (decode(sizes, m, places, EVEN, 0).total for m in (PC, faster))
    assert after < before


@settings(deadline=None)  # the first builds sizes, and machines are busy
@given(st.integers(0, 448), st.integers(1, 32768))
def test_no_tier_moves_its_bytes_faster_than_it_can(n_on_gpu: int, n_cached: int) -> None:
    sizes = sizes_of("mixtral-8x22b")
    places = Places(on_gpu=n_on_gpu, in_ram=sizes.n_experts - n_on_gpu)
    cost = decode(sizes, WITH_4090, places, EVEN, n_cached)
    hits = n_on_gpu / sizes.n_experts
    gpu = sizes.dense_bytes_per_token + hits * sizes.active_expert_bytes
    assert cost.total >= gpu / (1008e9 * GPU_SHARE)
    assert cost.total >= (1 - hits) * sizes.active_expert_bytes / (80e9 * RAM_SHARE)


def test_what_is_busy_longest_is_named() -> None:
    sizes = sizes_of("mixtral-8x22b")
    from_disk = decode(sizes, PC, Places(on_gpu=0, in_ram=2), EVEN, 0)
    assert from_disk.limit == "disk"
    in_ram = decode(sizes, PC, Places(on_gpu=0, in_ram=448), EVEN, 0)
    assert in_ram.limit == "CPU and RAM"
    on_gpu = decode(sizes, WITH_4090, Places(on_gpu=448, in_ram=0), EVEN, 0)
    assert on_gpu.limit == "GPU memory"


@pytest.mark.parametrize(("n_planes", "bound"), [(2, 6.5), (1, 18.2)])
def test_a_mixtral_8x22b_on_a_4090_stays_below_its_published_roofline(
    n_planes: int, bound: float
) -> None:
    """The bounds of a cache that follows use, misses on the CPU: 26 % and 50 % of the experts are
    on the GPU, found by 33 % and 57.5 % of requests.
    """
    sizes = sizes_of("mixtral-8x22b", n_planes)
    n_on_gpu = {2: 118, 1: 224}[n_planes]
    places = Places(on_gpu=n_on_gpu, in_ram=448 - n_on_gpu)
    found = {2: Skew(0.823), 1: Skew(0.798)}[n_planes]
    speed = 1 / decode(sizes, WITH_4090, places, found, 4096).total
    assert 0.7 * bound < speed < bound


def test_a_prompt_in_longer_chunks_streams_fewer_bytes_a_token() -> None:
    sizes, places = sizes_of("mixtral-8x22b"), Places(on_gpu=100, in_ram=348)
    costs = [prefill(sizes, WITH_4090, places, 4096, chunk).total for chunk in (256, 1024, 4096)]
    assert costs[0] > costs[1] > costs[2]


def test_uniform_routing_hits_what_is_held() -> None:
    assert EVEN.hit_rate(0.3) == pytest.approx(0.3)
    assert all(p.hit_rate(0.0) == 0 and p.hit_rate(1.0) == 1 for p in expected(8))


@pytest.mark.parametrize(
    ("n_experts", "share", "measured"),
    [(8, 0.25, (0.27, 0.36)), (8, 0.5, (0.53, 0.62)), (512, 0.125, (0.67,)), (128, 0.4, (0.9,))],
)
def test_expected_hit_rates_embrace_what_was_measured(
    n_experts: int, share: float, measured: tuple[float, ...]
) -> None:
    skewed, even = expected(n_experts)
    low, high = even.hit_rate(share), skewed.hit_rate(share)
    assert all(low - 0.07 <= m <= high + 0.07 for m in measured)  # they are rounded, and texts'


def test_a_dense_layer_is_found_as_often_as_it_is_held() -> None:
    assert [skew.hit_rate(0.25) for skew in expected(1)] == [0.25, 0.25]
