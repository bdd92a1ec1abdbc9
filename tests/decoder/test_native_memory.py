"""The memory that native passes take, and how much they may use of it."""

from pathlib import Path

import pytest
import torch
from native_goldens import N_TOKENS, Golden
from tiny_models import in_chunks
from trellis_models import trellis_model
from trellis_shapes import CONTEXT, DEMANDING_SHAPES, LAYERS

from lowmoe.decoder.native import NativeCache
from lowmoe.kernels import cpu


def test_a_pass_takes_no_native_memory_but_pages_of_the_cache(plain: Golden) -> None:
    native = plain.model.native(n_threads=2)
    with plain.model.decoder(native) as decoder:
        # What all layers at once need, they take once, when every expert has come into RAM.
        while not decoder.store.is_complete:
            in_chunks(decoder, plain.ids, [N_TOKENS])
        in_chunks(decoder, plain.ids, [N_TOKENS])
        before = cpu.allocated_bytes()
        cache = decoder.new_cache(600)
        assert cpu.allocated_bytes() == before  # nothing is taken before it is needed
        decoder.forward(plain.ids, cache)
        one_page = cpu.allocated_bytes()
        assert one_page - before == native.cache_bytes(N_TOKENS) == native.cache_bytes(256)
        for size in (1, 2, 57, 60, 60, 16):
            decoder.logits(decoder.forward(plain.ids[:size], cache))
        assert cache.n_tokens == 256
        assert cpu.allocated_bytes() == one_page
        decoder.forward(plain.ids[:1], cache)
        assert cpu.allocated_bytes() - before == native.cache_bytes(257) == 2 * (one_page - before)
        assert cache.keep(0) == 0  # what was taken is kept
        decoder.forward(plain.ids, cache)
        assert cpu.allocated_bytes() - before == native.cache_bytes(257)
        del cache
        assert cpu.allocated_bytes() == before


@pytest.mark.parametrize(
    ("n_kv_heads", "head_size"), [(2, 16), (8, 128), (20, 128), (32, 128)], ids=str
)
@pytest.mark.parametrize("kv", cpu.KV_FORMATS)
def test_a_page_takes_what_its_heads_do(kv: cpu.KvFormat, n_kv_heads: int, head_size: int) -> None:
    pages = cpu.KvPages(n_layers=3, n_kv_heads=n_kv_heads, head_size=head_size, format=kv)
    before = cpu.allocated_bytes()
    pages.reserve(1)
    of_a_page = 2 * cpu.kv_head_bytes(kv, head_size) * n_kv_heads * cpu.PAGE_TOKENS
    assert cpu.allocated_bytes() - before == 3 * of_a_page


@pytest.mark.parametrize("kv", cpu.KV_FORMATS)
def test_keys_and_values_take_the_bytes_of_their_format(plain: Golden, kv: cpu.KvFormat) -> None:
    # 3 key-value heads of 64; int8 has a float32 scale beside each.
    bytes_of_a_head = {"float32": 256, "float16": 128, "int8": 68}[kv]
    native = plain.model.native(kv=kv)
    assert native.cache_bytes(1) == 2 * LAYERS * 3 * 256 * bytes_of_a_head


@pytest.mark.parametrize("kv", cpu.KV_FORMATS)
def test_of_latents_only_one_row_a_token_is_kept(tmp_path: Path, kv: cpu.KvFormat) -> None:
    # 64 channels of a latent and 16 that turn; int8 has a float32 scale beside them.
    shape = DEMANDING_SHAPES["latents, sigmoids in groups, shared, lengthening rope"]
    with trellis_model(tmp_path / "folder", shape) as model:
        native = model.native(kv=kv)
        before = cpu.allocated_bytes()
        cache = native.new_cache(CONTEXT)
        cache.pages.reserve(1)
        assert cpu.allocated_bytes() - before == native.cache_bytes(1)
        bytes_of_a_row = {"float32": 320, "float16": 160, "int8": 84}[kv]
        assert native.cache_bytes(1) == LAYERS * 256 * bytes_of_a_row


def test_a_computation_gives_its_memory_back(plain: Golden) -> None:
    before = cpu.allocated_bytes()
    native = plain.model.native()
    assert cpu.allocated_bytes() - before > 0
    del native
    assert cpu.allocated_bytes() == before


def test_a_cache_that_is_full_is_not_written_beyond(plain: Golden) -> None:
    with plain.model.decoder(plain.model.native()) as decoder:
        cache = decoder.new_cache(10)
        assert isinstance(cache, NativeCache)
        with pytest.raises(AssertionError):
            decoder.forward(plain.ids[:11], cache)
        assert cache.pages.n_reserved == 0


def test_a_pass_of_more_tokens_than_there_is_scratch_for_is_refused(plain: Golden) -> None:
    native = plain.model.native(max_tokens=16)
    x = native.embed(plain.ids, torch.arange(plain.ids.shape[0]))
    for refused in (
        lambda: native.attend(x, 0, native.new_cache(N_TOKENS)),
        lambda: native.route(x, 0),
        lambda: native.foresee(x, 0),
    ):
        with pytest.raises(ValueError, match="more than the engine was made for"):
            refused()
