"""The clock of simulated machines, by hand."""

from dataclasses import replace

import pytest

from benchmarks.simulated.machine import Machine, Resource, Speeds
from benchmarks.simulated.routing import MadeUpRouting, repeats

SPEEDS = Speeds(gpu=1000.0, bus=25.0, ram=80.0, cpu=80.0, disk=5.0)


def took(machine: Machine, resource: Resource, amount: float) -> float:
    begin = machine.now
    machine.do(resource, amount)
    return machine.now - begin


@pytest.mark.parametrize(("resource", "speed"), [("gpu", 1000), ("bus", 25), ("cpu", 80)])
def test_alone_each_moves_what_it_can(resource: Resource, speed: float) -> None:
    assert took(Machine(SPEEDS), resource, 400) == pytest.approx(400 / speed)


def test_less_ram_than_a_bus_wants_slows_the_bus() -> None:
    assert took(Machine(replace(SPEEDS, ram=10.0)), "bus", 400) == pytest.approx(40)
    thrice = Machine(replace(SPEEDS, ram=60.0, ram_per_bus_byte=3.0))
    assert took(thrice, "bus", 400) == pytest.approx(20)


def test_a_queue_does_one_thing_after_the_other_and_queues_go_on_at_once() -> None:
    machine = Machine(SPEEDS)
    gpu, bus = machine.queue(), machine.queue()
    gpu.add("gpu", 2000)
    bus.add("bus", 25)
    first = bus.mark()
    bus.add("bus", 50)
    last, there = bus.mark(), gpu.mark()
    machine.until(last)
    assert (first.at, there.at, last.at) == (pytest.approx(1), pytest.approx(2), pytest.approx(3))


def test_what_waits_for_a_mark_begins_after_it() -> None:
    machine = Machine(SPEEDS)
    gpu, bus = machine.queue(), machine.queue()
    bus.add("bus", 50)
    gpu.wait_for(bus.mark())
    gpu.add("gpu", 1000)
    done = gpu.mark()
    machine.until(done)
    assert machine.now == done.at == pytest.approx(3)


def test_cpu_and_bus_share_what_ram_gives() -> None:
    # The bus wants 25 of 80 and gets it, the CPU gets 55; when the bus is done, all of it: 2 s, in
    # which the CPU reads 110 of 190, then 1 s for the other 80.
    machine = Machine(SPEEDS)
    bus = machine.queue()
    bus.add("bus", 50)
    arrived = bus.mark()
    assert took(machine, "cpu", 190) == pytest.approx(3)
    assert arrived.at == pytest.approx(2)


def test_who_wants_less_than_an_equal_share_gets_it_and_the_rest_is_shared_alike() -> None:
    # 30 for three: the disk wants 5, which leaves 25 for two that want more.
    machine = Machine(replace(SPEEDS, ram=30.0))
    disk, bus = machine.queue(), machine.queue()
    disk.add("disk", 5)
    bus.add("bus", 12.5)
    read, arrived = disk.mark(), bus.mark()
    assert took(machine, "cpu", 12.5) == pytest.approx(1)
    assert (read.at, arrived.at) == (pytest.approx(1), pytest.approx(1))


def test_speeds_may_change_on_the_way() -> None:
    machine = Machine(replace(SPEEDS))
    bus = machine.queue()
    bus.add("bus", 100)
    machine.do("time", 2)
    machine.speeds.bus = 50.0
    arrived = bus.mark()
    machine.until(arrived)
    assert arrived.at == pytest.approx(3)


def test_who_waits_for_himself_is_told() -> None:
    machine = Machine(SPEEDS)
    one, other = machine.queue(), machine.queue()
    never = Machine(SPEEDS).queue().mark()  # of a machine whose time does not pass
    one.wait_for(never)
    other.wait_for(one.mark())
    with pytest.raises(AssertionError, match="deadlock"):
        machine.until(other.mark())


def test_made_up_experts_come_again_as_often_as_mixtrals() -> None:
    # Any of two of eight: 46 % by chance, 50 to 63 % in Mixtral's layers (arXiv 2401.04088, table
    # 5); by chance where nothing is remembered.
    any_of_them, _ = repeats(8, 2, memory=0.15, skew=0.2)
    assert 0.53 < any_of_them < 0.6
    by_chance, share = repeats(8, 2, memory=0.0, skew=0.0)
    assert by_chance == pytest.approx(1 - 15 / 28, abs=0.02)
    assert share == pytest.approx(2 / 8, abs=0.02)


def test_the_same_text_is_made_up_again() -> None:
    one, other = (MadeUpRouting(2, 8, 2, memory=0.5, skew=0.1, seed=3) for _ in range(2))
    for _ in range(5):
        one._next_token()
        other._next_token()
    assert (one._chosen == other._chosen).all()
