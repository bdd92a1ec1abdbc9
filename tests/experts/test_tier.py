import mmap

import pytest
import torch

from lowmoe.experts import tier as tier_module
from lowmoe.experts.tier import ARENA_BYTES, RamTier, Slot


def taken(tier: RamTier) -> Slot:
    slot = tier.take_free()
    assert slot is not None
    return slot


@pytest.mark.parametrize("n_bytes", [1, 4095, 4096, 4097, 3 * 2**20 + 1])
def test_every_buffer_starts_on_a_page_and_has_its_size(n_bytes: int) -> None:
    slot = taken(RamTier((n_bytes, 64), 1))
    assert [b.numel() for b in slot.buffers] == [n_bytes, 64]
    for buffer in slot.buffers:
        assert buffer.dtype == torch.uint8
        assert buffer.data_ptr() % mmap.PAGESIZE == 0
        buffer.fill_(7)  # and can be written to the end


def test_memory_is_taken_only_when_it_is_needed_and_never_beyond_the_slots() -> None:
    tier = RamTier((100, 28), 2)
    assert tier.used_bytes == 0
    taken(tier)
    assert tier.used_bytes == 128
    taken(tier)
    assert tier.take_free() is None
    assert tier.used_bytes == 256


def test_a_cleared_slot_is_used_again_and_remembers_nothing() -> None:
    tier = RamTier((64,), 1)
    slot = taken(tier)
    tier.settle(slot, (3, 4))
    slot.guessed = True
    tier.clear(slot)
    assert tier.residents == {}
    again = taken(tier)
    assert again is slot
    assert (again.key, again.filling, again.guessed) == (None, None, False)


def test_memory_that_is_refused_may_be_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    n_in_arena = ARENA_BYTES // 4096
    tier = RamTier((4096,), n_in_arena + 2)
    for _ in range(n_in_arena):
        taken(tier)
    with monkeypatch.context() as patch:
        patch.setattr(tier_module, "Arena", refused)
        with pytest.raises(OSError, match="no memory"):
            tier.take_free()
    assert [taken(tier).buffers[0].numel() for _ in range(2)] == [4096, 4096]
    assert tier.take_free() is None


def refused(n_bytes: int) -> None:
    raise OSError("no memory")


def test_a_kernel_without_huge_pages_is_no_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 9999, raising=False)  # EINVAL
    assert taken(RamTier((64,), 1)).buffers[0].numel() == 64
