"""A synthetic folder is a sound model folder of the right shape, with sane activations."""

from pathlib import Path

import pytest
import torch

import lowmoe
from lowmoe.checkpoint.folder import ModelFolder
from lowmoe.checkpoint.layout import Recipe, folder_layout
from lowmoe.errors import FolderError
from lowmoe.families import read_config
from lowmoe.library.verify import verify
from lowmoe.loader.synthetic import write_synthetic
from tests.checkpoint.tiny_mixtral import contents
from tests.talking_mixtral import CONFIG

SHAPE = {**CONFIG, "hidden_size": 128, "num_hidden_layers": 8, "tie_word_embeddings": True}


def write(folder: Path, *, planes: int = 2, name: str = "synthetic") -> list[tuple[int, int]]:
    steps: list[tuple[int, int]] = []
    write_synthetic(
        folder,
        SHAPE,
        read_config(SHAPE),
        Recipe(expert_planes=planes),
        name=name,
        progress=lambda done, total: steps.append((done, total)),
    )
    return steps


@pytest.mark.parametrize("planes", [1, 2, 3])
def test_every_span_is_there_and_verifies(tmp_path: Path, planes: int) -> None:
    steps = write(tmp_path / "model", planes=planes)
    layout = folder_layout(read_config(SHAPE).spec, Recipe(expert_planes=planes))
    with ModelFolder(tmp_path / "model") as folder:
        assert set(folder.manifest.spans) == set(layout.places)
        verify(folder, lambda done, total: None)
    assert steps[-1] == (len(layout.places), len(layout.places))


def test_activations_neither_vanish_nor_explode(tmp_path: Path) -> None:
    write(tmp_path / "model", planes=3)
    with lowmoe.load(tmp_path / "model") as model:
        scores = model.logits(list(range(50)))
    assert scores.isfinite().all()
    # Weights of variance 1 / n_in keep a normed input's variance of 1, the head's among them.
    assert 0.2 < scores.std().item() < 5


def test_experts_differ_so_that_routing_matters(tmp_path: Path) -> None:
    write(tmp_path / "model")
    with lowmoe.load(tmp_path / "model") as model:
        model.logits(torch.arange(100).tolist())
        used = model.runtime.store.residents()
    assert {layer: len(experts) for layer, experts in used.items()} == dict.fromkeys(range(8), 4)


def test_a_finished_folder_is_left_as_it_is(tmp_path: Path) -> None:
    write(tmp_path / "model")
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "model").iterdir()}
    assert write(tmp_path / "model") == []
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "model").iterdir()} == before


def test_an_interrupted_one_is_gone_on_with(tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == 20:
            raise KeyboardInterrupt

    family = read_config(SHAPE)
    with pytest.raises(KeyboardInterrupt):
        write_synthetic(
            tmp_path / "model", SHAPE, family, Recipe(), name="synthetic", progress=interrupt
        )
    write(tmp_path / "model")
    write(tmp_path / "undisturbed")
    assert contents(tmp_path / "model") == contents(tmp_path / "undisturbed")


def test_writers_of_the_same_folder_write_the_same_bytes(tmp_path: Path) -> None:
    def another_comes_between(done: int, total: int) -> None:
        if done == 20:
            write(tmp_path / "model")
        if done == 25:
            raise KeyboardInterrupt  # with five spans written over those of the finished folder

    family = read_config(SHAPE)
    with pytest.raises(KeyboardInterrupt):
        write_synthetic(
            tmp_path / "model",
            SHAPE,
            family,
            Recipe(),
            name="synthetic",
            progress=another_comes_between,
        )
    with ModelFolder(tmp_path / "model") as folder:
        verify(folder, lambda done, total: None)
    write(tmp_path / "model")  # removes the journal of the one that was stopped
    write(tmp_path / "undisturbed")
    assert contents(tmp_path / "model") == contents(tmp_path / "undisturbed")


def test_another_shape_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "model", planes=1)
    with pytest.raises(FolderError, match=r"options: recipe\.expert_planes is 1, but 2"):
        write(tmp_path / "model", planes=2)
