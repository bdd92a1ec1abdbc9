"""Native code trusts addresses and sizes, so whatever is wrong is refused before it gets them."""

import os
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lowmoe.checkpoint.folder import ModelFolder
from lowmoe.checkpoint.layout import dense_tensors
from lowmoe.decoder.weights import from_folder
from lowmoe.engine.generate import Session
from lowmoe.engine.load import LoadOptions, load_folder
from lowmoe.errors import FolderError, UsageError
from lowmoe.families import read_config
from lowmoe.kernels import cpu
from quant.trellis import DEFAULT_CODE


def test_every_dense_tensor_of_another_size_than_the_config_promises_is_refused(
    model_folder: Path,
) -> None:
    with ModelFolder(model_folder) as folder:
        spec = read_config(folder.manifest.config).spec
        spans = dict(folder.manifest.spans)
        names = [name for name, _, _ in dense_tensors(spec, folder.recipe)]
        assert len(names) > 10
        for name in names:
            span = spans[name]
            for n_bytes in (span.place.n_bytes - 4, span.place.n_bytes + 4):
                place = replace(span.place, n_bytes=n_bytes)
                spans[name] = replace(span, place=place)
                folder.manifest = replace(folder.manifest, spans=spans)
                with pytest.raises(FolderError, match=f"{name} has {n_bytes} bytes, but its"):
                    from_folder(folder, spec)
            spans[name] = span


def test_a_config_of_another_vocabulary_than_the_weights_is_refused(model_folder: Path) -> None:
    with ModelFolder(model_folder) as folder:
        spec = read_config(folder.manifest.config).spec
        with pytest.raises(FolderError, match=r"embedding\.plane0 has \d+ bytes, but its config"):
            from_folder(folder, replace(spec, n_vocab=300 * spec.n_vocab))


def test_a_second_thread_is_refused_while_one_computes(model_folder: Path) -> None:
    runtime = load_folder(model_folder, LoadOptions(threads=2))
    session = Session(runtime)
    refusals: list[Exception] = []

    def ask() -> None:
        for asked in (session.ram_bandwidth, lambda: list(session.forward([1, 2]))):
            try:
                asked()
            except UsageError as e:
                refusals.append(e)

    with session.batch.computing():
        other = threading.Thread(target=ask)
        other.start()
        other.join()
    assert ["computing for another thread" in str(e) for e in refusals] == [True, True]
    ask()
    assert len(refusals) == 2
    runtime.close()


def test_a_pool_that_is_busy_refuses_another_run() -> None:
    pool = cpu.Pool(2, [])
    data = torch.zeros(2**26, dtype=torch.uint8)
    errors: list[Exception] = []
    started = threading.Barrier(2)

    def read() -> None:
        started.wait()
        for _ in range(50):
            try:
                pool.read_seconds(data.data_ptr(), data.numel())
            except RuntimeError as e:
                errors.append(e)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all("another thread is computing" in str(e) for e in errors)
    assert pool.read_seconds(data.data_ptr(), data.numel()) > 0  # none was lost on the way


FITTING = {"n_heads": 2, "plain_size": 4, "rope_size": 2, "value_size": 6}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_heads": 3}, "the heads do not fit the matrices"),
        ({"plain_size": 5}, "the heads do not fit the matrices"),
        ({"value_size": 7}, "the heads do not fit the matrices"),
        ({"rope_size": 4}, "the heads do not fit the matrices"),
        ({"rope_size": 3}, "sizes of heads"),
        ({"value_size": 0}, "sizes of heads"),
        ({"q_norm": 0}, "the matrices do not fit each other"),
    ],
)
def test_latents_of_sizes_that_do_not_fit_their_matrices_are_refused(
    changes: dict[str, int], message: str
) -> None:
    engine = cpu.engine(cpu.isas()[0], cpu.Pool(1, []), DEFAULT_CODE, max_tokens=1)
    bytes_of_all = torch.zeros(2**16, dtype=torch.uint8)
    at = -(-bytes_of_all.data_ptr() // 64) * 64

    def linear(n_out: int, n_in: int) -> cpu.Linear:
        return cpu.Linear(engine, n_out, n_in, [at], at)

    def make(q_norm: int, **sizes: int) -> None:
        cpu.LatentProjection(
            engine=engine,
            q_down=linear(8, 16),
            q_norm=q_norm,
            q_up=linear(2 * 6, 8),
            kv_down=linear(10 + 2, 16),
            kv_norm=at,
            norm_epsilon=1e-6,
            kv_up=linear(2 * 10, 10),
            **sizes,
        )

    make(**({"q_norm": at} | FITTING))
    with pytest.raises(ValueError, match=message):
        make(**({"q_norm": at} | FITTING | changes))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
# Python 3.12 warns of any fork of a process with threads; this one only asks and leaves.
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_process_is_told_that_it_has_no_threads() -> None:
    pool = cpu.Pool(2, [])
    data = torch.zeros(4096, dtype=torch.uint8)
    child = os.fork()
    if child == 0:
        try:
            pool.read_seconds(data.data_ptr(), data.numel())
        except RuntimeError as e:
            os._exit(17 if "forked process" in str(e) else 1)
        os._exit(2)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 17


def test_a_missing_extension_is_one_line_that_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import importlib

    from lowmoe.errors import LowMoeError

    monkeypatch.setitem(sys.modules, "lowmoe.kernels.cpu._native", None)
    monkeypatch.delitem(sys.modules, "lowmoe.kernels.cpu")
    with pytest.raises(LowMoeError, match=r"kernels cannot be loaded .* run pip install -e \. fir"):
        importlib.import_module("lowmoe.kernels.cpu")


def test_more_threads_than_any_machine_has_are_refused() -> None:
    with pytest.raises(UsageError, match="threads is 5000000000, but must be at most 1024"):
        LoadOptions(threads=5_000_000_000)
