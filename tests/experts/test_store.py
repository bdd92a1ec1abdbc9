import threading
from collections.abc import Iterable
from concurrent.futures import wait
from typing import cast

import pytest
import torch
from driven_readers import DrivenReaders, wait_for_one
from fake_source import PATIENCE_S, FakeExperts, within_patience

from lowmoe.errors import MemoryBudgetError
from lowmoe.experts import store as store_module
from lowmoe.experts.lender import NoLongerWanted
from lowmoe.experts.policy import UNKNOWN, Key, Popularity
from lowmoe.experts.source import CoarseFirst
from lowmoe.experts.store import N_READERS, ExpertStore
from lowmoe.experts.tier import Slot

EXPERT_BYTES = 128  # of FakeExperts


def store_of(
    source: FakeExperts,
    n_slots: int,
    n_experts_total: int = 100,
    popularity: Popularity = UNKNOWN,
) -> ExpertStore:
    # One byte short of another slot.
    budget = (n_slots + 1) * EXPERT_BYTES - 1
    return ExpertStore(
        source,
        ram_budget_bytes=budget,
        n_experts_total=n_experts_total,
        popularity=popularity,
    )


def use(store: ExpertStore, source: FakeExperts, layer_id: int, expert_ids: list[int]) -> list[int]:
    """Want, borrow and check experts as a layer does; returns the order they were handed out."""

    def run() -> list[int]:
        order: list[int] = []
        store.want(layer_id, expert_ids)
        for group in store.portions():
            with store.borrow(layer_id, group) as experts:
                assert list(experts) == group
                for expert_id, buffers in experts.items():
                    wanted = source.content((layer_id, expert_id))
                    assert all(map(torch.equal, buffers, wanted))
            order += group
        return order

    return within_patience(run)


def settle(store: ExpertStore, source: FakeExperts, *keys: Key) -> None:
    """Have these experts in RAM, least worth first."""
    for layer_id, expert_id in keys:
        use(store, source, layer_id, [expert_id])


def finish(store: ExpertStore, key: Key) -> None:
    """Wait until the reading of an expert has ended, well or not."""
    filling = store._tier.residents[key].filling
    assert filling is not None
    assert wait([filling], PATIENCE_S).done


@pytest.mark.parametrize("budget", [-5, 0, 1, 2 * EXPERT_BYTES - 1])
def test_a_budget_below_two_experts_is_refused_with_both_numbers(budget: int) -> None:
    left, missing = max(budget, 0), 2 * EXPERT_BYTES - budget
    message = f"^{left} bytes .* two of {EXPERT_BYTES} bytes .* at least {missing} bytes more"
    with pytest.raises(MemoryBudgetError, match=message):
        ExpertStore(FakeExperts(), ram_budget_bytes=budget, n_experts_total=8)


@pytest.mark.parametrize(
    ("budget", "total", "n_slots"), [(256, 100, 2), (383, 100, 2), (384, 100, 3), (9999, 5, 5)]
)
def test_the_budget_is_spent_to_the_last_expert_and_never_above_what_there_is(
    budget: int, total: int, n_slots: int
) -> None:
    with ExpertStore(FakeExperts(), ram_budget_bytes=budget, n_experts_total=total) as store:
        assert store.n_slots == n_slots
        assert store.resident_bytes == 0
        assert store.expert_bytes == EXPERT_BYTES


@pytest.mark.parametrize("n_slots", [2, 3, 5, 12])
def test_the_slots_ever_made_fit_the_budget(n_slots: int) -> None:
    source = FakeExperts()
    with store_of(source, n_slots) as store:
        for layer_id in range(3):
            store.prefetch(layer_id, [3, 1])
            use(store, source, layer_id, [0, 1, 2, 3])
        assert store.resident_bytes == n_slots * EXPERT_BYTES
    # Seen from the reader's side: two buffers for each expert there is room for.
    assert len(source.memory) == 2 * n_slots


