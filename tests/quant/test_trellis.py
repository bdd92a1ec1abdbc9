import struct
from typing import Any

import pytest
import torch
from torch import Tensor

from quant.layout import PlaneLayout
from quant.trellis import (
    TrellisCode,
    decode_plane,
    decode_planes,
    gain,
    group_scales,
    row_scales,
    table_values,
)


def random_code(window_bits: int, generator: torch.Generator) -> TrellisCode:
    table = torch.randint(-63, 64, (2**window_bits,), generator=generator)
    return TrellisCode(window_bits=window_bits, table=tuple(table.tolist()), table_unit=0.04)


def random_plane(layout: PlaneLayout, generator: torch.Generator) -> Tensor:
    plane = torch.randint(0, 256, (layout.plane_bytes,), generator=generator, dtype=torch.uint8)
    rows = torch.rand(layout.padded_rows, generator=generator).half()
    plane[layout.row_scale_offset : layout.gain_offset] = rows.view(torch.uint8)
    return plane


def symbol_by_symbol(plane: Tensor, layout: PlaneLayout, code: TrellisCode) -> list[list[int]]:
    """The table values, read off the drawing in layout.py with nothing but integers."""
    memory = plane.tolist()
    values = [[0] * layout.padded_columns for _ in range(layout.padded_rows)]
    for word_id in range(layout.code_bytes // 8):
        word = int.from_bytes(bytes(memory[8 * word_id : 8 * word_id + 8]), "little")
        symbols = [word >> 2 * i & 3 for i in range(32)]
        block, in_block = divmod(word_id, 16 * 8)
        s, w = divmod(in_block, 8)
        row_block, column_block = divmod(block, layout.padded_columns // 64)
        for i in range(32):
            ahead = (symbols[(i + k) % 32] << 2 * k for k in range(5))  # 10 bits, no more is read
            window = sum(ahead) % 2**code.window_bits
            row = 64 * row_block + 16 * (i // 8) + 2 * w + i // 4 % 2
            column = 64 * column_block + 4 * s + i % 4
            values[row][column] = code.table[window]
    return values


def nibbles_by_row(plane: Tensor, layout: PlaneLayout) -> list[list[int]]:
    """Byte b of a block holds row b in its low four bits, row 32 + b in its high ones."""
    memory = plane.tolist()
    blocks = layout.padded_columns // 64
    return [
        [
            memory[layout.group_scale_offset + 32 * ((row // 64) * blocks + block) + row % 32]
            >> (4 if row % 64 >= 32 else 0)
            & 15
            for block in range(blocks)
        ]
        for row in range(layout.padded_rows)
    ]


@pytest.mark.parametrize("window_bits", [4, 5, 6, 7, 10])
@pytest.mark.parametrize("shape", [(64, 64), (100, 130)])
def test_table_values_are_what_the_drawing_says_symbol_by_symbol(
    window_bits: int, shape: tuple[int, int]
) -> None:
    generator = torch.Generator().manual_seed(window_bits)
    code, layout = random_code(window_bits, generator), PlaneLayout(*shape)
    plane = random_plane(layout, generator)
    values = table_values(plane, layout, code)
    assert values.dtype == torch.int8
    assert values.tolist() == symbol_by_symbol(plane, layout, code)


@pytest.mark.parametrize("shape", [(64, 64), (64, 300), (200, 64), (100, 130)])
def test_group_scales_lie_where_the_drawing_says(shape: tuple[int, int]) -> None:
    layout = PlaneLayout(*shape)
    plane = random_plane(layout, torch.Generator().manual_seed(1))
    assert group_scales(plane, layout).tolist() == nibbles_by_row(plane, layout)


def test_a_weight_is_row_scale_times_nibble_fifteenths_times_unit_times_table_value() -> None:
    generator = torch.Generator().manual_seed(2)
    code, layout = random_code(6, generator), PlaneLayout(100, 130)
    plane = random_plane(layout, generator)
    nibbles = torch.tensor(nibbles_by_row(plane, layout)).repeat_interleave(64, dim=1)
    values = torch.tensor(symbol_by_symbol(plane, layout, code))
    rows = row_scales(plane, layout).double()[:, None]
    wanted = rows * nibbles / 15 * code.table_unit * values
    decoded = decode_plane(plane, layout, code)
    assert decoded.dtype == torch.float32
    # row * nibble is exact in float32 (11 + 4 bits); the unit and two products round: 3 * 2^-24.
    torch.testing.assert_close(decoded.double(), wanted, rtol=2**-22, atol=0)


def test_the_gain_is_a_little_endian_float32_behind_the_row_scales() -> None:
    layout = PlaneLayout(100, 130)
    plane = random_plane(layout, torch.Generator().manual_seed(4))
    decoded = decode_plane(plane, layout, TrellisCode())
    plane[layout.gain_offset :][:4] = torch.frombuffer(
        bytearray(struct.pack("<f", 1.0625)), dtype=torch.uint8
    )
    assert gain(plane, layout) == 1.0625
    assert torch.equal(decode_plane(plane, layout, TrellisCode()), decoded)  # the stack's, not its


def test_a_stack_is_the_sum_of_its_planes() -> None:
    generator = torch.Generator().manual_seed(3)
    code, layout = random_code(6, generator), PlaneLayout(70, 90)
    planes = tuple(random_plane(layout, generator) for _ in range(3))
    each = [decode_plane(plane, layout, code).double() for plane in planes]
    # Two float32 additions of numbers below 3 * 63 * .04 < 8: at most 2 * 2^-24 * 8 in all.
    stack = decode_planes(planes, layout, code).double()
    torch.testing.assert_close(stack, each[0] + each[1] + each[2], rtol=0, atol=2**-20)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window_bits": 3, "table": (0,) * 8}, "window_bits is 3, but 4 to 10"),
        ({"window_bits": 11, "table": (0,) * 2048}, "window_bits is 11, but 4 to 10"),
        ({"group_size": 32}, "group_size is 32, but 64"),
        ({"table": (1, 2, 3)}, "has 3 values, but a window of 6 bits needs 64"),
        ({"table": (64,) + (0,) * 63}, "must lie in ±63"),
        ({"table_unit": 0.0}, "unit be positive"),
        ({"table_unit": float("nan")}, "unit be positive"),
        ({"table_unit": float("inf")}, "unit be positive"),
    ],
)
def test_a_code_nobody_implemented_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrellisCode(**change)
