"""Encodes one matrix on several cores.

The search is thousands of short tensor operations, and threads wait for Python's lock more than
they compute (two threads: 1.0 times the speed of one; two processes: 2.0). So rows go to worker
processes of our own, as bytes over pipes. They are plain subprocesses: multiprocessing would run
the user's main module again in each.

Knows:        how to cut a matrix by rows and put its planes together again.
Ignorant of:  how rows are coded.
"""

import contextlib
import os
import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from types import TracebackType
from typing import IO, Any

import torch
from torch import Tensor

from quant.encode import (
    CodedRows,
    encode_planes,
    encode_rows,
    join_rows,
    row_chunks,
    transformed_covariance,
)
from quant.layout import PlaneLayout
from quant.transform import hadamard_size
from quant.trellis import TrellisCode


@dataclass(frozen=True, slots=True)
class _Job:
    """Rows to code; tensors as bytes.

    d: float16; metric: [blocks, h, h] float32, see encode_rows, or None.
    """

    rows: bytes
    dtype: str
    n_in: int
    d: bytes
    code: TrellisCode
    n_planes: int
    metric: bytes | None


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
            with contextlib.suppress(BrokenPipeError):  # a dead worker's unread job
                worker.stdin.close()
            worker.stdout.close()
            worker.wait()

    def encode(
        self,
        weights: Tensor,
        d: Tensor,
        layout: PlaneLayout,
        code: TrellisCode,
        n_planes: int,
        covariance: Tensor | None = None,
    ) -> list[Tensor]:
        """What encode_planes does.  d: float16.

        Raises what encode_planes raises, and RuntimeError if a process of the pool has ended.
        """
        chunks = list(row_chunks(layout))
        if not self._workers or len(chunks) == 1:
            return encode_planes(weights, d, layout, code, n_planes, covariance)
        metric = transformed_covariance(covariance, d)
        sent = None if metric is None else _to_bytes(metric)
        jobs = (
            _Job(
                rows=_to_bytes(weights[first:last]),
                dtype=str(weights.dtype).removeprefix("torch."),
                n_in=layout.n_in,
                d=_to_bytes(d),
                code=code,
                n_planes=n_planes,
                metric=sent,
            )
            for first, last in chunks
        )
        return join_rows(self._run_all(jobs), layout, n_planes)

    def _run_all(self, jobs: Iterator[_Job]) -> Iterator[CodedRows]:
        """The coded rows of each job in order; no more jobs in memory than workers."""
        with ThreadPoolExecutor(len(self._workers)) as threads:
            under_way: deque[Future[CodedRows]] = deque()
            for job in jobs:
                if len(under_way) == len(self._workers):
                    yield under_way.popleft().result()
                under_way.append(threads.submit(self._run, job))
            while under_way:
                yield under_way.popleft().result()

    def _run(self, job: _Job) -> CodedRows:
        worker = self._idle.get()
        assert worker.stdin is not None
        assert worker.stdout is not None
        try:
            _send(worker.stdin, job)
            answer = _receive(worker.stdout)
        except (EOFError, pickle.UnpicklingError, BrokenPipeError) as e:
            raise RuntimeError(
                f"an encoder process ended with exit code {worker.wait()}; out of memory?"
            ) from e
        finally:
            self._idle.put(worker)  # also a dead one, so that nobody waits for ever
        if isinstance(answer, Exception):
            raise answer
        planes, energy, kept = answer
        return CodedRows([_from_bytes(plane, torch.uint8) for plane in planes], energy, kept)


def _to_bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def _from_bytes(data: bytes, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(dtype)


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
        answer: object
        try:
            answer = _work(job)
        except Exception as e:  # whatever it is, the one who sent the job is to hear of it
            answer = e
        _send(sys.stdout.buffer, answer)


def _work(job: _Job) -> tuple[list[bytes], float, list[float]]:
    dtype: torch.dtype = getattr(torch, job.dtype)
    metric = None
    if job.metric is not None:
        size = hadamard_size(job.n_in)
        metric = _from_bytes(job.metric, torch.float32).view(-1, size, size)
    weights = _from_bytes(job.rows, dtype).view(-1, job.n_in)
    d = _from_bytes(job.d, torch.float16)
    rows = encode_rows(weights, d, job.code, job.n_planes, metric)
    return [_to_bytes(plane) for plane in rows.planes], rows.energy, rows.kept
