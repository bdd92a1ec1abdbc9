"""popularity.json: what a conversion counts, and what of it is believed."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lowmoe.checkpoint.folder import ModelFolder
from lowmoe.checkpoint.popularity import POPULARITY, popularity_json, read_popularity
from lowmoe.engine.load import load_checkpoint
from lowmoe.engine.load_options import LoadOptions
from lowmoe.errors import FolderError
from tests.checkpoint.tiny_mixtral import (
    Options,
    contents,
    convert,
    random_text,
    write_tiny_mixtral,
)


def counts_of(folder: Path, n_experts: list[int]) -> list[list[float]]:
    with ModelFolder(folder) as opened:
        data = opened.small_file(POPULARITY)
    assert data is not None
    return read_popularity(data, n_experts)


def test_shares_are_where_the_unquantized_model_sends_the_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny_mixtral(tmp_path / "checkpoint")
    options = Options()
    convert(tmp_path / "checkpoint", tmp_path / "folder", options)
    runtime = load_checkpoint(tmp_path / "checkpoint", LoadOptions(dtype="float32"))
    spec, computation = runtime.spec, runtime.decoder.computation
    n_experts = spec.n_experts_by_layer
    counts = [torch.zeros(n, dtype=torch.int64) for n in n_experts]
    route = type(computation).route

    def counted(parts: Any, x: torch.Tensor, layer_id: int) -> Any:
        routing = route(parts, x, layer_id)
        counts[layer_id] += torch.bincount(
            routing.expert_ids.flatten(), minlength=n_experts[layer_id]
        )
        return routing

    monkeypatch.setattr(type(computation), "route", counted)
    monkeypatch.setattr(type(computation), "foresee", route)
    for sequence in random_text(spec.n_vocab, options.lengths).sequences:
        runtime.decoder.forward(sequence, runtime.decoder.new_cache(len(sequence)))
    runtime.close()
    n_tokens = sum(options.lengths)
    wanted = [(layer / n_tokens).tolist() for layer in counts]
    assert [sum(layer.tolist()) for layer in counts] == [2 * n_tokens] * len(n_experts)
    assert counts_of(tmp_path / "folder", n_experts) == [pytest.approx(layer) for layer in wanted]


def test_a_folder_made_without_calibration_has_none(tmp_path: Path) -> None:
    write_tiny_mixtral(tmp_path / "checkpoint")
    convert(tmp_path / "checkpoint", tmp_path / "folder", Options(calibrated=False))
    assert POPULARITY not in contents(tmp_path / "folder")


def test_asking_again_for_a_finished_folder_does_nothing(tmp_path: Path) -> None:
    # What was found out on the way is no part of what was asked for.
    write_tiny_mixtral(tmp_path / "checkpoint")
    convert(tmp_path / "checkpoint", tmp_path / "folder")
    wanted = contents(tmp_path / "folder")
    assert POPULARITY in wanted
    convert(tmp_path / "checkpoint", tmp_path / "folder")
    assert contents(tmp_path / "folder") == wanted


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"{}",
        b'{"tokens": 0, "counts": [[1, 2]]}',
        b'{"tokens": 8, "counts": [[1, 2, 3]]}',
        b'{"tokens": 8, "counts": [[1, 9]]}',
        b'{"tokens": 8, "counts": [[1, "2"]]}',
        b'{"tokens": 8, "counts": [[1, -2]]}',
        b'{"tokens": 8, "counts": [[1, NaN]]}',
        b'{"tokens": 8, "counts": [[1, 1' + b"0" * 400 + b"]]}",
        b"[" * 100_000,
    ],
)
def test_nonsense_is_one_line(data: bytes) -> None:
    with pytest.raises(FolderError, match="not the counts of 2 experts in 1 layers") as refused:
        read_popularity(data, [2])
    assert "\n" not in str(refused.value)


def test_what_is_written_is_read() -> None:
    assert read_popularity(popularity_json([[1, 2], [], [4]], 4), [2, 0, 1]) == [
        [0.25, 0.5],
        [],
        [1],
    ]
