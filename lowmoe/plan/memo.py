"""What was measured of this machine, and how far its runs came: kept between runs.

    LOWMOE_HOME/machine.json    [{"key", "ram_bytes_per_s", ..., "runs": [[predicted, achieved]]}]

An entry for each machine and number of threads, the one that was written last comes first.

Knows:        the file, when it is out of date.
Ignorant of:  how anything is measured or predicted.
"""

import json
import statistics
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lowmoe.checkpoint import files
from lowmoe.errors import FolderError
from lowmoe.plan.machine import Processor
from lowmoe.settings import Settings

NAME = "machine.json"
RUNS_KEPT = 20
MEMOS_KEPT = 8
FEWEST_RUNS = 3  # before they correct a prediction
MOST_CORRECTED = 2.0  # either way: beyond that something else is wrong, and `doctor` says so
MAX_BYTES = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Memo:
    """key: of the machine and what computes; disk_bytes_per_s: None until it was needed.

    runs: tokens/s predicted and achieved, without correction, the latest last.
    """

    key: str
    ram_bytes_per_s: float
    cpu: Processor
    disk_bytes_per_s: float | None = None
    runs: tuple[tuple[float, float], ...] = ()

    @property
    def factor(self) -> float:
        """What predictions are to be multiplied by."""
        if len(self.runs) < FEWEST_RUNS:
            return 1.0
        return min(MOST_CORRECTED, max(1 / MOST_CORRECTED, self.ratio))

    @property
    def ratio(self) -> float:
        """The median of achieved over predicted; there must be a run."""
        return statistics.median(achieved / predicted for predicted, achieved in self.runs)


def read_memo(settings: Settings, key: str) -> Memo | None:
    """What is kept of this machine; None where there is nothing, or of another machine, or what
    cannot be understood: it is then measured again.
    """
    return next((memo for memo in _read(settings) if memo.key == key), None)


def write_memo(settings: Settings, memo: Memo) -> None:
    """Keep it, beside those of other keys.  Raises FolderError as writing does."""
    files.make_folder(settings.home)
    others = [other for other in _read(settings) if other.key != memo.key]
    memos = [asdict(kept) for kept in (memo, *others)[:MEMOS_KEPT]]
    files.write_whole(_path(settings), json.dumps(memos, indent=1).encode())


def _read(settings: Settings) -> list[Memo]:
    path = _path(settings)
    if not path.is_file():
        return []
    try:
        return [_parsed(values) for values in json.loads(files.read_all(path, limit=MAX_BYTES))]
    except (FolderError, ValueError, TypeError, KeyError, RecursionError):
        return []


def with_run(memo: Memo, predicted: float, achieved: float) -> Memo:
    """One more run, the oldest forgotten.  Both above 0, in tokens/s."""
    return replace(memo, runs=(*memo.runs, (predicted, achieved))[-RUNS_KEPT:])


def _path(settings: Settings) -> Path:
    return settings.home / NAME


def _parsed(values: Any) -> Memo:
    cpu = values["cpu"]
    disk = values["disk_bytes_per_s"]
    runs = tuple((_speed(a), _speed(b)) for a, b in values["runs"][-RUNS_KEPT:])
    return Memo(
        key=str(values["key"]),
        ram_bytes_per_s=_speed(values["ram_bytes_per_s"]),
        cpu=Processor(
            n_threads=int(cpu["n_threads"]),
            word_bytes_per_s=_speed(cpu["word_bytes_per_s"]),
            products_per_s=_speed(cpu["products_per_s"]),
        ),
        disk_bytes_per_s=None if disk is None else _speed(disk),
        runs=runs,
    )


def _speed(value: Any) -> float:
    if not 0 < float(value) < float("inf"):
        raise ValueError(value)
    return float(value)
