"""The store's laws, under every order of events that hypothesis can think of."""

import contextlib
from collections.abc import Iterator

import hypothesis.strategies as st
import torch
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

from lowmoe.experts.policy import Key
from lowmoe.experts.store import ExpertStore

N_LAYERS, N_EXPERTS = 3, 6
LAYERS = st.integers(0, N_LAYERS - 1)
SOME_EXPERTS = st.lists(st.integers(0, N_EXPERTS - 1), min_size=1, max_size=N_EXPERTS, unique=True)
KEYS = st.tuples(LAYERS, st.integers(0, N_EXPERTS - 1))


class StoreLaws(RuleBasedStateMachine):
    """One thread that asks, as the store demands, and reads that end when hypothesis says so."""

    @initialize(n_slots=st.integers(2, N_LAYERS * N_EXPERTS + 1), spare=st.integers(0, 127))
    def make(self, n_slots: int, spare: int) -> None:
        self.source = FakeExperts()
        self.budget = n_slots * sum(self.source.buffer_bytes) + spare
        self.store = ExpertStore(
            self.source, ram_budget_bytes=self.budget, n_experts_total=N_LAYERS * N_EXPERTS
        )
        self.layer_id = 0
        self.portions: Iterator[list[int]] = iter(())
        self.left: set[int] = set()  # wanted, not yet handed out
        self.hits: set[int] = set()  # those of them that were in RAM when wanted
        self.reads_of_hits: dict[int, int] = {}
        self.lent: dict[Key, tuple[Tensor, ...]] = {}
        self.loan = contextlib.ExitStack()

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.source.release()
            self.end_loan()
            within_patience(self.store.close)
            assert self.source.violations == []

    # --- the one who asks

    @precondition(lambda self: not self.lent)
    @rule(layer_id=LAYERS, expert_ids=SOME_EXPERTS)
    def want(self, layer_id: int, expert_ids: list[int]) -> None:
        """Begin a layer; the one before may have been given up half way, as after an error."""
        in_ram = set(self.store.residents().get(layer_id, []))
        within_patience(lambda: self.store.want(layer_id, expert_ids))
        self.portions, self.layer_id = self.store.portions(), layer_id
        self.left, self.hits = set(expert_ids), in_ram & set(expert_ids)
        self.reads_of_hits = {e: self.source.reads[layer_id, e] for e in self.hits}

    @precondition(lambda self: self.left and not self.lent)
    @rule()
    def borrow_a_portion(self) -> None:
        group = within_patience(lambda: next(self.portions))
        assert len(set(group)) == len(group) <= self.store.n_slots
        assert set(group) <= self.left, "handed out twice"
        if not self.hits <= set(group):
            assert not self.hits, "a miss came before a hit, or the hits came in pieces"
        self.left -= set(group)
        self.hits -= set(group)
        self.borrow(self.layer_id, group)
        if not self.left:
            assert within_patience(lambda: next(self.portions, None)) is None

    @precondition(lambda self: not self.left and len(self.lent) < self.store.n_slots)
    @rule(key=KEYS)
    def borrow_one_more(self, key: Key) -> None:
        self.borrow(key[0], [key[1]])

    def borrow(self, layer_id: int, expert_ids: list[int]) -> None:
        self.source.release()  # a borrower may have to wait for any read
        keys = [(layer_id, e) for e in expert_ids]
        broken = self.source.broken & set(keys)
        try:
            lent = within_patience(
                lambda: self.loan.enter_context(self.store.borrow(layer_id, expert_ids))
            )
        except OSError:
            assert broken, "an error of an expert that nobody asked for"
            return
        assert list(lent) == expert_ids
        for key in keys:
            self.lent[key] = lent[key[1]]
            self.source.protect(lent[key[1]])

    @precondition(lambda self: self.lent)
    @rule()
    def end_loan(self) -> None:
        for buffers in self.lent.values():
            self.source.unprotect(buffers)
        self.lent.clear()
        self.loan.close()
        self.loan = contextlib.ExitStack()

    @rule(layer_id=LAYERS, expert_ids=SOME_EXPERTS)
    def prefetch(self, layer_id: int, expert_ids: list[int]) -> None:
        within_patience(lambda: self.store.prefetch(layer_id, expert_ids))

    # --- the disk

    @rule(keys=st.sets(KEYS, min_size=1, max_size=6))
    def slow_down(self, keys: set[Key]) -> None:
        self.source.hold(keys)

    @rule()
    def speed_up(self) -> None:
        self.source.release()

    @rule(key=KEYS)
    def break_one(self, key: Key) -> None:
        self.source.broken.add(key)

    @rule()
    def heal(self) -> None:
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
        for key, buffers in self.lent.items():
            assert key[1] in residents[key[0]]
            assert all(map(torch.equal, buffers, self.source.content(key))), f"{key} was changed"

    @invariant()
    def what_was_in_ram_when_wanted_is_not_read_again(self) -> None:
        for expert_id in self.hits:
            reads = self.source.reads[self.layer_id, expert_id]
            assert reads == self.reads_of_hits[expert_id]
            assert expert_id in self.store.residents()[self.layer_id]


def test_the_laws_hold_in_any_order_of_events() -> None:
    run_state_machine_as_test(
        StoreLaws, settings=settings(max_examples=60, stateful_step_count=30, deadline=None)
    )


@settings(max_examples=25, deadline=None)
@given(
    steps=st.lists(st.tuples(LAYERS, SOME_EXPERTS, SOME_EXPERTS), min_size=1, max_size=12),
    n_slots=st.integers(2, N_LAYERS * N_EXPERTS),
)
def test_what_is_lent_and_the_requests_do_not_depend_on_the_budget(
    steps: list[tuple[int, list[int], list[int]]], n_slots: int
) -> None:
    source = FakeExperts()
    requests = 0
    with ExpertStore(source, ram_budget_bytes=n_slots * 128, n_experts_total=100) as store:

        def run(layer_id: int, wanted: list[int], guess: list[int]) -> None:
            store.want(layer_id, wanted)
            store.prefetch((layer_id + 1) % N_LAYERS, guess)
            for group in store.portions():
                with store.borrow(layer_id, group) as experts:
                    for expert_id, buffers in experts.items():
                        source.protect(buffers)
                        content = source.content((layer_id, expert_id))
                        assert all(map(torch.equal, buffers, content))
                        source.unprotect(buffers)

        for step in steps:
            within_patience(lambda step=step: run(*step))  # type: ignore[misc]
            requests += len(step[1])
        traffic = store.traffic()
    assert source.violations == []
    assert traffic.ram_requests + traffic.disk_requests == requests
    assert traffic.ram_bytes == requests * 128
    assert traffic.disk_requests - traffic.guessed <= source.reads.total()