def test_more_experts_at_once_than_there_are_slots_are_refused() -> None:
    with (
        store_of(FakeExperts(), 3) as store,
        pytest.raises(MemoryBudgetError, match=r"^4 experts .* but RAM is given to 3\.$"),
        store.borrow(0, [0, 1, 2, 3]),
    ):
        pass


@pytest.mark.parametrize("n_slots", [2, 3, 4, 7, 8, 30])
def test_every_expert_wanted_is_handed_out_exactly_once(n_slots: int) -> None:
    source = FakeExperts()
    with store_of(source, n_slots) as store:
        for wanted in ([4, 0, 2], [1, 2, 3, 4, 5, 6, 7], [7], [0, 1, 2, 3, 4, 5, 6, 7], [2, 2, 5]):
            assert sorted(use(store, source, 0, wanted)) == sorted(set(wanted))


def test_what_is_in_ram_is_handed_out_first_while_the_rest_is_read() -> None:
    source = FakeExperts()
    with store_of(source, 4) as store:
        settle(store, source, (0, 2), (0, 3))
        source.hold([(0, 0), (0, 1)])
        store.want(0, [0, 1, 2, 3])
        portions = store.portions()
        assert next(portions) == [2, 3]
        source.await_begin((0, 0))
        source.await_begin((0, 1))
        source.release()
        assert sorted(e for group in portions for e in group) == [0, 1]
        assert source.reads[0, 2] == source.reads[0, 3] == 1


def test_reads_hide_behind_however_many_experts_are_in_ram() -> None:
    source = FakeExperts()
    n_hits = N_READERS + 3
    with store_of(source, n_hits + 2) as store:
        settle(store, source, *((0, e) for e in range(n_hits)))
        source.hold([(0, 50), (0, 51)])
        store.want(0, [*range(n_hits), 50, 51])
        portions = store.portions()
        assert next(portions) == list(range(n_hits))
        source.await_begin((0, 50))  # nothing was given back yet
        source.await_begin((0, 51))
        source.release()
        assert sorted(e for group in portions for e in group) == [50, 51]


def test_a_second_use_reads_nothing() -> None:
    source = FakeExperts()
    with store_of(source, 4) as store:
        for _ in range(3):
            use(store, source, 0, [0, 1, 2, 3])
    assert set(source.reads.values()) == {1}


def test_what_was_in_ram_when_wanted_is_still_there_when_its_turn_comes() -> None:
    source = FakeExperts()
    with store_of(source, 3) as store:
        settle(store, source, (0, 7), (0, 8))
        source.hold([(1, 0)])
        store.prefetch(1, [0])  # takes the third slot until it is released
        source.await_begin((1, 0))
        store.want(0, [0, 7, 8])
        portions = store.portions()
        assert next(portions) == [7, 8]
        store.prefetch(1, [1, 2])
        with store.borrow(0, [7, 8]):
            source.release()
        assert list(portions) == [[0]]
        assert source.reads[0, 7] == source.reads[0, 8] == 1


def test_a_guess_never_takes_the_place_of_what_is_lent_or_wanted() -> None:
    source = FakeExperts()
    with store_of(source, 3) as store:
        settle(store, source, (0, 0), (0, 1), (0, 2))
        with store.borrow(0, [0]):
            store.want(0, [1, 2])
            store.prefetch(1, [0, 1, 2])
            assert store.residents() == {0: [0, 1, 2]}
        assert source.reads.total() == 3


def test_hits_stay_though_more_is_wanted_than_fits() -> None:
    source = FakeExperts()
    with store_of(source, 2) as store:
        settle(store, source, (0, 7), (0, 8))
        assert use(store, source, 0, [0, 1, 7, 8])[:2] == [7, 8]
        assert source.reads[0, 7] == source.reads[0, 8] == 1


