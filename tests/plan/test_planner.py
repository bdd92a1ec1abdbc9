"""Rows of a plan, and what is advised."""

import time
from dataclasses import replace

import pytest

from lowmoe.cards import CARDS
from lowmoe.experts.split import MISSES
from lowmoe.families import read_config
from lowmoe.families.aliases import ALIASES
from lowmoe.plan.machine import Machine, processor
from lowmoe.plan.planner import (
    FROM_DISK,
    NOT,
    READING_SPEED,
    Question,
    best,
    mixed,
    plan,
)

GIB = 2**30
PC = Machine(
    ram_bytes=58 * 10**9, ram_bytes_per_s=80e9, disk_bytes_per_s=5e9, cpu=processor("avx512", 8)
)
WITH_4090 = replace(PC, card=CARDS["4090"], card_name="4090", vram_bytes=24 * 10**9)


def question(name: str, context: int = 4096) -> Question:
    return Question(spec=read_config(ALIASES[name].config).spec, context=context, kv="float16")


def test_no_memory_is_planned_beyond_what_there_is() -> None:
    for name in ALIASES:
        for machine in (PC, WITH_4090, replace(PC, ram_bytes=4 * 10**9)):
            for row in plan(question(name, 512), machine):
                if row.verdict != NOT:
                    assert row.allotment.ram_bytes <= machine.ram_bytes
                    assert row.allotment.vram_bytes <= machine.vram_bytes


def test_every_expert_is_in_one_place() -> None:
    for name in ALIASES:
        for row in plan(question(name, 512), WITH_4090):
            counts = row.to_json()["experts"]
            assert sum(counts.values()) == row.sizes.n_experts
            assert (counts["disk"] > 0) == (row.verdict in (FROM_DISK, NOT))


def test_more_bits_take_more_disk_and_more_time() -> None:
    for name in ("mixtral-8x7b", "qwen3-235b-a22b", "olmoe-1b-7b"):
        rows = plan(question(name), WITH_4090)
        assert [row.bits for row in rows] == [2, 4, 6]
        sizes = [row.sizes.disk_bytes for row in rows]
        speeds = [row.middle for row in rows]
        assert sizes == sorted(sizes)
        assert speeds == sorted(speeds, reverse=True)


def test_what_fits_nowhere_says_what_it_needs() -> None:
    tiny = replace(PC, ram_bytes=10**9)
    (row, *_) = plan(question("mixtral-8x22b"), tiny)
    assert row.verdict == NOT
    assert row.decode_tokens_per_s is None
    assert "bytes of RAM are needed" in str(row.allotment.why)
    assert best(plan(question("mixtral-8x22b"), tiny)) is None


def test_a_card_without_kernels_for_a_model_is_named_as_the_reason() -> None:
    (row, *_) = plan(question("phi-3.5-moe"), WITH_4090)
    assert row.allotment.vram_bytes == 0
    assert "GPU kernels" in str(row.allotment.why)


def test_the_most_bits_at_reading_speed_are_advised() -> None:
    rows = plan(question("olmoe-1b-7b"), PC)
    assert best(rows) is rows[-1]
    assert rows[-1].middle > READING_SPEED


def test_below_reading_speed_the_fastest_is_advised() -> None:
    rows = plan(question("llama-2-70b"), PC)
    assert all(row.middle < READING_SPEED for row in rows)
    assert best(rows) is rows[0]


def test_planning_671_billion_parameters_takes_less_than_half_a_second() -> None:
    begin = time.process_time()
    rows = plan(question("deepseek-v3"), WITH_4090)
    assert len(rows) == 3
    assert time.process_time() - begin < 0.5


@pytest.mark.parametrize("name", ["mixtral-8x22b", "mixtral-8x7b"])
def test_a_larger_card_is_never_slower(name: str) -> None:
    speeds = [
        plan(question(name), replace(WITH_4090, vram_bytes=n * 10**9))[1].middle
        for n in (12, 16, 24, 32, 48, 80)
    ]
    assert speeds == sorted(speeds)


def test_misses_at_fewer_planes_are_faster_and_shown_only_where_something_is_missed() -> None:
    asked = question("mixtral-8x22b")
    for machine in (PC, WITH_4090):
        rows = plan(asked, machine)
        widths = {row.bits: row for row in rows}
        found = mixed(asked, machine, rows)
        assert {row.bits for row in found} <= widths.keys()
        for row in found:
            assert row.miss_bits is not None
            assert row.miss_bits < row.bits
            assert row.middle > widths[row.bits].middle
            assert row.allotment == widths[row.bits].allotment  # whole ones have room all the same
    assert [(row.bits, row.miss_bits) for row in mixed(asked, WITH_4090, plan(asked, WITH_4090))]
    fitting = question("olmoe-1b-7b")
    assert mixed(fitting, PC, plan(fitting, PC)) == []


def test_a_choice_of_where_misses_are_computed_is_never_faster_than_the_faster() -> None:
    asked = question("mixtral-8x22b")
    speeds = {
        misses: [row.middle for row in plan(replace(asked, misses=misses), WITH_4090)]
        for misses in MISSES
    }
    for auto, *others in zip(speeds["auto"], speeds["cpu"], speeds["page"], strict=True):
        assert auto >= max(others) * (1 - 1e-9)


def test_more_conversations_leave_less_room_for_experts() -> None:
    asked = question("mixtral-8x22b", 8192)
    for machine in (replace(PC, ram_bytes=40 * 10**9), WITH_4090):
        one, four = (
            plan(replace(asked, n_sequences=n), machine)[1].allotment.places for n in (1, 4)
        )
        assert four.on_gpu + four.in_ram <= one.on_gpu + one.in_ram
        assert (four.on_gpu, four.in_ram) != (one.on_gpu, one.in_ram)
