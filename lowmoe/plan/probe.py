"""What this machine does a second: a second or two of measuring.

Knows:        small runs of the very kernels that decode, plain reads of RAM and disk.
Ignorant of:  models; where results are kept.
"""

import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lowmoe.checkpoint import files
from lowmoe.checkpoint.buffers import page_aligned
from lowmoe.engine.machine import new_pool, ram_read_bandwidth
from lowmoe.experts.store import N_READERS
from lowmoe.kernels.cpu import WINDOW_BITS, _native
from lowmoe.plan.machine import Processor
from quant.layout import BLOCK_COLUMNS, PlaneLayout
from quant.trellis import DEFAULT_CODE

RUNS, REPEATS = 5, 8
CACHED_BYTES = 256 * 1024  # of packed weights: they stay in a core's own cache
PROMPT_TOKENS = 128
DISK_BLOCK, DISK_BLOCKS = 8 * 2**20, 32  # about as large as experts are; together 256 MiB
DISK_PASSES = 4  # over them: readers do not begin and end together, which a short time would count
TABLE_MIDDLE = 64  # table values are kept as unsigned bytes around it


class _Work:
    """A matrix of random bits, and tokens for it, for one core."""

    def __init__(self, isa: str, n_in: int, n_tokens: int) -> None:
        self.layout = PlaneLayout(CACHED_BYTES * 4 // n_in, n_in)
        rng = np.random.default_rng(0)
        columns = self.layout.padded_columns
        codes = rng.integers(-127, 128, (n_tokens, columns), np.int8)
        table = DEFAULT_CODE.table * (2**WINDOW_BITS // len(DEFAULT_CODE.table))
        self._given = {
            "isa": isa,
            "planes": [random_plane(self.layout)],
            "n_out": self.layout.n_out,
            "n_in": n_in,
            "table": np.array(table, np.int8).view(np.uint8) + np.uint8(TABLE_MIDDLE),
            "scale_unit": DEFAULT_CODE.scale_unit,
            "codes": codes,
            "scales": np.full((n_tokens, -(-n_in // 128)), 0.01, np.float32),
            "sums": codes.reshape(n_tokens, -1, BLOCK_COLUMNS).sum(-1, dtype=np.int32),
            "first_block": 0,
            "y": np.zeros((n_tokens, self.layout.padded_rows), np.float32),
        }
        self.n_tokens = n_tokens

    def repeat(self, kernel: str) -> None:
        """Do it some times over."""
        run: Callable[..., None] = getattr(_native, kernel)
        for _ in range(REPEATS):
            run(**self._given)


def random_plane(layout: PlaneLayout) -> Tensor:
    """A plane of random bits that kernels can multiply by, [plane_bytes] uint8."""
    plane = torch.randint(-(2**63), 2**63 - 1, (layout.plane_bytes // 8,)).view(torch.uint8)
    # Any bits are codes and group scales, but not row scales and a gain.
    plane[layout.row_scale_offset : layout.gain_offset].view(torch.float16).fill_(0.01)
    plane[layout.gain_offset : layout.gain_offset + 4].view(torch.float32).fill_(1)
    return plane


def measured_processor(isa: str, n_threads: int) -> Processor:
    """What the threads do at the same time, each out of its own cache: two that are one core's, or
    cores that slow down for each other's heat, do less than twice what one does alone.
    """
    words = [_Work(isa, 2048, 32) for _ in range(n_threads)]
    products = [_Work(isa, 2048, PROMPT_TOKENS) for _ in range(n_threads)]
    layout, plane_bytes = products[0].layout, words[0].layout.plane_bytes
    weights = layout.padded_rows * layout.padded_columns
    return Processor(
        n_threads=n_threads,
        word_bytes_per_s=plane_bytes * words[0].n_tokens * _times_a_second(words, "dot_blocks"),
        products_per_s=weights * PROMPT_TOKENS * _times_a_second(products, "multiply_blocks"),
    )


def _times_a_second(works: list[_Work], kernel: str) -> float:
    """How often threads, one for each work, do them together: the best of some runs, after one that
    does not count.
    """
    meeting = threading.Barrier(len(works))

    def share(work: _Work) -> list[float]:
        times = []
        for _ in range(RUNS + 1):
            meeting.wait()
            begin = time.perf_counter()
            work.repeat(kernel)
            meeting.wait()
            times.append(time.perf_counter() - begin)
        return times[1:]

    with ThreadPoolExecutor(len(works)) as threads:
        spent = next(threads.map(share, works))
    return len(works) * REPEATS / min(spent)


def measured_ram(n_threads: int | None) -> float:
    """Bytes a second that the threads read."""
    return ram_read_bandwidth(new_pool(n_threads))


def measured_disk(folder: Path) -> float:
    """Bytes a second read from the disk of a folder, past the page cache where that is allowed,
    by as many threads and in blocks as large as experts are read.

    Raises FolderError, DiskSpaceError as writing there does.
    """
    files.make_folder(folder)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        path = Path(scratch) / "probe"
        block = torch.randint(0, 256, (DISK_BLOCK,), dtype=torch.uint8).numpy().tobytes()
        for _ in range(DISK_BLOCKS):
            files.append(path, block)
        descriptor, _ = files.open_direct(path)
        try:
            return _read_speed(descriptor, path)
        finally:
            files.close(descriptor)


def _read_speed(descriptor: int, path: Path) -> float:
    # Written to before: a page's first touch is not the disk's time.
    buffers = [page_aligned(DISK_BLOCK).fill_(1).numpy() for _ in range(N_READERS)]

    def read(reader: int) -> None:
        for block in [*range(reader, DISK_BLOCKS, N_READERS)] * DISK_PASSES:
            files.read_at(descriptor, buffers[reader].data, block * DISK_BLOCK, path)

    begin = time.perf_counter()
    with ThreadPoolExecutor(N_READERS) as readers:
        list(readers.map(read, range(N_READERS)))
    return DISK_PASSES * DISK_BLOCKS * DISK_BLOCK / (time.perf_counter() - begin)