def test_a_borrower_waits_for_a_guess_rather_than_drop_what_is_wanted_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(store_module, "ThreadPoolExecutor", DrivenReaders)
    monkeypatch.setattr(store_module, "wait", wait_for_one)
    source = FakeExperts()
    with store_of(source, 2) as store:
        store.prefetch(0, [5])
        store.prefetch(1, [0])
        store.want(0, [0, 5])  # no slot is left for 0 until a guess has been read
        cast(DrivenReaders, store._readers).finish(0)
        assert store.residents() == {0: [5]}
        with store.borrow(0, [0]):
            assert store.residents() == {0: [0, 5]}
    assert source.reads[0, 5] == 1


def test_guessing_what_is_in_ram_is_no_guess() -> None:
    source = FakeExperts()
    with store_of(source, 4) as store:
        settle(store, source, (0, 1))
        store.prefetch(0, [1])
        use(store, source, 0, [1])
        assert store.traffic().guessed == store.traffic().guessed_right == 0


def test_an_expert_lent_twice_stays_until_it_is_given_back_twice() -> None:
    source = FakeExperts()
    with store_of(source, 2) as store, store.borrow(0, [0]):
        with store.borrow(0, [0]):
            pass
        use(store, source, 0, [1])
        use(store, source, 0, [2])
        store.prefetch(0, [3])
        assert 0 in store.residents()[0]
    assert source.reads[0, 0] == 1


def test_a_guess_takes_at_most_half_of_the_slots() -> None:
    source = FakeExperts()
    with store_of(source, 6) as store:
        settle(store, source, *((0, e) for e in range(6)))
        store.prefetch(1, range(6))
        for expert_id in range(3):
            finish(store, (1, expert_id))
        assert store.residents() == {0: [3, 4, 5], 1: [0, 1, 2]}


def test_what_a_layer_waits_for_is_read_before_what_is_guessed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(store_module, "ThreadPoolExecutor", DrivenReaders)
    n_wanted = 2 * N_READERS + 1
    source = FakeExperts()
    with store_of(source, 2 * n_wanted) as store:
        store.want(0, range(n_wanted))
        store.prefetch(1, range(n_wanted))
        readers = cast(DrivenReaders, store._readers)
        for _ in range(n_wanted):
            readers.finish(0)
        assert source.reads.keys() == {(0, e) for e in range(n_wanted)}


