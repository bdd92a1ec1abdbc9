"""Does a conversion hold what the checkpoint held, whatever cores made it?"""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lowmoe.checkpoint import files
from lowmoe.checkpoint.folder import ModelFolder
from lowmoe.checkpoint.layout import Recipe, expert_span
from lowmoe.checkpoint.reader import Checkpoint
from lowmoe.decoder.weights import CheckpointTensors, from_checkpoint, from_folder
from lowmoe.errors import CheckpointError, FolderError
from lowmoe.experts.source import CheckpointExperts
from lowmoe.families import Family, read_config
from lowmoe.kernels.cpu import isas
from lowmoe.loader.convert import Progress
from quant.damage import relative_squared_error
from quant.matrix import dequantize
from tests.checkpoint.faulty_os import FaultyOs
from tests.checkpoint.tiny_mixtral import (
    SMALL_FILES,
    Options,
    config_with,
    contents,
    convert,
    write_tiny_mixtral,
)

PLAIN = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    write_tiny_mixtral(folder)
    return folder


@pytest.fixture(scope="module")
def undisturbed(
    checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[bool, dict[str, bytes]]:
    """The files that the checkpoint becomes, by whether it is calibrated."""
    found = {}
    for calibrated in (True, False):
        folder = tmp_path_factory.mktemp("undisturbed") / "model"
        convert(checkpoint, folder, Options(calibrated=calibrated))
        found[calibrated] = contents(folder)
    return found


def family_of(folder: Path) -> Family:
    return read_config(Checkpoint(folder).config)


def dense_matrices(weights: Any) -> dict[str, Tensor]:
    """Every dense tensor by name, decoded."""
    found = {
        "embedding": weights.embedding,
        "head": weights.head,
        "final_norm": weights.final_norm,
    }
    for layer_id, layer in enumerate(weights.layers):
        for name in ("attention_norm", "qkv", "attention_out", "experts_norm", "router"):
            found[f"layers.{layer_id}.{name}"] = getattr(layer, name)
    return {name: dequantize(matrix) for name, matrix in found.items()}


def experts_of(folder: ModelFolder, family: Family) -> dict[tuple[int, int], list[Tensor]]:
    """gate, up and down of every expert, decoded."""
    recipe, spec = folder.recipe, family.spec
    format, found = recipe.expert_format(spec), {}
    weights = from_folder(folder, spec)
    for layer_id, layer in enumerate(weights.layers):
        for expert_id in range(spec.layers[layer_id].feed_forward.n_experts):
            names = [expert_span(layer_id, expert_id, part) for part in recipe.part_names]
            parts = tuple(folder.read(name) for name in names)
            d_inner = layer.transforms.d_inner[expert_id]
            expert = format.open(parts, layer.transforms.d_in, d_inner)
            gate, up = expert.split(dequantize(expert.gate_up).T)  # [H, I] each
            found[layer_id, expert_id] = [gate.T, up.T, dequantize(expert.down)]
    return found


# What is in the folder


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("format", PLAIN)
def test_plain_formats_hold_the_checkpoints_numbers(
    tmp_path: Path, format: str, tied: bool
) -> None:
    source = tmp_path / "checkpoint"
    write_tiny_mixtral(source, config_with(tie_word_embeddings=tied), dtype=PLAIN[format])
    convert(source, tmp_path / "model", Options(recipe=Recipe(format=format)))
    family = family_of(source)
    tensors = CheckpointTensors(Checkpoint(source), family)
    wanted = dense_matrices(from_checkpoint(tensors, PLAIN[format]))
    with ModelFolder(tmp_path / "model") as folder:
        found = dense_matrices(from_folder(folder, family.spec))
        experts = experts_of(folder, family)
    assert found.keys() == wanted.keys()
    for name, matrix in wanted.items():
        assert torch.equal(found[name], matrix), name
    original = CheckpointExperts(tensors.checkpoint, family, PLAIN[format])
    for key, matrices in experts.items():
        for ours, theirs in zip(matrices, original.read_matrices(*key), strict=True):
            assert torch.equal(ours, theirs), key


# Relative squared error of a Gaussian, as the design has it for large matrices.
OF_PLANES = {1: 0.0769, 2: 0.0058, 3: 0.00046}
OF_NF4 = 0.0084
TINY = 1.5  # a few thousand weights, of which the last group of a row is half padding


@pytest.mark.parametrize(("expert_planes", "dense_planes"), [(1, 3), (2, 1), (3, 2)])
def test_planes_are_as_near_to_the_weights_as_they_can(
    checkpoint: Path, tmp_path: Path, expert_planes: int, dense_planes: int
) -> None:
    recipe = Recipe(expert_planes=expert_planes, dense_planes=dense_planes)
    of_experts, of_dense = errors_of(checkpoint, tmp_path / "model", recipe)
    for name, error in of_experts.items():
        assert error < TINY * OF_PLANES[expert_planes], name
    for name, error in of_dense.items():
        kept = name.endswith(("norm", "router"))
        assert error <= (0 if kept else TINY * OF_PLANES[dense_planes]), name


def test_nf4_is_as_near_to_the_weights_as_it_can(tmp_path: Path) -> None:
    write_tiny_mixtral(tmp_path / "checkpoint", config_with(intermediate_size=128))
    recipe = Recipe(format="nf4")
    of_experts, _ = errors_of(tmp_path / "checkpoint", tmp_path / "model", recipe)
    for name, error in of_experts.items():
        assert error < TINY * OF_NF4, name


def errors_of(
    checkpoint: Path, folder: Path, recipe: Recipe
) -> tuple[dict[str, float], dict[str, float]]:
    """The relative squared error of every matrix of experts, and of every dense tensor."""
    convert(checkpoint, folder, Options(recipe=recipe, calibrated=False))
    family = family_of(checkpoint)
    tensors = CheckpointTensors(Checkpoint(checkpoint), family)
    original = CheckpointExperts(tensors.checkpoint, family, torch.float32)
    with ModelFolder(folder) as model:
        experts = experts_of(model, family)
        dense = dense_matrices(from_folder(model, family.spec))
    of_experts = {
        f"{key} {name}": float(relative_squared_error(ours, theirs.float()))
        for key, matrices in experts.items()
        for name, ours, theirs in zip(
            ("gate", "up", "down"), matrices, original.read_matrices(*key), strict=True
        )
    }
    assert len(of_experts) == 3 * 8
    wanted = dense_matrices(from_checkpoint(tensors, torch.float32))
    return of_experts, {
        name: float(relative_squared_error(dense[name], matrix)) for name, matrix in wanted.items()
    }


def test_small_files_come_along_as_they_are(checkpoint: Path, tmp_path: Path) -> None:
    convert(checkpoint, tmp_path / "model")
    with ModelFolder(tmp_path / "model") as folder:
        for name, data in SMALL_FILES.items():
            assert folder.small_file(name) == data
        assert folder.small_file("chat_template.jinja") is None


def test_the_manifest_says_where_it_came_from(checkpoint: Path, tmp_path: Path) -> None:
    for calibrated in (True, False):
        path = tmp_path / f"model-{calibrated}"
        convert(checkpoint, path, Options(calibrated=calibrated))
        manifest = ModelFolder(path).manifest
        assert manifest.config == Checkpoint(checkpoint).config
        assert manifest.source.name == "tiny"
        assert manifest.source.sample == Checkpoint(checkpoint).sample_hash()
        assert (manifest.calibration is not None) == calibrated
        assert manifest.calibration is None or manifest.calibration.n_tokens == 48


# However it was made


@pytest.mark.parametrize("isa", isas())
def test_neither_threads_nor_the_instruction_set_change_a_byte(
    checkpoint: Path, undisturbed: dict[bool, dict[str, bytes]], tmp_path: Path, isa: str
) -> None:
    convert(checkpoint, tmp_path / "model", Options(isa=isa, n_threads=2))
    assert contents(tmp_path / "model") == undisturbed[True]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("calibrated", [True, False])
def test_progress_counts_every_weight_once_also_when_going_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool, calibrated: bool
) -> None:
    source, options = tmp_path / "checkpoint", Options(calibrated=calibrated)
    weights = write_tiny_mixtral(source, config_with(tie_word_embeddings=tied))
    total = sum(
        w.numel() for n, w in weights.items() if w.dim() == 2 and "sparse_moe.gate" not in n
    )

    def before_call(number: int, name: str) -> None:
        if number >= 90:
            raise OSError("stopped by the test")

    first: list[Progress] = []
    second: list[Progress] = []
    with monkeypatch.context() as patch:
        patch.setattr(files, "os", FaultyOs(before_call=before_call))
        with pytest.raises(FolderError, match="stopped by the test"):
            convert(source, tmp_path / "model", options, progress=first.append)
    convert(source, tmp_path / "model", options, progress=second.append)
    for reports in (first, second):
        done = [report.done for report in reports]
        assert done == sorted(set(done))
        assert {report.total for report in reports} == {total}
    assert first[-1].done < total
    assert second[-1].done == total


