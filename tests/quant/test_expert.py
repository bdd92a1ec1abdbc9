from dataclasses import replace

import pytest
import torch
from torch import Tensor

from quant.damage import relative_squared_error
from quant.expert import Expert, ExpertFormat, Nf4Format, PlainFormat, TrellisFormat
from quant.layout import PlaneLayout
from quant.matrix import Matrix, Nf4Matrix, TrellisMatrix, dequantize
from quant.nf4 import Nf4Layout
from quant.transform import channel_factors
from quant.trellis import TrellisCode

SIZES = [(64, 64), (128, 192), (97, 33), (70, 130), (1, 1)]  # n_hidden, n_inner
# The gain multiplies a code of least squared error D by 1 / (1 - D), which leaves D / (1 - D). For
# D see test_encode.py.
TRELLIS_ERRORS = [error / (1 - error) for error in (0.079, 0.0062, 0.0005)]

Weights = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def expert_weights(n_hidden: int, n_inner: int) -> Weights:
    """gate, up, down, d_in, d_inner."""
    generator = torch.Generator().manual_seed(n_hidden + 1000 * n_inner)
    shapes = [(n_inner, n_hidden), (n_inner, n_hidden), (n_hidden, n_inner)]
    gate, up, down = (torch.randn(shape, generator=generator) for shape in shapes)
    d_in = channel_factors(None, torch.ones(n_hidden), seed=1)
    return gate, up, down, d_in, channel_factors(None, torch.ones(n_inner), seed=2)


def formats(n_hidden: int, n_inner: int) -> list[ExpertFormat]:
    plain = [torch.bfloat16, torch.float16, torch.float32]
    return [
        *(TrellisFormat(n_hidden, n_inner, planes, TrellisCode()) for planes in (1, 2, 3)),
        Nf4Format(n_hidden, n_inner),
        *(PlainFormat(n_hidden, n_inner, dtype) for dtype in plain),
    ]


def gate_up_down(expert: Expert) -> tuple[Tensor, Tensor, Tensor]:
    gate, up = expert.split(dequantize(expert.gate_up).T)
    assert up is not None
    return gate.T, up.T, dequantize(expert.down)


def memory_of(matrix: Matrix) -> list[Tensor]:
    if isinstance(matrix, TrellisMatrix):
        return list(matrix.planes)
    return [matrix.buffer if isinstance(matrix, Nf4Matrix) else matrix]


@pytest.mark.parametrize("sizes", SIZES)
def test_a_part_has_exactly_the_bytes_that_are_announced(sizes: tuple[int, int]) -> None:
    weights = expert_weights(*sizes)
    for form in formats(*sizes):
        parts = form.pack(*weights)
        assert all(part.dtype == torch.uint8 for part in parts)
        assert tuple(part.numel() for part in parts) == form.part_bytes


def test_announced_bytes_are_those_of_the_matrices() -> None:
    trellis = TrellisFormat(96, 130, 2, TrellisCode())
    # gate and up are padded to 192 rows each before they alternate.
    plane = PlaneLayout(384, 96).plane_bytes + PlaneLayout(96, 130).plane_bytes
    assert trellis.part_bytes == (plane, plane)
    both, down = Nf4Layout(260, 96).matrix_bytes, Nf4Layout(96, 130).matrix_bytes
    assert Nf4Format(96, 130).part_bytes == (both + down,)
    # 2 * 3 * 5 numbers of 2 bytes end at 60, so down begins at 64.
    assert PlainFormat(5, 3, torch.bfloat16).part_bytes == (64 + 30,)


@pytest.mark.parametrize("sizes", SIZES)
def test_an_expert_without_a_gate_is_one_whose_gate_takes_no_bytes(sizes: tuple[int, int]) -> None:
    gate, up, down, d_in, d_inner = expert_weights(*sizes)
    for form in formats(*sizes):
        alone = replace(form, gated=False)
        parts = alone.pack(None, up, down, d_in, d_inner)
        assert tuple(part.numel() for part in parts) == alone.part_bytes
        expert = alone.open(tuple(parts), d_in, d_inner)
        whole = form.open(tuple(form.pack(gate, up, down, d_in, d_inner)), d_in, d_inner)
        activated, factor = expert.split(dequantize(expert.gate_up).T)
        assert factor is None
        _, beside_gate, wanted_down = gate_up_down(whole)
        # One scale of a whole matrix is another, nf4's blocks of 64 begin elsewhere.
        alone_error = relative_squared_error(activated.T, up)
        assert alone_error <= 1.2 * relative_squared_error(beside_gate, up) + 1e-12
        assert torch.equal(dequantize(expert.down), wanted_down)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_plain_expert_comes_back_bit_for_bit(sizes: tuple[int, int], dtype: torch.dtype) -> None:
    gate, up, down, d_in, d_inner = expert_weights(*sizes)
    form = PlainFormat(*sizes, dtype)
    expert = form.open(tuple(form.pack(gate, up, down, d_in, d_inner)), d_in, d_inner)
    for found, wanted in zip(gate_up_down(expert), (gate, up, down), strict=True):
        assert torch.equal(found, wanted.to(dtype))


