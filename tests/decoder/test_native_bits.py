"""What changes no bit of a native pass: threads, budgets, chunks, who else talks."""

from pathlib import Path

import pytest
import torch
from native_goldens import CHUNKS, N_TOKENS, Golden, errors, expected_error, some_ids
from tiny_models import in_chunks
from torch import Tensor
from trellis_models import Guided, Recording, fill, trellis_model
from trellis_shapes import LAYERS, Shape

from lowmoe.kernels import cpu


def test_threads_change_no_bit(golden: Golden) -> None:
    # Few passes: on a machine busy with something else, threads that wait for each other wait long.
    sizes = [30, 1, 2, 1, 26]
    with golden.model.decoder(golden.model.native()) as decoder:
        wanted = in_chunks(decoder, golden.ids, sizes)
    for n_threads in (2, 3):
        with golden.model.decoder(golden.model.native(n_threads=n_threads)) as decoder:
            assert torch.equal(in_chunks(decoder, golden.ids, sizes), wanted)


def test_threads_change_no_bit_where_a_token_is_attended_to_in_parts(tmp_path: Path) -> None:
    sizes = [250] * 9 + [1] * 4
    shape = Shape(config={"num_hidden_layers": 1})
    found = []
    with trellis_model(tmp_path / "folder", shape) as model:
        ids = some_ids(model, sum(sizes))
        for n_threads in (1, 2, 3):
            with model.decoder(model.native(n_threads=n_threads)) as decoder:
                found.append(in_chunks(decoder, ids, sizes))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("n_slots", [2, 3, 5, 9])
def test_logits_are_the_same_bits_whatever_the_budget(golden: Golden, n_slots: int) -> None:
    sizes = [11, 1, 1, 1, 20, 1, 2, 23]
    with golden.model.decoder(golden.model.native()) as decoder:
        wanted = in_chunks(decoder, golden.ids, sizes)
    with golden.model.decoder(golden.model.native(), n_slots=n_slots) as decoder:
        assert decoder.store.n_slots == min(n_slots, golden.model.spec.n_experts_total)
        for _ in range(2):  # with a cold store, then with a warm one
            assert torch.equal(in_chunks(decoder, golden.ids, sizes), wanted)
        assert decoder.store.traffic().disk_requests > 0


@pytest.mark.parametrize("sizes", CHUNKS.values(), ids=CHUNKS.keys())
def test_all_layers_in_one_call_give_the_bits_of_layer_by_layer(
    golden: Golden, sizes: list[int]
) -> None:
    native = golden.model.native()
    listener = Recording(native, LAYERS)  # which has to be asked layer by layer
    found, used = [], []
    for computation in (listener, native):
        with golden.model.decoder(computation) as decoder:
            fill(decoder.store, golden.model.spec)
            assert decoder.store.is_complete
            before = decoder.store.traffic()
            found.append(in_chunks(decoder, golden.ids, sizes))
            used.append(decoder.store.traffic() - before)
    assert listener.passes[0], "nothing was routed layer by layer"
    assert torch.equal(found[0], found[1])
    assert used[0] == used[1]
    assert used[0].ram_requests > 0
    assert used[0].disk_requests == 0


def test_a_computation_serves_one_store_after_another(plain: Golden) -> None:
    native, found = plain.model.native(), []
    for _ in range(2):
        with plain.model.decoder(native) as decoder:
            fill(decoder.store, plain.model.spec)
            found.append(in_chunks(decoder, plain.ids, [N_TOKENS]))
            assert decoder.store.traffic().ram_requests > 0
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize("isa", [isa for isa in cpu.isas() if isa != "scalar"])
def test_instruction_sets_agree(golden: Golden, isa: str) -> None:
    # Sums of floating-point numbers in another order: now and then one moves an activation across
    # the middle between two steps of int8, and all that follows from it may be rounded otherwise.
    for sizes in (CHUNKS["at once"], CHUNKS["one by one"]):
        found = []
        for name in (isa, "scalar"):
            guided = Guided(golden.model.native(isa=name), golden.answer.routings)
            with golden.model.decoder(guided) as decoder:
                found.append(in_chunks(decoder, golden.ids, sizes))
        error = errors(*found)
        assert error.min() < 1e-9, "no token at all for which nothing was rounded otherwise"
        assert error.mean() < expected_error(LAYERS, "float16", sizes) / 2


def test_a_chunk_longer_than_a_pass_may_have_is_cut_at_both_ends(plain: Golden) -> None:
    whole, short = plain.model.native(), plain.model.native(max_tokens=16)
    x = whole.embed(plain.ids, torch.arange(plain.ids.shape[0]))
    assert torch.equal(short.embed(plain.ids, torch.arange(plain.ids.shape[0])), x)
    # 60 tokens are 16 three times and 12: all of them more than few.
    assert torch.equal(short.logits(x), whole.logits(x))


def test_two_conversations_take_turns_and_do_not_hear_each_other(plain: Golden) -> None:
    with plain.model.decoder(plain.model.native()) as decoder:
        alone = [in_chunks(decoder, ids, [20]) for ids in (plain.ids, plain.ids.flip(0))]
        caches = [decoder.new_cache(N_TOKENS) for _ in range(2)]
        found: list[list[Tensor]] = [[], []]
        for first in range(0, N_TOKENS, 20):
            for which, ids in enumerate((plain.ids, plain.ids.flip(0))):
                hidden = decoder.forward(ids[first : first + 20], caches[which])
                found[which].append(decoder.logits(hidden))
    assert torch.equal(torch.cat(found[0]), alone[0])
    assert torch.equal(torch.cat(found[1]), alone[1])


def test_forgetting_the_latest_tokens_leaves_no_trace_of_them(plain: Golden) -> None:
    ids = plain.ids
    with plain.model.decoder(plain.model.native()) as decoder:
        wanted = in_chunks(decoder, ids, [10, 50])[10:]
        cache = decoder.new_cache(N_TOKENS)
        decoder.forward(ids[:10], cache)
        decoder.forward(ids[40:], cache)
        assert cache.keep(10) == 10
        assert torch.equal(decoder.logits(decoder.forward(ids[10:], cache)), wanted)
        assert cache.n_tokens == N_TOKENS
