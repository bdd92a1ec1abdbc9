"""Slots on a stand-in for a GPU: who gets one, when, and what operations find meanwhile."""

import ctypes

import pytest
import torch
from torch import Tensor

from lowmoe.errors import MemoryBudgetError
from lowmoe.experts.gpu_slots import GpuSlots
from lowmoe.experts.pinned_ring import N_BUFFERS, PIECE_BYTES, PinnedRing
from lowmoe.experts.policy import UNKNOWN, Key, Popularity
from lowmoe.experts.staging import Staging
from tests.stand_in_gpu import POISON, StandInGpu

PART_BYTES = (100, 30)
N_EXPERTS = [4, 4, 3]
WITHIN = 2  # experts of a layer that a prompt may bring at once


class Numbered:
    """A source whose experts' parts are all one number, their own."""

    buffer_bytes = (4096, 4096)

    def read(self, layer_id: int, expert_id: int, buffers: list[Tensor]) -> int:
        for part, buffer in enumerate(buffers):
            buffer.fill_(number((layer_id, expert_id), part))
        return 8192


def number(key: Key, part: int) -> int:
    return 50 * part + 10 * key[0] + key[1] + 1


def parts_of(key: Key) -> list[Tensor]:
    return [torch.full((4096,), number(key, part), dtype=torch.uint8) for part in range(2)]


def filled(n_slots: int, popularity: Popularity = UNKNOWN) -> GpuSlots:
    gpu = StandInGpu()
    slots = GpuSlots(
        PART_BYTES,
        N_EXPERTS,
        gpu,
        PinnedRing(gpu, 4096),
        n_slots=n_slots,
        popularity=popularity,
    )
    slots.fill(Numbered(), lambda done, total: None)
    return slots


def found(slots: GpuSlots, key: Key) -> list[set[int]] | None:
    """The numbers that operations find in an expert's parts; None where they find no expert."""
    addresses = slots.tables[key].tolist()
    assert addresses[2] == 0
    if addresses[0] == 0:
        return None
    return [
        set((ctypes.c_uint8 * n).from_address(address))
        for address, n in zip(addresses[:2], PART_BYTES, strict=True)
    ]


def its_own(key: Key) -> list[set[int]]:
    return [{number(key, part)} for part in range(2)]


def use(slots: GpuSlots, key: Key, times: int) -> None:
    for _ in range(times):
        slots.record(key[0], [key[1]])


def test_the_popular_have_slots_first_and_leave_for_those_that_are_used_more() -> None:
    slots = filled(3, Popularity({(2, 1): 0.9, (0, 3): 0.5, (0, 2): 0.4}))
    assert slots.residents() == [(0, 2), (0, 3), (2, 1)]
    use(slots, (0, 0), 20)  # a share of .4 counts like 25 uses; decayed, it is less than 20 soon
    assert slots.candidate(anyone) is None
    use(slots, (0, 0), 40)
    assert slots.candidate(anyone) == (0, 0)


def test_memory_is_given_back_piece_by_piece_but_for_two_slots() -> None:
    slots = filled(6)
    for n_left in (5, 4, 3, 2):
        assert slots.give_back() == 1
        assert slots.n_slots == n_left
        assert len(slots.residents()) == n_left
        for layer_id, n in enumerate(N_EXPERTS):
            for expert_id in range(n):
                key = (layer_id, expert_id)
                assert found(slots, key) == (its_own(key) if slots.has(*key) else None)
    assert slots.give_back() == 0
    assert slots.n_slots == 2


def test_an_expert_on_its_way_when_memory_is_given_back_does_not_arrive() -> None:
    slots = filled(6)
    use(slots, (1, 3), 9)
    slots.promote((1, 3), parts_of((1, 3)))
    assert slots.give_back() == 1
    assert slots.welcome() is None
    assert found(slots, (1, 3)) is None
    use(slots, (1, 3), 9)
    slots.promote((1, 3), parts_of((1, 3)))
    assert slots.welcome() == (1, 3)
    assert found(slots, (1, 3)) == its_own((1, 3))


def anyone(key: Key) -> bool:
    return True


