"""A folder that is told which experts matter."""

import shutil
from pathlib import Path

import numpy as np
import pytest

import lowmoe
from lowmoe.checkpoint import files
from lowmoe.checkpoint.folder import ModelFolder
from lowmoe.checkpoint.popularity import POPULARITY, read_popularity
from lowmoe.errors import UsageError
from lowmoe.experts.trace import RoutingTrace
from lowmoe.library.optimize import optimize
from lowmoe.library.verify import verify


@pytest.fixture
def folder(model_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_folder, tmp_path / "folder"))


def trace_of(folder: Path, *, layers: int | None = None) -> RoutingTrace:
    """Every token uses the last two experts of each layer."""
    with lowmoe.load(folder) as model:
        spec = model.runtime.spec
    n_experts = spec.n_experts_by_layer[:layers]
    last = np.array([[n - 1, n - 2] for n in n_experts], np.uint16)
    return RoutingTrace(
        experts=np.tile(last, (10, 1, 1)),
        begins=(0,),
        n_experts=tuple(n_experts),
        model="this",
        config={},
    )


def test_its_counts_are_the_traces(folder: Path) -> None:
    trace = trace_of(folder)
    assert optimize(folder, trace) == 10
    with ModelFolder(folder) as opened:
        data = opened.small_file(POPULARITY)
        verify(opened, lambda done, total: None)
    assert data is not None
    for shares in read_popularity(data, trace.n_experts):
        assert shares == [0.0] * (len(shares) - 2) + [1.0, 1.0]
    with lowmoe.load(folder) as model:
        assert model.generate("Once", max_new_tokens=4, temperature=0.0)


def test_another_models_trace_is_refused(folder: Path) -> None:
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(UsageError, match="Record one of this model"):
        optimize(folder, trace_of(folder, layers=1))
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


@pytest.mark.parametrize("n_writes", [0, 1, 2])
def test_a_kill_at_any_write_leaves_a_whole_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch, n_writes: int
) -> None:
    trace, write = trace_of(folder), files.write_whole
    done: list[Path] = []

    def killed(path: Path, data: bytes) -> None:
        if len(done) == n_writes:
            raise KeyboardInterrupt
        write(path, data)
        done.append(path)

    monkeypatch.setattr(files, "write_whole", killed)
    with pytest.raises(KeyboardInterrupt):
        optimize(folder, trace)
    with ModelFolder(folder) as opened:
        verify(opened, lambda done, total: None)
        opened.small_file(POPULARITY)
