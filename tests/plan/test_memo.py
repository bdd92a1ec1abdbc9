"""What is kept of a machine between runs."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from lowmoe.plan.machine import Processor
from lowmoe.plan.memo import (
    FEWEST_RUNS,
    MEMOS_KEPT,
    NAME,
    RUNS_KEPT,
    Memo,
    read_memo,
    with_run,
    write_memo,
)
from lowmoe.settings import Settings

MEMO = Memo(
    key="a machine",
    ram_bytes_per_s=80e9,
    cpu=Processor(n_threads=8, word_bytes_per_s=4e11, products_per_s=3e12),
    disk_bytes_per_s=None,
)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path / "new")
    memo = with_run(MEMO, 10.0, 9.0)
    write_memo(settings, memo)
    assert read_memo(settings, "a machine") == memo
    assert read_memo(settings, "another") is None


def test_a_run_with_fewer_threads_does_not_make_others_forgotten(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    memos = [replace(MEMO, key=f"{n} threads") for n in range(MEMOS_KEPT + 1)]
    for memo in memos:
        write_memo(settings, memo)
    write_memo(settings, with_run(memos[-1], 10.0, 9.0))
    assert read_memo(settings, memos[0].key) is None  # the oldest
    assert [read_memo(settings, m.key) for m in memos[1:-1]] == memos[1:-1]
    assert read_memo(settings, memos[-1].key) == with_run(memos[-1], 10.0, 9.0)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b"\xff",
        b"[" * 100_000,
        json.dumps([{"key": "a machine", "ram_bytes_per_s": -1}]).encode(),
    ],
)
def test_what_cannot_be_understood_is_measured_again(tmp_path: Path, content: bytes) -> None:
    (tmp_path / NAME).write_bytes(content)
    assert read_memo(Settings(home=tmp_path), "a machine") is None


def test_a_few_runs_correct_nothing_and_more_by_their_median() -> None:
    memo = MEMO
    for _ in range(FEWEST_RUNS - 1):
        memo = with_run(memo, 10.0, 8.0)
    assert memo.factor == 1.0
    memo = with_run(with_run(memo, 10.0, 8.0), 10.0, 0.01)  # one run among many was disturbed
    assert memo.factor == pytest.approx(0.8)


def test_old_runs_are_forgotten() -> None:
    memo = MEMO
    for _ in range(3 * RUNS_KEPT):
        memo = with_run(memo, 10.0, 9.0)
    assert len(memo.runs) == RUNS_KEPT


def test_a_correction_has_limits() -> None:
    memo = MEMO
    for _ in range(FEWEST_RUNS):
        memo = with_run(memo, 10.0, 1.0)
    assert memo.factor == 0.5
    assert memo.ratio == pytest.approx(0.1)