def test_every_layer_gets_its_first_expert_before_any_gets_its_second() -> None:
    slots = filled(5)
    assert slots.residents() == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]
    for key in slots.residents():
        assert found(slots, key) == its_own(key)
    assert found(slots, (2, 1)) is None


def test_there_are_no_more_slots_than_experts() -> None:
    assert filled(1000).n_slots == sum(N_EXPERTS)


@pytest.mark.parametrize("n_slots", [1, 0, -3])
def test_too_few_slots_are_refused(n_slots: int) -> None:
    with pytest.raises(MemoryBudgetError, match=f"{n_slots} experts fit on the GPU, but 2 must"):
        filled(n_slots)


def test_progress_is_of_bytes() -> None:
    gpu, steps = StandInGpu(), []
    slots = GpuSlots(PART_BYTES, N_EXPERTS, gpu, PinnedRing(gpu, 4096), n_slots=3)
    slots.fill(Numbered(), lambda done, total: steps.append((done, total)))
    assert steps == [(130, 390), (260, 390), (390, 390)]


def test_an_expert_arrives_a_pass_after_it_was_sent_in_place_of_the_least_used() -> None:
    slots = filled(6)
    use(slots, (1, 0), 5)
    use(slots, (1, 3), 9)
    assert slots.candidate(anyone) == (1, 3)
    slots.promote((1, 3), parts_of((1, 3)))
    # Who leaves is not found any more, who comes not yet.
    assert not slots.has(1, 1)
    assert not slots.has(1, 3)
    assert found(slots, (1, 1)) is None
    assert found(slots, (1, 3)) is None
    assert slots.candidate(anyone) is None, "one at a time"
    slots.welcome()
    assert slots.has(1, 3)
    assert found(slots, (1, 3)) == its_own((1, 3))
    assert len(slots.residents()) == slots.n_slots == 6
    for key in slots.residents():
        assert found(slots, key) == its_own(key)


def test_who_reads_a_slot_before_its_expert_has_arrived_reads_poison() -> None:
    # Else the tests of whole passes would find nothing if a table were changed too early.
    slots = filled(6)
    use(slots, (1, 3), 9)
    place = slots._memory(slots._slot_of[1, 0])
    slots._policy.record(1, [1])
    _, sending = slots.promote((1, 3), parts_of((1, 3)))
    sending.join()
    assert set(place[:100].tolist()) == {POISON}


@pytest.mark.parametrize(
    ("there", "comes", "is_promoted"), [(0, 1, True), (4, 5, False), (4, 9, True)]
)
def test_an_expert_must_be_used_clearly_more_than_the_one_that_leaves(
    there: int, comes: int, is_promoted: bool
) -> None:
    slots = filled(3)
    use(slots, (0, 0), there)
    use(slots, (0, 2), comes)
    assert (slots.candidate(anyone) == (0, 2)) == is_promoted


def test_only_who_was_missed_last_and_may_come_is_promoted() -> None:
    slots = filled(3)
    use(slots, (0, 2), 9)
    assert slots.candidate(lambda key: False) is None
    use(slots, (0, 0), 1)
    assert slots.candidate(anyone) is None
    use(slots, (0, 2), 1)
    assert slots.candidate(anyone) == (0, 2)


def test_a_layer_that_has_no_slot_takes_none_from_others() -> None:
    slots = filled(2)
    assert slots.residents() == [(0, 0), (1, 0)]
    use(slots, (2, 0), 50)
    assert slots.candidate(anyone) is None


def test_a_slot_whose_expert_could_not_be_sent_is_used_again() -> None:
    slots = filled(3)
    use(slots, (0, 2), 9)
    slots.promote((0, 2), parts_of((0, 2))[:1])
    with pytest.raises(ValueError, match="zip"):
        slots.welcome()
    assert not slots.has(0, 2)
    slots.promote((0, 2), parts_of((0, 2)))
    slots.welcome()
    assert found(slots, (0, 2)) == its_own((0, 2))
    assert len(slots.residents()) == 3


# --- the ring, and what passes through


