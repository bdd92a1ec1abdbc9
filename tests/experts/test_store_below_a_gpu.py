"""What the store of RAM and disk is asked when a GPU above it has some of the experts."""

import pytest
from fake_source import FakeExperts, within_patience
from test_store import finish, settle, store_of

from lowmoe.experts.store import ExpertStore


def here(store: ExpertStore) -> set[int]:
    """Of layer 0."""
    keys = store.keys()
    return {expert_id for _, expert_id in keys}


def test_the_place_of_a_copy_goes_to_the_one_that_left_where_ram_is_full() -> None:
    source = FakeExperts()
    with store_of(source, 3) as store:
        settle(store, source, (0, 1), (0, 2), (0, 3))
        store.exchange((0, 2), (0, 7))
        finish(store, (0, 7))
        assert here(store) == {1, 3, 7}
        assert store.has(0, 7)
        assert not store.has(0, 2)


def test_a_copy_stays_while_there_is_room() -> None:
    source = FakeExperts()
    with store_of(source, 4) as store:
        settle(store, source, (0, 1), (0, 2), (0, 3))
        store.exchange((0, 2), (0, 7))
        finish(store, (0, 7))
        assert here(store) == {1, 2, 3, 7}
        assert len(store.in_memory()["ram"]) == 4


def test_a_copy_that_is_lent_stays_and_the_one_that_left_is_read_when_it_is_missed() -> None:
    source = FakeExperts()
    with store_of(source, 2) as store:
        settle(store, source, (0, 1), (0, 2))
        with store.borrow(0, [2]):
            store.exchange((0, 2), (0, 7))
            assert here(store) == {1, 2}
        store.exchange((0, 5), (0, 7))  # nor is anyone else thrown out
        assert here(store) == {1, 2}


def test_the_rest_is_what_is_nowhere_else() -> None:
    source = FakeExperts()
    elsewhere = [(0, 0), (0, 1), (1, 2)]
    with store_of(source, 5, n_experts_total=8) as store:
        while len(store.keys()) < 5:
            store.read_rest([4, 4], elsewhere)
            for key in list(store.keys()):
                finish(store, key)
        store.read_rest([4, 4], elsewhere)
        assert store.residents() == {0: [2, 3], 1: [0, 1, 3]}
    with store_of(source, 4, n_experts_total=8) as store:
        store.read_rest([4, 4], elsewhere)
        assert not store.keys(), "RAM would not hold it"


@pytest.mark.parametrize("n_most", [1, 2, 3, 100])
@pytest.mark.parametrize("n_slots", [2, 3, 8])
def test_portions_in_order_do_not_depend_on_what_is_in_ram(n_slots: int, n_most: int) -> None:
    source = FakeExperts()
    wanted = [1, 3, 4, 6, 7]
    for before in ([], [6], [7, 4]):
        with store_of(source, n_slots) as store:
            settle(store, source, *((0, e) for e in before))

            def run(store: ExpertStore = store) -> list[list[int]]:
                groups = []
                store.want(0, wanted)
                for group in store.portions_in_order(n_most):
                    with store.borrow(0, group) as experts:
                        assert list(experts) == group
                    groups.append(group)
                return groups

            step = min(n_most, n_slots)
            assert within_patience(run) == [wanted[i : i + step] for i in range(0, 5, step)]
