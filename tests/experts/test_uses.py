"""Counts of uses, whoever counts: a store, or native code that has every expert."""

import lowmoe
from lowmoe.experts.store import ExpertStore
from lowmoe.experts.uses import Uses
from tests.experts.test_store import EXPERT_BYTES, FakeExperts, use


def test_a_store_counts_every_expert_that_a_layer_wants_once_a_pass() -> None:
    uses, source = Uses([2, 0, 3]), FakeExperts()
    budget = 4 * EXPERT_BYTES
    with ExpertStore(source, ram_budget_bytes=budget, n_experts_total=5, uses=uses) as store:
        for layer_id, wanted in [(0, [1]), (2, [2, 0, 2]), (2, [0])]:
            use(store, source, layer_id, wanted)
    assert list(uses.counts) == [0, 1, 2, 0, 1]


def test_native_code_that_has_every_expert_counts_as_a_store_does() -> None:
    complete, by_store = (_uses_of_the_demo(ram) for ram in (None, "24MiB"))
    assert complete == by_store
    assert sum(complete) > 0


def _uses_of_the_demo(ram: str | None) -> list[int]:
    """In order of experts.  ram: too little for all, or None."""
    with lowmoe.load(ram=ram, gpu="none", bits=6) as model:
        model.generate("Once upon a time", max_new_tokens=32, temperature=0.0)
        store = model.runtime.store
        assert store.is_complete == (ram is None)
        assert store.uses is not None
        return list(store.uses.counts)