def test_a_buffer_is_not_written_while_it_is_copied_from() -> None:
    gpu = StandInGpu()
    ring = PinnedRing(gpu, 100)
    places = [torch.zeros(100, dtype=torch.uint8) for _ in range(3 * N_BUFFERS)]
    for i, place in enumerate(places):
        event = ring.send([place], [torch.full((100,), i + 1, dtype=torch.uint8)])
    event.wait()
    assert [set(place.tolist()) for place in places] == [{i + 1} for i in range(len(places))]
    ring.close()


def test_what_is_longer_than_a_buffer_is_sent_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowmoe.experts.pinned_ring.PIECE_BYTES", 64)
    ring = PinnedRing(StandInGpu(), 1000)
    assert PinnedRing.needed_bytes(1000) == N_BUFFERS * 64
    source = torch.randint(0, 256, (1000,), dtype=torch.uint8)
    places = [torch.zeros(n, dtype=torch.uint8) for n in (999, 64, 1)]
    ring.begin(lambda: ring.send(places, [source] * 3), None).event().wait()
    assert all(torch.equal(place, source[: place.shape[0]]) for place in places)
    ring.close()


@pytest.mark.parametrize(
    ("longest", "size"), [(1, 1), (1024, 1024), (1025, 2048), (5 * 2**20, PIECE_BYTES)]
)
def test_buffers_are_powers_of_two_since_torch_pins_nothing_else(longest: int, size: int) -> None:
    staged: list[int] = []

    class Counting(StandInGpu):
        def staging(self, n_bytes: int) -> Tensor:
            staged.append(n_bytes)
            return super().staging(n_bytes)

    PinnedRing(Counting(), longest).close()
    assert staged == [size] * N_BUFFERS
    assert PinnedRing.needed_bytes(longest) == N_BUFFERS * size


def test_large_parts_are_copied_by_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowmoe.experts.pinned_ring.COPIED_AT_ONCE", 7)
    ring = PinnedRing(StandInGpu(), 1000)
    source = torch.randint(0, 256, (1000,), dtype=torch.uint8)
    place = torch.zeros(999, dtype=torch.uint8)
    with torch.inference_mode():
        ring.send([place], [source]).wait()
    assert torch.equal(place, source[:999])
    ring.close()


def test_what_passes_through_is_found_until_it_is_done_and_then_only_the_next() -> None:
    gpu = StandInGpu()
    staging = Staging(PART_BYTES, 8, gpu, PinnedRing(gpu, 4096))
    assert staging.n_staged == WITHIN
    for group in ([0, 1, 2, 3, 4, 5, 6, 7], [5], [2, 0, 1]):
        left = list(group)
        with staging.passage({e: parts_of((0, e)) for e in group}) as passage:
            for table in passage.tables():
                now, left = left[:WITHIN], left[WITHIN:]
                assert sorted(now) == (table[:, 0] != 0).nonzero().flatten().tolist()
                for e in now:
                    assert staged_at(staging, table[e, 0].item()) == {number((0, e), 0)}
        assert left == []
        n_sent = [n_experts for _, n_experts in passage.sendings]
        assert sum(n_sent) == len(group)
        assert all(sending.seconds() is not None for sending, _ in passage.sendings)


def staged_at(staging: Staging, address: int) -> set[int]:
    """What is in the first part of the expert that is there."""
    for room in staging._sets:
        at = address - room.memory.data_ptr()
        if 0 <= at < room.memory.nbytes:
            return set(room.memory.flatten()[at : at + 100].tolist())
    return pytest.fail("an address outside all sets")


def test_what_cannot_be_sent_is_told_who_asks_where_it_is_and_no_other() -> None:
    gpu = StandInGpu()
    staging = Staging(PART_BYTES, 8, gpu, PinnedRing(gpu, 4096))
    broken = {e: parts_of((0, e))[: 1 if e == 3 else 2] for e in range(6)}
    with staging.passage(broken) as passage, pytest.raises(ValueError, match="zip"):
        list(passage.tables())
    with staging.passage({3: parts_of((0, 3))}) as passage:
        (address,) = [table[3, 0].item() for table in passage.tables()]
        assert staged_at(staging, address) == {number((0, 3), 0)}
