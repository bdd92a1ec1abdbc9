import time
from dataclasses import fields

import pytest

from lowmoe.experts.ledger import Ledger, Traffic


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that shows what the test puts into it."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_the_disk_is_busy_while_at_least_one_read_is_under_way(clock: list[float]) -> None:
    ledger = Ledger()
    ledger.read_begins()  # 100 to 103
    clock[0] = 101.0
    ledger.read_begins()  # 101 to 105, most of it beside the first
    clock[0] = 103.0
    ledger.read_ends(10)
    clock[0] = 105.0
    ledger.read_ends(20)
    clock[0] = 150.0  # idle
    ledger.read_begins()
    clock[0] = 152.0
    assert ledger.traffic() == Traffic(disk_bytes=30, disk_busy_s=7.0)
    ledger.read_ends(5)
    assert ledger.traffic() == Traffic(disk_bytes=35, disk_busy_s=7.0)


def test_requests_are_counted_by_where_they_were_met() -> None:
    ledger = Ledger()
    ledger.lent(in_ram=1, on_disk=0, expert_bytes=100)
    ledger.lent(in_ram=0, on_disk=2, expert_bytes=100)
    ledger.guess(right=False)
    ledger.guess(right=False)
    ledger.guess(right=True)
    assert ledger.traffic() == Traffic(
        ram_requests=1, disk_requests=2, ram_bytes=300, guessed=2, guessed_right=1
    )


def test_the_traffic_of_a_span_is_the_difference_of_every_total() -> None:
    names = [f.name for f in fields(Traffic)]
    later = Traffic(**{name: 10 * 2**i for i, name in enumerate(names)})
    earlier = Traffic(**{name: 2**i for i, name in enumerate(names)})
    assert later - earlier == Traffic(**{name: 9 * 2**i for i, name in enumerate(names)})
