"""Which experts tokens went to: recorded once, replayed as often as one likes.

    a .npz of numpy: experts [T, L, K] uint16, of layers that have experts, in their order;
    begins [n] int32: the tokens at which a text begins; about: JSON of what it was recorded with

Knows:        the file, and checks it.
Ignorant of:  who records, what is learnt from it.
"""

import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lowmoe.checkpoint import files
from lowmoe.errors import FolderError

MAX_NUMBERS = 2**31  # of experts: more than an hour of any model


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingTrace:
    """experts: [T, L, K]; begins: of texts; n_experts: of each of the L layers; model: its name;
    config: its config.json.
    """

    experts: np.ndarray
    begins: tuple[int, ...]
    n_experts: tuple[int, ...]
    model: str
    config: Mapping[str, Any]

    @property
    def n_tokens(self) -> int:
        return int(self.experts.shape[0])

    @property
    def n_layers(self) -> int:
        return int(self.experts.shape[1])

    @property
    def n_active(self) -> int:
        return int(self.experts.shape[2])


def write_trace(path: Path, trace: RoutingTrace) -> None:
    """Write it whole.  Raises FolderError, DiskSpaceError."""
    about = {
        "model": trace.model,
        "config": dict(trace.config),
        "n_experts": list(trace.n_experts),
    }
    packed = io.BytesIO()
    np.savez_compressed(
        packed,
        experts=trace.experts.astype(np.uint16),
        begins=np.array(trace.begins, np.int32),
        about=np.array(json.dumps(about)),
    )
    files.write_whole(path, packed.getvalue())


def read_trace(path: Path) -> RoutingTrace:
    """Raises FolderError for what is no trace."""
    how = "Record one: lowmoe trace MODEL TEXT --out trace.npz"
    if not path.is_file():
        raise FolderError(f"{path}: there is no such file. {how}")
    try:
        # Out of memory: numpy leaves a file open that it cannot read.
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as values:
            about: Any = json.loads(str(values["about"]))
            experts, begins = values["experts"], values["begins"]
        trace = RoutingTrace(
            experts=experts,
            begins=tuple(int(begin) for begin in begins),
            n_experts=tuple(int(n) for n in about["n_experts"]),
            model=str(about["model"]),
            config=dict(about["config"]),
        )
        _check(trace)
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as e:
        why = "no file of numpy's" if "pickle" in str(e) else e
        raise FolderError(f"{path}: no trace of routing ({why}). {how}") from e
    return trace


def _check(trace: RoutingTrace) -> None:
    experts = trace.experts
    if experts.ndim != 3 or experts.dtype != np.uint16 or experts.size > MAX_NUMBERS:
        raise ValueError(f"experts are {experts.dtype} {list(experts.shape)}")
    if experts.size == 0 or len(trace.n_experts) != trace.n_layers:
        raise ValueError(f"{len(trace.n_experts)} layers, experts of {list(experts.shape)}")
    if (experts.max((0, 2)) >= np.array(trace.n_experts)).any():
        raise ValueError("an expert beyond those there are")
    if any(not 0 <= begin < trace.n_tokens for begin in trace.begins):
        raise ValueError("a text begins beyond the end")
