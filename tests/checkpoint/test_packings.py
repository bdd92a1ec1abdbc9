"""Do we read weights that other programs packed as the numbers that those programs read?"""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.checkpoint.packed_weights import KINDS, Packed, read


def all_rows(packed: Packed, folder: Path) -> Tensor:
    checkpoint, shape = packed.write(folder), tuple(packed.numbers.shape)
    if len(shape) == 2:
        return read(checkpoint, shape)
    return torch.stack([read(checkpoint, shape, slice(i, i + 1)) for i in range(shape[0])])


@pytest.mark.parametrize("kind", KINDS)
def test_packed_weights_are_read_as_who_packed_them_reads_them(tmp_path: Path, kind: str) -> None:
    packed = KINDS[kind]()
    found = all_rows(packed, tmp_path)
    assert found.dtype == torch.float32
    # Ours may round once where theirs rounds twice: 2^-24 of the larger of code and zero, some
    # hundred steps for 8 bits.
    torch.testing.assert_close(found, packed.numbers, rtol=2**-22, atol=0)
