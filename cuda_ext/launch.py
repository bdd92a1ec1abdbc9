"""What an operation asks of whoever runs kernels: a card, or the emulator of the tests.

Knows:        the shape of a launch.
Ignorant of:  how kernels are compiled, what they compute.
"""

from typing import Protocol, TypeAlias

from torch import Tensor

# Tensors are passed as their addresses, None as the address 0, whole numbers as int, fractions as
# float (32 bits).
Argument: TypeAlias = Tensor | int | float | None


class Launch(Protocol):
    """Runs kernels one after the other, in the order of the calls."""

    def __call__(
        self,
        kernel: str,
        grid: tuple[int, int, int],
        block: int,
        *arguments: Argument,
        shared_bytes: int = 0,
    ) -> None:
        """kernel: "file/name", one of cuda_ext/kernels/file.cu; block: threads of one block."""

    @property
    def n_multiprocessors(self) -> int:
        """Of the card, for choosing a grid."""
