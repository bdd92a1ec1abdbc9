from pathlib import Path

import pytest
import torch
from tiny_models import TinyModel, decoder_over, in_chunks, reference, reference_logits, spec_of

from lowmoe.decoder.kv_cache import FIRST_ROOM, KvCache, LayerCache, cache_bytes
from lowmoe.spec import ModelSpec


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    TinyModel(config={"max_position_embeddings": 4 * FIRST_ROOM, "num_hidden_layers": 1}).save(
        folder
    )
    return folder


@pytest.fixture(scope="module")
def spec(folder: Path) -> ModelSpec:
    return spec_of(folder)


def room(cache: KvCache) -> int:
    return cache.layers[0]._keys.shape[0]


def test_keys_and_values_are_kept_while_the_buffers_grow(spec: ModelSpec) -> None:
    attention = spec.layers[0].attention
    capacity = 3 * FIRST_ROOM
    cache = LayerCache(attention, capacity, torch.float32)
    keys, values = torch.randn(2, capacity, attention.n_kv_heads, attention.head_size)
    first = 0
    for size in (1, FIRST_ROOM - 1, 1, 100, 2 * FIRST_ROOM - 101):
        end = first + size
        found = cache.append(keys[first:end], values[first:end], first)
        assert torch.equal(found[0], keys[:end])
        assert torch.equal(found[1], values[:end])
        first = end
    assert first == capacity


def test_buffers_are_no_longer_than_the_capacity(spec: ModelSpec) -> None:
    shape = (spec.layers[0].attention.n_kv_heads, spec.layers[0].attention.head_size)
    for capacity in (5, FIRST_ROOM + 1):
        cache = KvCache(spec, capacity, torch.bfloat16)
        assert room(cache) == 0  # nothing is taken before it is needed
        for position in range(capacity):
            one = torch.zeros(1, *shape, dtype=torch.bfloat16)
            cache.layers[0].append(one, one, position)
        assert room(cache) == capacity


def test_a_full_cache_takes_the_bytes_that_were_announced(spec: ModelSpec) -> None:
    cache = KvCache(spec, 77, torch.bfloat16)
    shape = (77, spec.layers[0].attention.n_kv_heads, spec.layers[0].attention.head_size)
    found = 0
    for layer in cache.layers:
        keys, values = layer.append(torch.zeros(shape), torch.zeros(shape), 0)
        assert keys.dtype == values.dtype == torch.bfloat16
        found += keys.untyped_storage().nbytes() + values.untyped_storage().nbytes()
    assert found == cache_bytes(spec, 77, torch.bfloat16)


def test_a_text_longer_than_the_first_buffers_gives_transformers_logits(folder: Path) -> None:
    n_tokens = 2 * FIRST_ROOM + 30
    ids = torch.randint(0, 97, (n_tokens,), generator=torch.Generator().manual_seed(2))
    with decoder_over(folder) as decoder:
        found = in_chunks(decoder, ids, [FIRST_ROOM - 2, 1, 1, 1, 1, FIRST_ROOM, 30])
    wanted = reference_logits(reference(folder), ids)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


def test_forgetting_the_latest_tokens_leaves_no_trace_of_them(folder: Path) -> None:
    ids = torch.arange(20)
    with decoder_over(folder) as decoder:
        cache = decoder.new_cache(20)
        decoder.forward(ids[:10], cache)
        decoder.forward(torch.tensor([90, 91, 92, 93]), cache)
        assert cache.keep(10) == 10
        again = decoder.logits(decoder.forward(ids[10:], cache))
        assert cache.n_tokens == 20
        assert torch.equal(again, in_chunks(decoder, ids, [10])[10:])
