import subprocess
import sys

import pytest
import torch

from quant import nf4
from quant.damage import relative_squared_error

# One block, a part of one, odd sizes (a nibble left over), 256 block scales and one more, more.
SHAPES = [(1, 1), (1, 64), (5, 7), (3, 67), (64, 256), (1, 16385), (257, 129), (192, 512)]


def gaussian(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("shape", SHAPES)
def test_our_buffer_decodes_to_bitsandbytes_own_result(shape: tuple[int, int]) -> None:
    from bitsandbytes import functional

    weights = gaussian(*shape)
    packed, state = functional.quantize_4bit(
        weights.flatten(), blocksize=64, quant_type="nf4", compress_statistics=True
    )
    buffer = nf4.encode(weights)
    found = nf4.decode(buffer, nf4.Nf4Layout(*shape))
    assert found.shape == shape
    assert torch.equal(found.flatten(), functional.dequantize_4bit(packed, state).flatten())


@pytest.mark.parametrize("shape", [(256, 96), (96, 320), (512, 200)])
def test_rows_that_are_no_whole_blocks_are_decoded_as_well_as_others(
    shape: tuple[int, int],
) -> None:
    # bitsandbytes' CPU code, told of two dimensions, decodes such rows to an error of .06.
    weights = gaussian(*shape)
    error = relative_squared_error(nf4.decode(nf4.encode(weights), nf4.Nf4Layout(*shape)), weights)
    # .0084 for long matrices; a few per cent more where few block scales share a second level.
    assert error < 0.0095


@pytest.mark.parametrize("shape", SHAPES)
def test_a_buffer_has_the_size_its_layout_says_in_aligned_regions(shape: tuple[int, int]) -> None:
    layout = nf4.Nf4Layout(*shape)
    n_weights = shape[0] * shape[1]
    assert nf4.encode(gaussian(*shape)).shape == (layout.matrix_bytes,)
    for offset in (layout.absmax_offset, layout.second_offset, layout.matrix_bytes):
        assert offset % 64 == 0
    assert layout.absmax_offset >= n_weights / 2
    assert layout.second_offset >= layout.absmax_offset + n_weights / 64
    assert layout.matrix_bytes >= layout.second_offset + 4 * (n_weights / (64 * 256) + 1)


def test_a_large_matrix_takes_4_and_an_eighth_bits() -> None:
    # 4 bits, 8 for 64 weights, 32 for 64 * 256: the 4.127 of the QLoRA paper.
    layout = nf4.Nf4Layout(4096, 14336)
    assert layout.matrix_bytes * 8 / (4096 * 14336) == pytest.approx(4.127, abs=0.0005)


def test_a_row_of_zeros_stays_zero() -> None:
    weights = gaussian(8, 64)
    weights[3] = 0
    assert (nf4.decode(nf4.encode(weights), nf4.Nf4Layout(8, 64))[3] == 0).all()


def test_bitsandbytes_keeps_its_buffer_to_itself() -> None:
    # Two matrices decoded in turn: the state rebuilt for one must not leak into the other.
    first, second = gaussian(64, 128), gaussian(3, 5)
    one, two = nf4.encode(first), nf4.encode(second)
    before = nf4.decode(one, nf4.Nf4Layout(64, 128))
    nf4.decode(two, nf4.Nf4Layout(3, 5))
    assert torch.equal(nf4.decode(one, nf4.Nf4Layout(64, 128)), before)


def test_nothing_is_printed_by_the_first_use_and_other_warnings_still_are() -> None:
    # In a process of its own, where bitsandbytes has not been imported yet.
    script = (
        "import logging, torch; from quant import nf4\n"
        "nf4.decode(nf4.encode(torch.ones(2, 64)), nf4.Nf4Layout(2, 64))\n"
        "logging.getLogger('bitsandbytes.backends.cpu.ops').warning('something else')\n"
    )
    ran = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert (ran.stdout, ran.stderr) == ("", "something else\n")
