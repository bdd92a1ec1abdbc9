"""Every bit of a trellis plane: where it lies and what it means.

A plane of W [N, K] (rows out, columns in) codes W in blocks of 64 rows x 64 columns; N and K are
padded up to multiples of 64. Padded rows have scale 0. Padded columns share the scales of the last
group and decode to something near 0, so the activations they meet must be 0. The bytes are four
regions, each starting at a multiple of 64 bytes, integers little-endian:

    codes        [N/64][K/64][16 slices][8 words]  uint64   a slice is 64 rows x 4 columns
    group scales [N/64][K/64][32]                  uint8    two rows a byte
    row scales   [N]                               float16
    gain         [1]                               float32

Word w of slice s codes 8 rows x 4 columns, 32 symbols of 2 bits. Weight i of the word is

    row    16 * (i / 8) + 2 * w + (i / 4) % 2      of the block's 64
    column 4 * s + i % 4                           of the block's 64

so that the 16 rows a 512-bit accumulator holds are neighbours, in order; likewise the 8 of a
256-bit one and the 4 of a 128-bit one. Its window is the 6 bits from bit 2 * i upwards, wrapping
around from bit 63 to bit 0 (tail-biting), and indexes the table:

    bit   63 62 ..              11 10  9  8  7  6  5  4  3  2  1  0
          [s31]  ..                [ s4] [ s3] [ s2] [ s1] [ s0]
                                                [-- window of 0 --]
                                         [-- window of 1 --]
    window of 31:  s31 | s0 << 2 | s1 << 4

Byte b of a block's group scales holds row b in its low four bits, row 32 + b in its high ones. Then

    weight[n][k] = row_scale[n] * nibble[n][k / 64] / 15 * table_unit * table[window]

summed over the planes of a stack, times the gain of the last of them. The gain undoes what the
code of least squared error does: it keeps only 1 - D of the weights' energy at relative error D,
and would weaken the output of every layer by as much. `layout.h` repeats all this for C++; a test
pins the two.

Knows:        bits, bytes, paddings.
Ignorant of:  how codes are chosen, what the matrix is for, files.
"""

from collections.abc import Iterator
from dataclasses import dataclass

BLOCK_ROWS = 64
BLOCK_COLUMNS = 64  # also the group size: one 4-bit scale for each row of a block
SLICE_COLUMNS = 4
SLICES = BLOCK_COLUMNS // SLICE_COLUMNS
WORDS = 8  # of a slice
WORD_WEIGHTS = 32
SYMBOL_BITS = 2
SCALE_LEVELS = 15  # a nibble of 15 is the row's largest group scale; 0 makes a group all zero
REGION_ALIGNMENT = 64  # bytes; one cache line, one 512-bit register
MAX_PLANES = 3
BLOCK_CODE_BYTES = BLOCK_ROWS * BLOCK_COLUMNS * SYMBOL_BITS // 8
BLOCK_SCALE_BYTES = BLOCK_ROWS // 2


def round_up(count: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `count`."""
    return -(-count // multiple) * multiple


@dataclass(frozen=True, slots=True)
class PlaneLayout:
    """Sizes and offsets of one plane of a matrix with n_out rows and n_in columns."""

    n_out: int
    n_in: int

    @property
    def row_blocks(self) -> int:
        return -(-self.n_out // BLOCK_ROWS)

    @property
    def column_blocks(self) -> int:
        return -(-self.n_in // BLOCK_COLUMNS)

    @property
    def padded_rows(self) -> int:
        return self.row_blocks * BLOCK_ROWS

    @property
    def padded_columns(self) -> int:
        return self.column_blocks * BLOCK_COLUMNS

    @property
    def code_bytes(self) -> int:
        return self.row_blocks * self.column_blocks * BLOCK_CODE_BYTES

    @property
    def group_scale_bytes(self) -> int:
        return self.row_blocks * self.column_blocks * BLOCK_SCALE_BYTES

    @property
    def row_scale_bytes(self) -> int:
        return self.padded_rows * 2

    @property
    def group_scale_offset(self) -> int:
        return self.code_bytes

    @property
    def row_scale_offset(self) -> int:
        return self.group_scale_offset + round_up(self.group_scale_bytes, REGION_ALIGNMENT)

    @property
    def gain_offset(self) -> int:
        return self.row_scale_offset + self.row_scale_bytes

    @property
    def plane_bytes(self) -> int:
        return self.gain_offset + REGION_ALIGNMENT

    def regions(self) -> Iterator[tuple[int, int]]:
        """(offset, bytes) of the regions that are cut by row blocks: all but the gain."""
        yield 0, self.code_bytes
        yield self.group_scale_offset, self.group_scale_bytes
        yield self.row_scale_offset, self.row_scale_bytes
