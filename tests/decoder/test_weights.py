import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import TinyModel
from torch import Tensor

from lowmoe.checkpoint.reader import Checkpoint
from lowmoe.decoder.weights import CheckpointTensors, DenseWeights, from_checkpoint
from lowmoe.errors import CheckpointError, UnsupportedModelError
from lowmoe.families import read_config

Change = Callable[[dict[str, Tensor]], object]


def tensors_of(folder: Path) -> CheckpointTensors:
    checkpoint = Checkpoint(folder)
    return CheckpointTensors(checkpoint, read_config(checkpoint.config))


def weights_of(folder: Path) -> DenseWeights:
    return from_checkpoint(tensors_of(folder), torch.float32)


def saved(folder: Path, change: Change, **config: object) -> Path:
    """A checkpoint whose tensors were changed behind the back of config.json."""
    TinyModel(config=config).save(folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    saved(tmp_path, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=rf"1 tensors that the model .*{name}"):
        tensors_of(tmp_path)


def test_tensors_of_a_variant_nobody_implemented_are_refused(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.bias"
    saved(tmp_path, lambda tensors: tensors.update({name: torch.zeros(48)}))
    with pytest.raises(UnsupportedModelError, match=rf"1 tensors that a mixtral .*{name}"):
        tensors_of(tmp_path)


def test_a_tensor_of_another_shape_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(96, 48)}))
    with pytest.raises(
        CheckpointError, match=r"lm_head.weight is \[96, 48\], but .* needs \[97, 48\]"
    ):
        weights_of(tmp_path)


def test_a_layer_more_than_config_promises_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, lambda tensors: None)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.2"):
        tensors_of(tmp_path)


def test_constants_of_old_conversions_and_a_stored_tied_head_do_no_harm(tmp_path: Path) -> None:
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6),
        "lm_head.weight": torch.full((97, 48), 9.0),
    }
    saved(tmp_path, lambda tensors: tensors.update(extra), tie_word_embeddings=True)
    weights = weights_of(tmp_path)
    assert weights.head is weights.embedding
    assert isinstance(weights.head, Tensor)
    assert weights.head.max() < 9


@pytest.mark.parametrize("tied", [False, True])
def test_the_bytes_reported_are_those_of_the_tensors_each_once(tmp_path: Path, tied: bool) -> None:
    saved(tmp_path, lambda tensors: None, tie_word_embeddings=tied)
    found = weights_of(tmp_path).n_bytes
    shapes = load_file(tmp_path / "model.safetensors")
    dense = sum(4 * t.numel() for name, t in shapes.items() if ".experts." not in name)
    # A layer's transforms, ones that stand for all, take two bytes.
    assert found == dense + 3 * 2
