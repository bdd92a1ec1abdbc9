"""Tokens of several conversations in one pass: each as if it were alone."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from native_goldens import assert_within, expected_error
from test_hybrid import hybrid
from test_on_gpu import on_gpu
from tiny_models import in_chunks
from torch import Tensor
from trellis_models import TrellisModel, fill, trellis_model
from trellis_shapes import DEMANDING_SHAPES, GPU_SHAPES, LAYERS, SHAPES, Shape

from cuda_ext.ops import MOST_DECODED
from lowmoe.decoder.decoder import Decoder
from lowmoe.engine.load_options import MOST_SEQUENCES
from lowmoe.kernels import cpu
from tests.cuda_emulator.emulated import EmulatedLaunch
from tests.stand_in_gpu import StandInEvent, StandInGpu, with_kernels

N_PREFIX = [1, 14, 3, 30, 9, 2, 21, 5]  # tokens in each conversation before it meets the others
N_STEPS = 6


def texts(n_vocab: int, n_sequences: int, n_steps: int = N_STEPS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [
        torch.randint(0, n_vocab, (n + n_steps,), generator=generator)
        for n in N_PREFIX[:n_sequences]
    ]


def alone(decoder: Decoder, of: list[Tensor], n_steps: int = N_STEPS) -> list[Tensor]:
    """The logits of the last n_steps tokens of each text."""
    return [in_chunks(decoder, ids, [len(ids) - n_steps, 1])[-n_steps:] for ids in of]


def together(decoder: Decoder, of: list[Tensor], n_steps: int = N_STEPS) -> list[Tensor]:
    """The same, one of each text at a time."""
    caches = [decoder.new_cache(len(ids)) for ids in of]
    for ids, cache in zip(of, caches, strict=True):
        decoder.forward(ids[:-n_steps], cache)
    found = []
    for step in range(n_steps):
        now = torch.stack([ids[step - n_steps] for ids in of])
        found.append(decoder.logits(decoder.step(now, caches)))
        assert [c.n_tokens for c in caches] == [len(ids) - n_steps + step + 1 for ids in of]
    return list(torch.stack(found, 1))


def assert_same_bits(found: list[Tensor], wanted: list[Tensor]) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)


@pytest.fixture(scope="module", params=SHAPES | DEMANDING_SHAPES)
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TrellisModel]:
    shape = (SHAPES | DEMANDING_SHAPES)[request.param]
    with trellis_model(tmp_path_factory.mktemp("model") / "folder", shape) as model:
        yield model


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrellisModel]:
    shape = SHAPES["top 4 of 8"]
    with trellis_model(tmp_path_factory.mktemp("model") / "folder", shape) as model:
        yield model


# --- native code


@pytest.mark.parametrize("n_sequences", [2, 3, MOST_SEQUENCES])
def test_native_code_gives_each_the_bits_it_has_alone(
    model: TrellisModel, n_sequences: int
) -> None:
    of = texts(model.spec.n_vocab, n_sequences)
    native = model.native(n_sequences=n_sequences, n_threads=2)
    with model.decoder(native) as decoder:
        fill(decoder.store, model.spec)
        assert decoder.store.is_complete  # all layers in one call
        wanted = alone(decoder, of)
        assert_same_bits(together(decoder, of), wanted)
    with model.decoder(native, n_slots=5) as decoder:  # layer by layer
        assert_same_bits(together(decoder, of), wanted)


@pytest.mark.parametrize("isa", cpu.isas())
@pytest.mark.parametrize("kv", cpu.KV_FORMATS)
def test_so_does_every_instruction_set_and_cache(
    plain: TrellisModel, isa: str, kv: cpu.KvFormat
) -> None:
    of = texts(plain.spec.n_vocab, 5)
    with plain.decoder(plain.native(isa=isa, kv=kv, n_sequences=5)) as decoder:
        assert_same_bits(together(decoder, of), alone(decoder, of))


def test_long_texts_are_attended_to_in_parts_beside_short_ones(tmp_path: Path) -> None:
    # Parts have 1024 positions: the second text goes over from two to three of them.
    shape = Shape(config={"num_hidden_layers": 1})
    with trellis_model(tmp_path / "folder", shape) as model:
        generator = torch.Generator().manual_seed(5)
        of = [torch.randint(0, 97, (n,), generator=generator) for n in (9, 2051, 1030)]
        with model.decoder(model.native(n_sequences=3, max_tokens=2048)) as decoder:
            assert_same_bits(together(decoder, of), alone(decoder, of))


def test_an_expert_that_several_tokens_go_to_is_lent_once(plain: TrellisModel) -> None:
    ids = texts(plain.spec.n_vocab, 1)[0]
    with plain.decoder(plain.native(n_sequences=4)) as decoder:
        fill(decoder.store, plain.spec)
        for n_alike in (1, 4):
            before = decoder.store.traffic()
            together(decoder, [ids] * n_alike)
            used = decoder.store.traffic() - before
            # Of N_STEPS tokens and one chunk of a prompt for each.
            of_prompts = used.ram_requests - N_STEPS * LAYERS * 4
            assert 0 < of_prompts <= n_alike * LAYERS * 4


def test_what_native_code_was_not_made_for_is_refused(plain: TrellisModel) -> None:
    native = plain.native(n_sequences=2)
    with plain.decoder(native) as decoder:
        caches = [decoder.new_cache(4) for _ in range(3)]
        with pytest.raises(ValueError, match="more sequences than attention was made for"):
            decoder.step(torch.tensor([1, 2, 3]), caches)
        with pytest.raises(ValueError, match="a cache is given twice"):
            decoder.step(torch.tensor([1, 2]), [caches[0], caches[0]])
        decoder.forward(torch.tensor([1, 2, 3, 4]), caches[1])
        with pytest.raises(AssertionError):  # the second is full
            decoder.step(torch.tensor([1, 2]), caches[:2])
        assert [c.n_tokens for c in caches] == [0, 4, 0]


# --- torch


def assert_close(found: list[Tensor], wanted: list[Tensor]) -> None:
    # Float32 sums of some hundred products in another order, through a few layers.
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


def test_torch_gives_each_what_it_has_alone_but_for_the_order_of_sums(
    model: TrellisModel,
) -> None:
    of = texts(model.spec.n_vocab, 3)
    with model.decoder(model.in_torch(), n_slots=5) as decoder:
        assert_close(together(decoder, of), alone(decoder, of))


# --- on a GPU


def assert_within_rounding(found: list[Tensor], wanted: list[Tensor]) -> None:
    # Both round activations to int8 alike, but where float32 sums in another order fall on either
    # side of a step's middle.
    assert_within(torch.cat(found), torch.cat(wanted), expected_error(LAYERS, "float16", [1]))


@pytest.mark.parametrize("n_sequences", [2, MOST_DECODED])
def test_a_gpu_gives_each_what_it_has_alone_but_for_rounding(
    plain: TrellisModel, n_sequences: int
) -> None:
    of = texts(plain.spec.n_vocab, n_sequences)
    decoder = on_gpu(plain, StandInGpu())
    assert_within_rounding(together(decoder, of), alone(decoder, of))


@pytest.mark.parametrize("name", GPU_SHAPES)
def test_so_it_does_whatever_a_model_asks_for(tmp_path: Path, name: str) -> None:
    with trellis_model(tmp_path / "folder", GPU_SHAPES[name]) as model:
        of = texts(model.spec.n_vocab, 3, 2)
        decoder = on_gpu(model, StandInGpu())
        assert_within_rounding(together(decoder, of, 2), alone(decoder, of, 2))
        with hybrid(model, n_slots=2) as divided:
            assert_within_rounding(together(divided, of, 2), alone(divided, of, 2))


@pytest.mark.parametrize("n_slots", [2, 9, 1000])
@pytest.mark.parametrize("n_in_ram", [3, 1000])
def test_so_does_one_that_has_some_of_the_experts(
    plain: TrellisModel, n_slots: int, n_in_ram: int
) -> None:
    of = texts(plain.spec.n_vocab, 4)
    with hybrid(plain, n_slots=n_slots, n_in_ram=n_in_ram) as decoder:
        wanted = alone(decoder, of)
        assert_within_rounding(together(decoder, of), wanted)


def test_so_do_the_kernels_themselves(tmp_path: Path) -> None:
    with trellis_model(tmp_path / "folder", SHAPES["4 heads of 16 over 2"]) as model:
        of = [ids[-n:] for n, ids in zip((2, 3), texts(model.spec.n_vocab, 2), strict=True)]
        decoder = on_gpu(model, StandInGpu(with_kernels(EmulatedLaunch())))
        assert_within_rounding(together(decoder, of, 1), alone(decoder, of, 1))


def test_the_host_waits_once_a_layer_however_many_are_together(
    plain: TrellisModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    of, waits = texts(plain.spec.n_vocab, 4), []
    with hybrid(plain, n_slots=9) as decoder:
        caches = [decoder.new_cache(40) for _ in of]
        for ids, cache in zip(of, caches, strict=True):
            decoder.forward(ids[:1], cache)
        decoder.store.ram.read_rest(plain.spec.n_experts_by_layer)
        made: list[StandInEvent] = []

        def event(gpu: StandInGpu) -> StandInEvent:
            made.append(Counted(waits))
            return made[-1]

        monkeypatch.setattr(StandInGpu, "event", event)
        monkeypatch.setattr(type(decoder.store), "move_up", lambda experts: None)
        decoder.step(torch.tensor([1, 2, 3, 4]), caches)
    assert len(waits) == LAYERS


class Counted(StandInEvent):
    def __init__(self, waits: list[int]) -> None:
        super().__init__()
        self._waits = waits

    def wait(self) -> None:
        self._waits.append(1)


def test_all_that_compute_take_as_many_as_may_be_asked_for() -> None:
    assert MOST_SEQUENCES == MOST_DECODED
