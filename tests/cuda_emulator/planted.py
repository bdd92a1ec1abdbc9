"""Runs the kernels with planted bugs, or those without; a process of its own under a sanitizer.

    python -m tests.cuda_emulator.planted BUILD KERNEL...

Before each kernel a line "== KERNEL" goes to stderr, so that reports can be told apart.

Knows:        what each of these kernels is launched with.
Ignorant of:  what is wrong with them and who finds it.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor

from tests.cuda_emulator.build import Build
from tests.cuda_emulator.emulated import ORDERS, EmulatedLaunch

KERNELS = Path(__file__).parent / "kernels"
THREADS = 64
N_BLOCKS = {"blocks_add": 3, "missing_fence": 3, "rotated": 5, "sum_by_last": 6}
DYNAMIC_SHARED = {"dynamic_shared_beyond", "unwritten_maximum"}


def run(launch: EmulatedLaunch, kernel: str) -> Tensor:
    """What a kernel made of x = 1, 2, .., 64."""
    name = kernel.partition("/")[2]
    n_blocks = N_BLOCKS.get(name, 1)
    x = torch.arange(1.0, THREADS + 1)
    y = torch.zeros(n_blocks, THREADS) if name == "rotated" else torch.zeros(THREADS)
    more: list[Tensor | int] = []
    if name in ("missing_fence", "sum_by_last"):
        more = [torch.zeros(n_blocks, THREADS), torch.zeros(1, dtype=torch.int32)]
    if name == "rotated":
        more = [3]
    if name == "staged_copy":
        y, more = torch.zeros(2, THREADS), [THREADS]
    shared_bytes = 4 * THREADS if name in DYNAMIC_SHARED else 0
    launch(kernel, (n_blocks, 1, 1), THREADS, x, y, *more, shared_bytes=shared_bytes)
    return y


def main(build: str, *kernels: str) -> None:
    for order in ORDERS:
        launch = EmulatedLaunch(Build[build], kernels=KERNELS)
        launch.order = order
        for kernel in kernels:
            sys.stderr.write(f"== {kernel}\n")
            sys.stderr.flush()
            run(launch, kernel)


if __name__ == "__main__":
    main(*sys.argv[1:])