def test_what_a_layer_waits_for_is_read_before_the_rest_of_what_is_in_ram(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(store_module, "ThreadPoolExecutor", DrivenReaders)
    first, rest = FakeExperts((96,)), FakeExperts((32,))
    budget = 20 * EXPERT_BYTES
    with ExpertStore(
        FakeExperts(),
        ram_budget_bytes=budget,
        n_experts_total=100,
        coarse=CoarseFirst(first, rest),
    ) as store:
        n_ready = N_READERS + 1
        use_parts(store, range(n_ready))
        store.want(0, range(2 * n_ready))  # the first half again
        for _ in range(n_ready):
            cast(DrivenReaders, store._readers).finish(0)
        assert first.reads.total() == 2 * n_ready
        assert rest.reads.total() == 0


def use_parts(store: ExpertStore, expert_ids: Iterable[int]) -> None:
    """Have the first parts of these experts in RAM."""
    store.want(0, list(expert_ids))
    for group in store.portions():
        with store.borrow(0, group):
            pass


def test_a_guess_that_nobody_wants_is_not_read_if_that_has_not_begun(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(store_module, "ThreadPoolExecutor", DrivenReaders)
    source = FakeExperts()
    with store_of(source, 40) as store:
        guesses = range(N_READERS + 6)
        store.prefetch(1, guesses)
        store.want(0, [7])  # another pass: the one that guessed was given up
        readers = cast(DrivenReaders, store._readers)
        while readers.finish_one():
            pass
        begun = {(1, e) for e in range(N_READERS)}
        assert source.reads.keys() == {*begun, (0, 7)}
        assert store.keys() == {*begun, (0, 7)}


def test_an_expert_whose_reading_could_not_be_begun_can_be_asked_for_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = FakeExperts()
    with store_of(source, 2) as store:
        with monkeypatch.context() as patch:
            patch.setattr(store._readers, "submit", raise_interrupt)
            with pytest.raises(KeyboardInterrupt):
                store.want(0, [1])
        assert use(store, source, 0, [1]) == [1]
        assert use(store, source, 0, [0, 2]) == [0, 2]


def raise_interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_what_a_store_was_given_is_told_until_it_is_taken_or_closed() -> None:
    source = FakeExperts()
    with store_of(source, 4) as store:
        assert store.unfilled_bytes == 4 * EXPERT_BYTES
        use(store, source, 0, [1])
        assert store.unfilled_bytes == 3 * EXPERT_BYTES
    assert store.unfilled_bytes == 0


def test_a_right_guess_is_read_once_and_counted() -> None:
    source = FakeExperts()
    with store_of(source, 4) as store:
        store.prefetch(0, [1, 2])
        finish(store, (0, 2))  # else it may be given up
        use(store, source, 0, [1, 3])
        traffic = store.traffic()
        assert (traffic.guessed, traffic.guessed_right) == (2, 1)
        use(store, source, 0, [1, 2])
        assert store.traffic().guessed_right == 2
    assert source.reads == {(0, 1): 1, (0, 2): 1, (0, 3): 1}


def test_a_guess_that_is_not_read_after_all_is_not_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(store_module, "ThreadPoolExecutor", DrivenReaders)
    with store_of(FakeExperts(), 16) as store:
        store.prefetch(0, range(N_READERS + 2))
        assert store.traffic().guessed == N_READERS + 2
        store.want(1, [0])  # only those whose reading has begun remain
        assert store.traffic().guessed == N_READERS


def test_a_failing_read_raises_where_the_expert_is_borrowed_and_the_store_goes_on() -> None:
    source = FakeExperts()
    with store_of(source, 2) as store:
        source.broken.add((0, 1))
        with pytest.raises(OSError, match=r"cannot read \(0, 1\)"):
            use(store, source, 0, [0, 1])
        with pytest.raises(OSError, match=r"cannot read \(0, 1\)"):
            use(store, source, 0, [1])  # asked again, read again
        assert source.reads[0, 1] == 2
        use(store, source, 0, [0, 2, 3])
        source.broken.clear()
        assert use(store, source, 0, [1]) == [1]


def test_a_borrower_who_is_refused_may_ask_again() -> None:
    source = FakeExperts()
    with store_of(source, 2) as store:
        source.broken.add((0, 1))
        with pytest.raises(OSError, match="cannot read"), store.borrow(0, [1]):
            pass
        source.broken.clear()
        with store.borrow(0, [1]) as experts:
            assert all(map(torch.equal, experts[1], source.content((0, 1))))


def test_a_failed_guess_is_nobodys_error_and_is_read_again_for_who_needs_it() -> None:
    source = FakeExperts()
    with store_of(source, 4) as store:
        source.broken.add((0, 1))
        store.prefetch(0, [1])
        finish(store, (0, 1))
        use(store, source, 0, [0, 2])
        assert store.residents() == {0: [0, 2]}
        before = store.traffic()
        with pytest.raises(OSError, match="cannot read"):
            use(store, source, 0, [1])
        assert (store.traffic() - before).disk_requests == 1
        source.broken.clear()
        store.prefetch(0, [1])
        assert sorted(use(store, source, 0, [0, 1])) == [0, 1]


def test_a_guess_that_failed_and_is_then_wanted_never_shows_its_old_error() -> None:
    source = FakeExperts()
    with store_of(source, 4) as store:
        source.broken.add((0, 1))
        store.prefetch(0, [1])
        finish(store, (0, 1))
        source.broken.clear()
        assert use(store, source, 0, [1]) == [1]
        assert source.reads[0, 1] == 2


def test_a_borrower_waits_for_a_slot_that_a_slow_guess_holds() -> None:
    source = FakeExperts()
    with store_of(source, 2) as store:
        source.hold([(1, 0)])
        store.prefetch(1, [0])
        source.await_begin((1, 0))
        store.want(0, [0, 1])
        portions = store.portions()
        group = next(portions)
        with store.borrow(0, group):
            source.release()  # the other slot holds the guess until now
        with store.borrow(0, next(portions)) as experts:
            assert len(experts) == 1
        assert next(portions, None) is None


def test_a_read_that_ends_while_a_borrower_looks_for_room_does_not_confuse_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = FakeExperts()
    with store_of(source, 2) as store:
        source.hold([(1, 0)])
        store.prefetch(1, [0])
        source.await_begin((1, 0))
        look = store._evict

        def look_and_be_overtaken(layer_id: int, keep: set[Key]) -> Slot | None:
            found = look(layer_id, keep)
            if found is None and (1, 0) in source._gates:
                source.release((1, 0))
                finish(store, (1, 0))
            return found

        monkeypatch.setattr(store, "_evict", look_and_be_overtaken)

        def borrow_two() -> list[int]:
            with store.borrow(0, [0, 1]) as experts:
                return list(experts)

        assert within_patience(borrow_two) == [0, 1]


def test_closing_waits_for_reads_under_way() -> None:
    source = FakeExperts()
    store = store_of(source, 4)
    source.hold([(0, 0)])
    store.prefetch(0, [0])
    source.await_begin((0, 0))
    source.release()
    store.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("lowmoe-read")]


def test_experts_used_often_outlive_those_used_lately() -> None:
    source = FakeExperts()
    with store_of(source, 3) as store:
        for _ in range(5):
            use(store, source, 0, [0, 1])
        for expert_id in (2, 3, 4, 5):
            use(store, source, 0, [expert_id])
        assert store.residents() == {0: [0, 1, 5]}


def test_requests_and_bytes_add_up() -> None:
    source = FakeExperts()
    with store_of(source, 3) as store:
        use(store, source, 0, [0, 1])
        before = store.traffic()
        use(store, source, 0, [1, 2])
        store.prefetch(0, [3])
        finish(store, (0, 3))
        after = store.traffic() - before
    assert (after.ram_requests, after.disk_requests) == (1, 1)
    assert after.ram_bytes == 2 * EXPERT_BYTES
    assert after.disk_bytes == 2 * EXPERT_BYTES  # of which one is a guess
    assert (after.guessed, after.guessed_right) == (1, 0)


# --- everything in RAM


def test_a_store_is_complete_once_every_expert_is_in_ram_and_lends_them_all() -> None:
    source = FakeExperts()
    with store_of(source, 4, n_experts_total=4) as store:
        use(store, source, 0, [0, 1])
        assert not store.is_complete
        use(store, source, 1, [0, 1])
        assert store.is_complete
        layers = store.lend_all(3)
        assert [len(layer) for layer in layers] == [2, 2, 0]
        for layer_id, layer in enumerate(layers):
            for expert_id, buffers in enumerate(layer):
                assert all(map(torch.equal, buffers, source.content((layer_id, expert_id))))
        before = store.traffic()
        store.count_used(3)
        used = store.traffic() - before
        assert (used.ram_requests, used.disk_requests) == (3, 0)
        assert used.ram_bytes == 3 * EXPERT_BYTES
        use(store, source, 0, [0, 1])  # what is lent for good can still be borrowed


def test_a_store_with_an_expert_on_its_way_is_not_complete() -> None:
    source = FakeExperts()
    source.hold([(0, 1)])
    with store_of(source, 2, n_experts_total=2) as store:
        use(store, source, 0, [0])
        store.prefetch(0, [1])
        assert store.has_all
        assert not store.is_complete
        source.release()
        use(store, source, 0, [1])
        assert store.is_complete


def test_the_rest_of_a_model_that_fits_is_read_though_nobody_asks_for_it() -> None:
    source = FakeExperts()
    with store_of(source, 6, n_experts_total=6) as store:
        use(store, source, 0, [2])

        def read_on() -> None:
            while not store.is_complete:
                store.read_rest([3, 3])

        within_patience(read_on)
        assert store.residents() == {0: [0, 1, 2], 1: [0, 1, 2]}
        assert set(source.reads.values()) == {1}, "an expert was read twice"


def test_of_the_rest_the_popular_are_read_first() -> None:
    source = FakeExperts()
    popularity = Popularity({(1, 2): 0.9, (0, 1): 0.5, (1, 0): 0.2})
    with store_of(source, 6, n_experts_total=6, popularity=popularity) as store:

        def read_on() -> None:
            while not store.is_complete:
                store.read_rest([3, 3])

        within_patience(read_on)
    # Two at a time, which may begin in either order.
    first = list(source.reads)
    assert set(first[:2]) == {(1, 2), (0, 1)}
    assert first.index((1, 0)) < 4


def test_no_expert_is_read_unasked_where_not_all_fit_and_none_is_known_to_be_popular() -> None:
    source = FakeExperts()
    with store_of(source, 5, n_experts_total=6) as store:
        store.read_rest([3, 3])
        assert not store.read_on()
        assert not source.reads
        assert store.residents() == {}


def test_where_not_all_fit_the_popular_are_read_until_ram_is_full() -> None:
    source = FakeExperts()
    popularity = Popularity({(1, 2): 0.9, (0, 1): 0.5, (1, 0): 0.2, (0, 0): 0.1})
    with store_of(source, 4, n_experts_total=6, popularity=popularity) as store:
        use(store, source, 0, [2])
        store.read_rest([3, 3])

        def read_on() -> None:
            while len(store.keys()) < 4:
                store.read_on()
            while sum(map(len, store.residents().values())) < 4:
                pass

        within_patience(read_on)
        assert store.residents() == {0: [1, 2], 1: [0, 2]}
        assert not store.read_on(), "what was asked for left for what was not"
        assert set(source.reads.values()) == {1}


# --- how far guesses are trusted


def test_guesses_of_a_rank_that_never_comes_true_are_read_no_more() -> None:
    source = FakeExperts()
    with store_of(source, 6) as store:
        for n in range(400):
            layer_id = n % 50
            store.prefetch(layer_id, [100 + n, 500])  # the second comes true, the first never
            use(store, source, layer_id, [500])
        wrong = sum(count for (_, e), count in source.reads.items() if e != 500)
    assert 0 < wrong < 30, f"{wrong} of 400 wrong guesses were read"


def test_a_guess_of_another_layer_than_the_one_that_wants_teaches_nothing() -> None:
    source = FakeExperts()
    with store_of(source, 6) as store:
        for n in range(400):
            store.prefetch(7, [n])
            use(store, source, n % 5, [0])
        before = store.traffic().guessed
        store.prefetch(8, [1000])
        assert store.traffic().guessed == before + 1


# --- many experts


def test_of_many_experts_those_worth_least_leave_and_none_that_was_used_meanwhile() -> None:
    n_slots = 320
    source = FakeExperts()
    with store_of(source, n_slots, n_experts_total=2 * n_slots) as store:
        settle(store, source, *((0, e) for e in range(n_slots)))
        use(store, source, 0, [n_slots])
        assert not store.has(0, 0)
        use(store, source, 0, [1])
        use(store, source, 0, [n_slots + 1])
        assert store.has(0, 1)
        assert not store.has(0, 2)
        for e in range(2, 6):
            use(store, source, 0, [n_slots + e])
        gone = [e for e in range(n_slots) if not store.has(0, e)]
        assert gone == [0, 2, 3, 4, 5, 6]


def test_what_nobody_waits_for_is_not_wanted_and_nothing_has_changed() -> None:
    source, is_wanted = FakeExperts(), True
    with store_of(source, 3) as store:
        with store.while_wanted(lambda: is_wanted):
            use(store, source, 0, [1])
            before = store.traffic()
            is_wanted = False
            with pytest.raises(NoLongerWanted):
                store.want(1, [0, 2])
        assert list(source.reads) == [(0, 1)]
        assert store.traffic() == before
        assert list(store.portions()) == []
        use(store, source, 1, [0, 2])
