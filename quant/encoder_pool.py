"""Encodes one matrix on several cores.

The search is thousands of short tensor operations, and threads wait for Python's lock more than
they compute (two threads: 1.0 times the speed of one; two processes: 2.0). So rows go to worker
processes of our own, as bytes over pipes. They are plain subprocesses: multiprocessing would run
the user's main module again in each.

Knows:        how to cut a matrix by rows and put its planes together again.
Ignorant of:  how rows are coded.
"""

import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from types import TracebackType
from typing import IO, Any

import torch
from torch import Tensor

from quant.encode import encode_planes
from quant.layout import BLOCK_COLUMNS, BLOCK_ROWS, PlaneLayout
from quant.trellis import TrellisCode

# Weights of a job: 25 ms a plane, long against its transfer, short against a small matrix.
JOB_WEIGHTS = 2**17


@dataclass(frozen=True, slots=True)
class _Job:
    rows: bytes
    dtype: str
    d: bytes
    layout: PlaneLayout
    code: TrellisCode
    n_planes: int


class EncoderPool:
    """n_workers processes that encode; with one, everything happens in this one.

    Use with `with`; `encode` is `encode_planes` on many cores, the same bytes.
    """

    def __init__(self, n_workers: int) -> None:
        self._workers: list[subprocess.Popen[bytes]] = []
        self._idle: SimpleQueue[subprocess.Popen[bytes]] = SimpleQueue()
        for _ in range(n_workers if n_workers > 1 else 0):
            command = [sys.executable, "-c", "from quant.encoder_pool import serve; serve()"]
            worker = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
                start_new_session=True,  # Ctrl-C is for us; they end when their stdin does
            )
            self._workers.append(worker)
            self._idle.put(worker)

    def __enter__(self) -> "EncoderPool":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for worker in self._workers:
            assert worker.stdin is not None
            assert worker.stdout is not None
            if kind is not None:
                worker.kill()
            worker.stdin.close()
            worker.stdout.close()
            worker.wait()

    def encode(
        self, weights: Tensor, d: Tensor, layout: PlaneLayout, code: TrellisCode, n_planes: int
    ) -> list[Tensor]:
        """What encode_planes does."""
        if not self._workers or weights.numel() <= JOB_WEIGHTS:
            return encode_planes(weights, d, layout, code, n_planes)
        planes = [torch.zeros(layout.plane_bytes, dtype=torch.uint8) for _ in range(n_planes)]
        with ThreadPoolExecutor(len(self._workers)) as threads:
            jobs = [(first, last) for first, last in _row_ranges(layout)]
            coded = threads.map(
                lambda job: self._run(weights, d, layout, code, n_planes, *job), jobs
            )
            for (first, last), part in zip(jobs, coded, strict=True):
                for plane, rows in zip(planes, part, strict=True):
                    _put_blocks(plane, layout, rows, PlaneLayout(last - first, layout.n_in), first)
        return planes

    def _run(
        self,
        weights: Tensor,
        d: Tensor,
        layout: PlaneLayout,
        code: TrellisCode,
        n_planes: int,
        first: int,
        last: int,
    ) -> list[Tensor]:
        rows = weights[first:last].contiguous()
        job = _Job(
            rows.view(torch.uint8).numpy().tobytes(),
            str(rows.dtype).removeprefix("torch."),
            d.contiguous().view(torch.uint8).numpy().tobytes(),
            PlaneLayout(last - first, layout.n_in),
            code,
            n_planes,
        )
        worker = self._idle.get()
        assert worker.stdin is not None
        assert worker.stdout is not None
        _send(worker.stdin, job)
        coded: list[bytes] = _receive(worker.stdout)
        self._idle.put(worker)
        return [torch.frombuffer(bytearray(plane), dtype=torch.uint8) for plane in coded]


def _row_ranges(layout: PlaneLayout) -> Iterator[tuple[int, int]]:
    step = max(1, JOB_WEIGHTS // (layout.column_blocks * BLOCK_COLUMNS * BLOCK_ROWS)) * BLOCK_ROWS
    for first in range(0, layout.n_out, step):
        yield first, min(first + step, layout.n_out)


def _put_blocks(
    plane: Tensor, layout: PlaneLayout, part: Tensor, of: PlaneLayout, first: int
) -> None:
    """Copy the blocks of `part`, a plane of layout `of`, to row `first` of `plane`."""
    begin = first // BLOCK_ROWS
    for start, size, part_start, part_size in (
        (0, layout.code_bytes, 0, of.code_bytes),
        (
            layout.group_scale_offset,
            layout.group_scale_bytes,
            of.group_scale_offset,
            of.group_scale_bytes,
        ),
        (layout.row_scale_offset, layout.row_scale_bytes, of.row_scale_offset, of.row_scale_bytes),
    ):
        region = plane[start : start + size].view(layout.row_blocks, -1)
        rows = part[part_start : part_start + part_size].view(of.row_blocks, -1)
        region[begin : begin + of.row_blocks] = rows


def _send(stream: IO[bytes], message: object) -> None:
    pickle.dump(message, stream, protocol=pickle.HIGHEST_PROTOCOL)
    stream.flush()


def _receive(stream: IO[bytes]) -> Any:
    # Only ever from a process of ours at the other end of a private pipe.
    return pickle.load(stream)


def serve() -> None:
    """What a worker does: jobs from stdin, planes to stdout, until stdin ends."""
    torch.set_num_threads(1)
    while True:
        try:
            job: _Job = _receive(sys.stdin.buffer)
        except EOFError:
            return
        dtype: torch.dtype = getattr(torch, job.dtype)
        rows = torch.frombuffer(bytearray(job.rows), dtype=torch.uint8).view(dtype)
        d = torch.frombuffer(bytearray(job.d), dtype=torch.uint8).view(torch.float16)
        planes = encode_planes(
            rows.view(job.layout.n_out, job.layout.n_in), d, job.layout, job.code, job.n_planes
        )
        _send(sys.stdout.buffer, [plane.numpy().tobytes() for plane in planes])
