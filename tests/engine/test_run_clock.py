"""What is said of an answer's time."""

from types import SimpleNamespace
from typing import Any

import pytest

from lowmoe.engine import run_clock
from lowmoe.engine.run_clock import RunClock, Tally
from lowmoe.engine.statistics import Bandwidths
from lowmoe.experts.ledger import Traffic


class Store:
    """Of one expert, on disk."""

    tier, expert_bytes = "ram", 100

    def __init__(self) -> None:
        self.totals = Traffic()

    def traffic(self) -> Traffic:
        return self.totals

    def in_memory(self) -> dict[str, set[tuple[int, int]]]:
        return {"ram": set()}


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    time = [0.0]
    monkeypatch.setattr(run_clock.time, "perf_counter", lambda: time[0])
    return time


def test_a_bound_is_not_beaten_by_reads_that_began_with_the_prompt(now: list[float]) -> None:
    store = Store()
    runtime: Any = SimpleNamespace(
        store=store,
        dense_bytes=0,
        dense_bytes_per_token=0,
        bits=2,
        trades=(),
        predict=None,
        spec=SimpleNamespace(n_experts_total=1),
    )
    clock = RunClock(runtime, 5)
    # A second of the prompt in which nothing has come yet, then all of it while a token is made.
    now[0], prompt = 1.0, Traffic(disk_busy_s=1.0)
    clock.token(Tally(whole=prompt, prompts=prompt))
    now[0], store.totals = 1.1, Traffic(disk_bytes=110, disk_busy_s=1.1)
    clock.token(Tally(steps=1, tokens=1, whole=store.totals, prompts=prompt))
    found = clock.statistics(Bandwidths(ram=1e9))
    assert found.bound_tokens_per_s is not None
    assert found.decode_tokens_per_s == pytest.approx(10)
    assert found.bound_tokens_per_s >= found.decode_tokens_per_s * (1 - 1e-9)
