"""4-bit normal floats, as bitsandbytes defines and computes them: the format we are compared with.

Source: QLoRA, arXiv 2305.14314. Blocks of 64 with double quantization, 4.13 bits a weight.

Knows:        which bytes bitsandbytes' functional API makes, and their order in a buffer.
Ignorant of:  how the codes are chosen.
"""

import functools
import logging
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from quant.layout import REGION_ALIGNMENT, round_up

BLOCK_WEIGHTS = 64
SCALES_BLOCK = 256  # block scales that share one second-level scale


@dataclass(frozen=True, slots=True)
class Nf4Layout:
    """Offsets and sizes of one nf4 matrix: codes, block scales, second-level scales, their mean."""

    n_out: int
    n_in: int

    @property
    def n_blocks(self) -> int:
        return -(-self.n_out * self.n_in // BLOCK_WEIGHTS)

    @property
    def code_bytes(self) -> int:
        return -(-self.n_out * self.n_in // 2)

    @property
    def absmax_offset(self) -> int:
        return round_up(self.code_bytes, REGION_ALIGNMENT)

    @property
    def second_offset(self) -> int:
        return self.absmax_offset + round_up(self.n_blocks, REGION_ALIGNMENT)

    @property
    def second_count(self) -> int:
        return -(-self.n_blocks // SCALES_BLOCK)

    @property
    def matrix_bytes(self) -> int:
        # The last float32 is the mean that was taken off the block scales.
        return self.second_offset + round_up((self.second_count + 1) * 4, REGION_ALIGNMENT)


@functools.lru_cache(maxsize=1)
def _functional() -> ModuleType:
    """bitsandbytes' functional API, imported on first use.

    Where the CPU has AVX512-BF16, importing it warns that a 4-bit matrix product of the optional
    package `kernels` is missing. We never call that product, so this one warning is dropped.
    """
    noisy = logging.getLogger("bitsandbytes.backends.cpu.ops")
    noisy.addFilter(_is_not_about_the_missing_product)
    try:
        from bitsandbytes import functional
    finally:
        noisy.removeFilter(_is_not_about_the_missing_product)
    return functional


def _is_not_about_the_missing_product(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Failed to load CPU gemm_4bit_forward")


def encode(weights: Tensor) -> Tensor:
    """Code weights [n_out, n_in] float as nf4.  Returns [matrix_bytes] uint8."""
    functional = _functional()
    layout = Nf4Layout(*weights.shape)
    packed, state = functional.quantize_4bit(
        weights.float().contiguous(),
        blocksize=BLOCK_WEIGHTS,
        quant_type="nf4",
        compress_statistics=True,
    )
    buffer = torch.zeros(layout.matrix_bytes, dtype=torch.uint8)
    buffer[: layout.code_bytes] = packed.flatten()
    buffer[layout.absmax_offset :][: layout.n_blocks] = state.absmax
    second = torch.cat([state.state2.absmax.float().flatten(), state.offset.float().view(1)])
    buffer[layout.second_offset :][: second.numel() * 4] = second.view(torch.uint8)
    return buffer


def decode(buffer: Tensor, layout: Nf4Layout) -> Tensor:
    """The weights of a coded matrix, [n_out, n_in] float32.  buffer: [matrix_bytes] uint8."""
    functional = _functional()
    # The state bitsandbytes would have kept is rebuilt around codes it makes for an empty matrix,
    # so that its two look-up tables stay its own affair.
    _, state = functional.quantize_4bit(
        torch.zeros(1, BLOCK_WEIGHTS),
        blocksize=BLOCK_WEIGHTS,
        quant_type="nf4",
        compress_statistics=True,
    )
    second = buffer[layout.second_offset :][: (layout.second_count + 1) * 4].view(torch.float32)
    # Flat: told of two dimensions, bitsandbytes' CPU code takes blocks to begin with each row.
    state.shape = torch.Size((layout.n_out * layout.n_in,))
    state.absmax = buffer[layout.absmax_offset :][: layout.n_blocks].contiguous()
    state.state2.absmax, state.offset = second[:-1].contiguous(), second[-1]
    packed = buffer[: layout.code_bytes].contiguous().view(-1, 1)
    weights: Tensor = functional.dequantize_4bit(packed, state)
    return weights.view(layout.n_out, layout.n_in)
