"""A conversation that begins like another goes on from a copy of it, bit for bit."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from native_goldens import N_TOKENS
from test_hybrid import ALL, hybrid
from test_on_gpu import on_gpu
from tiny_models import TinyModel, decoder_over
from torch import Tensor
from trellis_models import trellis_model
from trellis_shapes import DEMANDING_SHAPES, SHAPES

from lowmoe.decoder.decoder import Decoder
from lowmoe.decoder.state_cache import TAIL_TOKENS
from lowmoe.kernels import cpu
from tests.stand_in_gpu import StandInGpu

IDS = torch.randint(0, 97, (N_TOKENS,), generator=torch.Generator().manual_seed(3))
N_COMMON = 40
NATIVE = (
    ("4 heads of 16 over 2", "float16"),
    ("4 heads of 16 over 2", "int8"),
    ("5 heads of 10, odd sizes", "float32"),
    ("latents, sigmoids in groups, shared, lengthening rope", "float16"),
)


@contextmanager
def native(folder: Path, shape: str, kv: cpu.KvFormat) -> Iterator[Decoder]:
    of = {**SHAPES, **DEMANDING_SHAPES}[shape]
    with trellis_model(folder, of) as model, model.decoder(model.native(kv=kv)) as decoder:
        yield decoder


def goes_on_from_a_copy(decoder: Decoder, n_common: int = N_COMMON) -> tuple[Tensor, Tensor]:
    """Logits after n_common tokens of a copy, and of who read these tokens itself."""
    alone, other, copy = (decoder.new_cache(N_TOKENS) for _ in range(3))
    decoder.forward(IDS[:n_common], alone)
    wanted = decoder.logits(decoder.forward(IDS[n_common:], alone))
    decoder.forward(IDS[:n_common], other)
    decoder.forward(torch.full((9,), 5), other)
    decoder.forward(torch.full((13,), 6), copy)  # which is written over
    n_copied = copy.copy_from(other, n_common)
    assert n_copied == copy.n_tokens == n_common
    decoder.forward(torch.full((7,), 7), other)  # nothing of which comes to the copy
    return decoder.logits(decoder.forward(IDS[n_common:], copy)), wanted


@pytest.mark.parametrize(("shape", "kv"), NATIVE)
def test_keys_and_values_of_native_code_are_copied(
    tmp_path: Path, shape: str, kv: cpu.KvFormat
) -> None:
    with native(tmp_path / "folder", shape, kv) as decoder:
        found, wanted = goes_on_from_a_copy(decoder)
    assert torch.equal(found, wanted)


def test_keys_and_values_of_torch_are_copied(tmp_path: Path) -> None:
    TinyModel(config={}).save(tmp_path)
    with decoder_over(tmp_path) as decoder:
        found, wanted = goes_on_from_a_copy(decoder)
    assert torch.equal(found, wanted)


def test_keys_and_values_on_a_gpu_are_copied(tmp_path: Path) -> None:
    with trellis_model(tmp_path / "folder", SHAPES["top 4 of 8"]) as model:
        found, wanted = goes_on_from_a_copy(on_gpu(model, StandInGpu()))
        assert torch.equal(found, wanted)
        with hybrid(model, n_slots=ALL) as decoder:
            found, wanted = goes_on_from_a_copy(decoder)
        assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    "shape",
    [
        "delta nets on either side, gates behind attention",
        "lightning on either side, norms kept",
    ],
)
def test_states_are_copied_as_far_as_they_are_kept(tmp_path: Path, shape: str) -> None:
    with native(tmp_path / "folder", shape, "float16") as decoder:
        found, wanted = goes_on_from_a_copy(decoder)
        assert torch.equal(found, wanted)
        other, copy = decoder.new_cache(N_TOKENS), decoder.new_cache(N_TOKENS)
        decoder.forward(IDS[:50], other)
        assert copy.copy_from(other, 45) == 50 - TAIL_TOKENS
        assert copy.keep(50 - TAIL_TOKENS) == 50 - TAIL_TOKENS
        assert other.n_tokens == 50


def test_pages_of_another_shape_are_not_copied() -> None:
    pages, others = (
        cpu.KvPages(n_layers=2, n_kv_heads=1, head_size=size, format="float16")
        for size in (64, 128)
    )
    others.reserve(10)
    with pytest.raises(ValueError, match="another model's"):
        pages.copy_from(others, 10)
    with pytest.raises(ValueError, match="another model's"):
        others.copy_from(others, 10)
    same = cpu.KvPages(n_layers=2, n_kv_heads=1, head_size=128, format="float16")
    with pytest.raises(ValueError, match="not so many tokens"):
        same.copy_from(others, cpu.PAGE_TOKENS + 1)
