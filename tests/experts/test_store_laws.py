"""The store's laws, under every order of events that hypothesis can think of."""

import contextlib
from collections.abc import Iterator
from random import Random
from typing import cast

import hypothesis.strategies as st
import pytest
import torch
from driven_readers import DrivenReaders, wait_for_one
from fake_source import FakeExperts, within_patience
from hypothesis import given, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor

from lowmoe.experts import store as store_module
from lowmoe.experts.policy import Key
from lowmoe.experts.store import ExpertStore

N_LAYERS, N_EXPERTS = 2, 6
LAYERS = st.integers(0, N_LAYERS - 1)
SOME_EXPERTS = st.lists(st.integers(0, N_EXPERTS - 1), min_size=1, max_size=N_EXPERTS, unique=True)
KEYS = st.tuples(LAYERS, st.integers(0, N_EXPERTS - 1))
LUCK = st.randoms(use_true_random=False)


class StoreLaws(RuleBasedStateMachine):
    """One thread that asks, as the store demands, and reads that end when hypothesis says so."""

    @initialize(n_slots=st.integers(2, 5) | st.integers(2, 20), spare=st.integers(0, 127))
    def make(self, n_slots: int, spare: int) -> None:
        self.source = FakeExperts()
        self.budget = n_slots * sum(self.source.buffer_bytes) + spare
        self.store = ExpertStore(
            self.source, ram_budget_bytes=self.budget, n_experts_total=N_LAYERS * N_EXPERTS
        )
        self.readers = cast(DrivenReaders, self.store._readers)
        self.layer_id = 0
        self.portions: Iterator[list[int]] = iter(())
        self.left: set[int] = set()  # wanted, not yet handed out
        self.hits: dict[int, int] = {}  # those in RAM when wanted: how often they had been read
        self.lent: list[tuple[Key, tuple[Tensor, ...]]] = []
        self.loans = contextlib.ExitStack()

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.end_loans()
            self.store.close()

    # --- the one who asks

    @precondition(lambda self: not self.lent)
    @rule(layer_id=LAYERS, expert_ids=SOME_EXPERTS)
    def want(self, layer_id: int, expert_ids: list[int]) -> None:
        """Begin a layer; the one before may have been given up half way, as after an error."""
        in_ram = set(self.store.residents().get(layer_id, []))
        self.store.want(layer_id, expert_ids)
        self.portions, self.layer_id = self.store.portions(), layer_id
        self.left = set(expert_ids)
        self.hits = {e: self.source.reads[layer_id, e] for e in in_ram & self.left}

    @precondition(lambda self: self.left and not self.lent)
    @rule(luck=LUCK)
    def borrow_a_portion(self, luck: Random) -> None:
        group = next(self.portions)
        assert len(set(group)) == len(group) <= self.store.n_slots
        assert set(group) <= self.left, "handed out twice, or never wanted"
        assert set(self.hits) <= set(group), "a miss came before a hit"
        self.left -= set(group)
        self.hits.clear()
        self.borrow(self.layer_id, group, luck)
        if not self.left:
            assert next(self.portions, None) is None

    @precondition(lambda self: not self.left and len(dict(self.lent)) < self.store.n_slots)
    @rule(key=KEYS, luck=LUCK)
    def borrow_one_more(self, key: Key, luck: Random) -> None:
        self.borrow(key[0], [key[1]], luck)

    def borrow(self, layer_id: int, expert_ids: list[int], luck: Random) -> None:
        self.readers.luck = luck
        errors: list[str] = []
        lent: dict[int, tuple[Tensor, ...]] = {}
        try:
            lent = self.loans.enter_context(self.store.borrow(layer_id, expert_ids))
        except OSError as error:
            errors.append(str(error))
        if errors:
            asked = [f"cannot read {(layer_id, e)}" for e in expert_ids]
            assert errors[0] in asked, "an error of an expert that nobody asked for"
            return
        assert list(lent) == expert_ids
        for expert_id, buffers in lent.items():
            self.lent.append(((layer_id, expert_id), buffers))
            self.source.protect(buffers)

    @precondition(lambda self: self.lent)
    @rule()
    def end_loans(self) -> None:
        for _, buffers in self.lent:
            self.source.unprotect(buffers)
        self.lent.clear()
        self.loans.close()

    @rule(layer_id=LAYERS, expert_ids=SOME_EXPERTS)
    def prefetch(self, layer_id: int, expert_ids: list[int]) -> None:
        self.store.prefetch(layer_id, expert_ids)

    # --- the disk

    @rule(luck=LUCK, count=st.integers(1, 4))
    def end_reads(self, luck: Random, count: int) -> None:
        self.readers.luck = luck
        for _ in range(count):
            self.readers.finish_one()

    @rule(keys=st.sets(KEYS, min_size=1, max_size=6))
    def break_some(self, keys: set[Key]) -> None:
        self.source.broken |= keys

    @rule()
    def heal_all(self) -> None:
        self.source.broken.clear()

    # --- the laws

    @invariant()
    def ram_is_never_above_the_budget(self) -> None:
        assert self.store.resident_bytes <= self.budget
        made = len(self.source.memory) // len(self.source.buffer_bytes)
        assert made * self.store.expert_bytes <= self.store.resident_bytes

    @invariant()
    def what_is_lent_is_there_and_untouched(self) -> None:
        assert self.source.violations == []
        residents = self.store.residents()
        for key, buffers in self.lent:
            assert key[1] in residents[key[0]]
            assert all(map(torch.equal, buffers, self.source.content(key))), f"{key} was changed"

    @invariant()
    def what_was_in_ram_when_wanted_stays_and_is_not_read_again(self) -> None:
        assert set(self.hits) <= set(self.store.residents().get(self.layer_id, []))
        for expert_id, reads in self.hits.items():
            assert self.source.reads[self.layer_id, expert_id] == reads


def test_the_laws_hold_in_any_order_of_events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "ThreadPoolExecutor", DrivenReaders)
    monkeypatch.setattr(store_module, "wait", wait_for_one)
    run_state_machine_as_test(
        StoreLaws, settings=settings(max_examples=200, stateful_step_count=30, deadline=None)
    )


@settings(max_examples=25, deadline=None)
@given(
    steps=st.lists(st.tuples(LAYERS, SOME_EXPERTS, SOME_EXPERTS), min_size=1, max_size=12),
    n_slots=st.integers(2, N_LAYERS * N_EXPERTS),
)
def test_what_is_lent_and_asked_for_does_not_depend_on_the_budget_with_real_threads(
    steps: list[tuple[int, list[int], list[int]]], n_slots: int
) -> None:
    source = FakeExperts()
    with ExpertStore(source, ram_budget_bytes=n_slots * 128, n_experts_total=100) as store:

        def run() -> None:
            for layer_id, wanted, guess in steps:
                store.want(layer_id, wanted)
                store.prefetch((layer_id + 1) % N_LAYERS, guess)
                for group in store.portions():
                    with store.borrow(layer_id, group) as experts:
                        check(layer_id, experts)

        def check(layer_id: int, experts: dict[int, tuple[Tensor, ...]]) -> None:
            for expert_id, buffers in experts.items():
                source.protect(buffers)
                assert all(map(torch.equal, buffers, source.content((layer_id, expert_id))))
                source.unprotect(buffers)

        within_patience(run)
        traffic = store.traffic()
    requests = sum(len(wanted) for _, wanted, _ in steps)
    assert source.violations == []
    assert traffic.ram_requests + traffic.disk_requests == requests
    assert traffic.ram_bytes == requests * 128
    assert traffic.guessed_right <= traffic.guessed