@pytest.mark.parametrize("sizes", SIZES)
def test_an_nf4_expert_is_what_bitsandbytes_makes_of_its_matrices(sizes: tuple[int, int]) -> None:
    from bitsandbytes import functional

    gate, up, down, d_in, d_inner = expert_weights(*sizes)
    form = Nf4Format(*sizes)
    expert = form.open(tuple(form.pack(gate, up, down, d_in, d_inner)), d_in, d_inner)
    for found, original in (
        (dequantize(expert.gate_up), torch.cat([gate, up])),
        (dequantize(expert.down), down),
    ):
        coded = functional.quantize_4bit(
            original.flatten(), quant_type="nf4", compress_statistics=True
        )
        # Flat, because bitsandbytes transposes what is packed in a single byte.
        assert torch.equal(found.flatten(), functional.dequantize_4bit(*coded).flatten())


@pytest.mark.parametrize("n_planes", [1, 2, 3])
def test_a_trellis_expert_has_the_error_of_the_planes_it_is_opened_with(n_planes: int) -> None:
    gate, up, down, d_in, d_inner = expert_weights(256, 192)
    form = TrellisFormat(256, 192, 3, TrellisCode())
    parts = form.pack(gate, up, down, d_in, d_inner)
    expert = form.open(tuple(parts[:n_planes]), d_in, d_inner)
    for found, wanted in zip(gate_up_down(expert), (gate, up, down), strict=True):
        error = relative_squared_error(found, wanted)
        assert TRELLIS_ERRORS[n_planes - 1] / 1.2 < error <= TRELLIS_ERRORS[n_planes - 1]


@pytest.mark.parametrize("sizes", SIZES)
def test_a_trellis_expert_of_odd_sizes_keeps_gate_up_and_down_apart(sizes: tuple[int, int]) -> None:
    gate, up, down, d_in, d_inner = expert_weights(*sizes)
    form = TrellisFormat(*sizes, 3, TrellisCode())
    expert = form.open(tuple(form.pack(gate, up, down, d_in, d_inner)), d_in, d_inner)
    assert expert.blocked
    for found, wanted in zip(gate_up_down(expert), (gate, up, down), strict=True):
        assert found.shape == wanted.shape
        # .0005 in whole blocks, up to .002 beside padding; a mixed-up row would give about 2.
        assert relative_squared_error(found, wanted) < 0.005


def test_the_first_planes_of_a_larger_stack_are_those_of_a_smaller_one() -> None:
    weights = expert_weights(128, 64)
    three = TrellisFormat(128, 64, 3, TrellisCode()).pack(*weights)
    one = TrellisFormat(128, 64, 1, TrellisCode()).pack(*weights)
    assert torch.equal(three[0], one[0])


@pytest.mark.parametrize("sizes", SIZES)
def test_opening_an_expert_copies_nothing(sizes: tuple[int, int]) -> None:
    weights = expert_weights(*sizes)
    for form in formats(*sizes):
        parts = tuple(form.pack(*weights))
        expert = form.open(parts, *weights[3:])
        for matrix in (expert.gate_up, expert.down):
            owners = list(parts) if isinstance(matrix, TrellisMatrix) else [parts[0]]
            for memory, part in zip(memory_of(matrix), owners, strict=True):
                first, end = memory.data_ptr(), memory.data_ptr() + memory.nbytes
                assert part.data_ptr() <= first
                assert end <= part.data_ptr() + part.nbytes


@pytest.mark.parametrize("sizes", SIZES)
def test_an_expert_opens_anywhere_in_a_larger_buffer(sizes: tuple[int, int]) -> None:
    weights = expert_weights(*sizes)
    for form in formats(*sizes):
        parts = form.pack(*weights)
        moved = []
        for part in parts:
            buffer = torch.full((part.numel() + 4096,), 255, dtype=torch.uint8)
            buffer[64 : 64 + part.numel()] = part
            moved.append(buffer[64:])  # as long as the store likes; what follows is not read
        here = gate_up_down(form.open(tuple(parts), *weights[3:]))
        there = gate_up_down(form.open(tuple(moved), *weights[3:]))
        assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))


def test_a_split_product_is_gate_x_and_up_x() -> None:
    gate, up, down, d_in, d_inner = expert_weights(70, 130)
    x = torch.randn(3, 70, generator=torch.Generator().manual_seed(3))
    for form in formats(70, 130):
        expert = form.open(tuple(form.pack(gate, up, down, d_in, d_inner)), d_in, d_inner)
        both = dequantize(expert.gate_up).float()
        found = expert.split(x @ both.T)
        found_weights = gate_up_down(expert)[:2]
        for product, half, original in zip(found, found_weights, (gate, up), strict=True):
            assert product.shape == (3, 130)
            # 70 roundings of a dot product, on either side.
            torch.testing.assert_close(product, x @ half.float().T, rtol=0, atol=1e-3)
            # One plane leaves .08 of the weights, so .08 of the output's square in the mean.
            assert relative_squared_error(product, x @ original.T) < 0.2