# Weights that cannot be coded


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("calibrated", [True, False])
@pytest.mark.parametrize(
    "tensor",
    [
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.k_proj.weight",
        "model.layers.0.self_attn.o_proj.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.1.post_attention_layernorm.weight",
        "model.layers.1.block_sparse_moe.gate.weight",
        "model.layers.1.block_sparse_moe.experts.2.w1.weight",
        "model.layers.1.block_sparse_moe.experts.2.w2.weight",
        "model.layers.1.block_sparse_moe.experts.2.w3.weight",
        "model.norm.weight",
        "lm_head.weight",
    ],
)
def test_a_tensor_that_is_not_finite_is_named_and_leaves_nothing_behind(
    undisturbed: dict[bool, dict[str, bytes]],
    tmp_path: Path,
    tensor: str,
    calibrated: bool,
    value: float,
) -> None:
    options = Options(calibrated=calibrated)
    source = tmp_path / "checkpoint"
    weights = write_tiny_mixtral(source)
    sample = Checkpoint(source).sample_hash()
    weights[tensor].view(-1)[0] = value
    save_file(weights, source / "model.safetensors")
    # The sample is from the tensors' middles, so it is the same checkpoint to whoever goes on.
    assert Checkpoint(source).sample_hash() == sample
    for _ in range(2):
        with pytest.raises(CheckpointError, match=rf"{re.escape(tensor)} holds NaN or infinity"):
            convert(source, tmp_path / "model", options)
    write_tiny_mixtral(source)
    convert(source, tmp_path / "model", options)
    assert contents(tmp_path / "model") == undisturbed[calibrated]


def test_weights_too_large_to_code_are_named(tmp_path: Path) -> None:
    source = tmp_path / "checkpoint"
    weights = write_tiny_mixtral(source)
    weights["model.layers.1.block_sparse_moe.experts.2.w2.weight"][3, 5] = 1e30
    save_file(weights, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.1\.experts\.2: weights are too large"):
        convert(source, tmp_path / "model", Options(calibrated=False))


def test_weights_that_calibration_overflows_with_are_named_and_leave_nothing_behind(
    undisturbed: dict[bool, dict[str, bytes]], tmp_path: Path
) -> None:
    source = tmp_path / "checkpoint"
    weights = write_tiny_mixtral(source)
    # Finite, as are its products; their squares are not.
    weights["model.layers.1.block_sparse_moe.experts.2.w3.weight"][0, 0] = 1e30
    save_file(weights, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.1: the calibration text's activations are"):
        convert(source, tmp_path / "model")
    write_tiny_mixtral(source)
    convert(source, tmp_path / "model")
    assert contents(tmp_path / "model") == undisturbed[True]
