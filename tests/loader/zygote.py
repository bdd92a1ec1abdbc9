"""Converts a tiny checkpoint as often as asked, each time in a new process, and kills it.

Run as a program, so that it can fork: it has imported torch once and never used more than one
thread, a fork of it is ready in milliseconds. Requests are lines of JSON on stdin, answers lines on
stdout.

Knows:        forks, deaths, how a process ended.
Ignorant of:  what should be in the folder afterwards.
"""

import json
import os
import select
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any
from unittest import mock

import torch

from lowmoe.checkpoint import files
from tests.checkpoint.faulty_os import Death, FaultyOs
from tests.checkpoint.tiny_mixtral import Options, convert

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
FINISHED, FAILED = 0, 3


class Zygote:
    """The parent's end.  Use with `with`."""

    def __enter__(self) -> "Zygote":
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from tests.loader.zygote import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join(sys.path)},
            text=True,
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()
        self._process.wait()

    def die(self, source: Path, folder: Path, death: Death, *, calibrated: bool = True) -> bool:
        """Convert, and die on the way; False where the run was over before."""
        answer = self._ask(source, folder, calibrated, death=[death.call, death.moment])
        assert answer in (FINISHED, -signal.SIGKILL)
        return bool(answer == -signal.SIGKILL)

    def die_after(
        self, source: Path, folder: Path, seconds: float, *, calibrated: bool = True
    ) -> bool:
        """Convert, and be killed when this time has passed, wherever that is."""
        answer = self._ask(source, folder, calibrated, seconds=seconds)
        assert answer in (FINISHED, -signal.SIGKILL)
        return bool(answer == -signal.SIGKILL)

    def finish(self, source: Path, folder: Path, *, calibrated: bool = True) -> None:
        """Convert, or go on, to the end."""
        assert self._ask(source, folder, calibrated) == FINISHED

    def count_calls(self, source: Path, folder: Path, *, calibrated: bool = True) -> list[str]:
        """Convert to the end; returns the calls that a Death can name."""
        answer = self._ask(source, folder, calibrated, count=True)
        assert isinstance(answer, list)
        return answer

    def _ask(self, source: Path, folder: Path, calibrated: bool, **how: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"source": str(source), "folder": str(folder), "calibrated": calibrated, **how}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


def serve() -> None:
    """What the zygote does until its stdin ends."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        sys.stdout.write(json.dumps(_answer(json.loads(line))) + "\n")
        sys.stdout.flush()


def _answer(request: dict[str, Any]) -> int | list[str]:
    source, folder = Path(request["source"]), Path(request["folder"])
    options = Options(calibrated=request["calibrated"])
    if "count" in request:
        with mock.patch.object(files, "os", FaultyOs()) as counting:
            convert(source, folder, options)
        return list(counting.calls)
    return _in_a_fork(
        lambda: convert(source, folder, options),
        os if "seconds" in request else FaultyOs(_death(request)),
        request.get("seconds"),
    )


def _death(request: dict[str, Any]) -> Death | None:
    return Death(*request["death"]) if "death" in request else None


def _in_a_fork(work: Callable[[], None], system: Any, seconds: float | None) -> int:
    """How a child ends that does this work on this system, killed after `seconds` if given."""
    child = os.fork()
    if child == 0:
        try:
            with mock.patch.object(files, "os", system):
                work()
            os._exit(FINISHED)
        except BaseException:
            traceback.print_exc()
        os._exit(FAILED)
    if seconds is not None:
        ended = select.poll()
        ended.register(os.pidfd_open(child), select.POLLIN)
        if not ended.poll(seconds * 1000):
            os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
