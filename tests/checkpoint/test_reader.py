"""Is a checkpoint that contradicts itself refused, and every shard let go in time?"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowmoe.checkpoint import files
from lowmoe.checkpoint.reader import Checkpoint
from lowmoe.decoder.weights import CheckpointTensors
from lowmoe.errors import CheckpointError, FolderError, UnsupportedModelError
from lowmoe.families import read_config
from tests.checkpoint.faulty_os import FaultyOs
from tests.checkpoint.tiny_mixtral import (
    CountingShards,
    Options,
    config_with,
    contents,
    convert,
    write_tiny_mixtral,
)

NORM = "model.norm.weight"
INDEX = "model.safetensors.index.json"


def open_tensors(folder: Path) -> CheckpointTensors:
    checkpoint = Checkpoint(folder)
    return CheckpointTensors(checkpoint, read_config(checkpoint.config))


def by_layer(name: str) -> str:
    """A shard for each layer, one for everything else."""
    layer = name.split(".")[2] if name.startswith("model.layers.") else "rest"
    return f"model-{layer}.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint in one file, of the test's own."""
    write_tiny_mixtral(tmp_path)
    return tmp_path


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


# Files that contradict each other


def test_shards_and_a_single_file_hold_the_same(tmp_path: Path) -> None:
    wanted = write_tiny_mixtral(tmp_path / "one")
    write_tiny_mixtral(tmp_path / "many", shard_of=by_layer)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) == 3
    for name in ("one", "many"):
        tensors = open_tensors(tmp_path / name)
        assert tensors.checkpoint.names() == wanted.keys()
        for role in tensors.family.shapes:
            piece = tensors.family.piece(role)
            assert torch.equal(tensors.checkpoint.read_piece(piece), wanted[piece.name])


@pytest.mark.parametrize(
    "shard", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".", ".hidden", ""]
)
def test_an_index_that_points_elsewhere_is_refused(tmp_path: Path, shard: str) -> None:
    write_tiny_mixtral(tmp_path, shard_of=by_layer)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {NORM: shard}}))
    with pytest.raises(CheckpointError, match=rf"{INDEX}: '{shard}' is not a plain file name"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {NORM: 5}}])
def test_an_index_without_a_table_is_refused(tmp_path: Path, index: object) -> None:
    write_tiny_mixtral(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=f"{INDEX}: has no table weight_map"):
        Checkpoint(tmp_path)


def test_a_shard_that_is_missing_is_named(tmp_path: Path) -> None:
    write_tiny_mixtral(tmp_path, shard_of=by_layer)
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-1\.safetensors: missing, but .* lists it"):
        open_tensors(tmp_path)


def test_a_shard_without_what_the_index_promises_is_named(tmp_path: Path) -> None:
    write_tiny_mixtral(tmp_path, shard_of=by_layer)
    shutil.copy(tmp_path / "model-0.safetensors", tmp_path / "model-1.safetensors")
    with pytest.raises(CheckpointError, match=r"model-1\.safetensors: has no tensor model\.layers"):
        open_tensors(tmp_path).layer(1, torch.float32)


def test_a_tensor_of_another_shape_is_refused(folder: Path) -> None:
    change_weights(folder, lambda weights: weights.update({NORM: torch.ones(65)}))
    with pytest.raises(
        CheckpointError,
        match=rf"model\.safetensors: {NORM} is \[65\], but config\.json needs \[64\]",
    ):
        open_tensors(folder).read("final_norm")


def test_tensors_the_config_promises_must_be_there(folder: Path) -> None:
    names = [f"model.layers.1.block_sparse_moe.experts.{e}.w2.weight" for e in (0, 3)]

    def remove(weights: dict[str, Tensor]) -> None:
        for name in names:
            del weights[name]

    change_weights(folder, remove)
    with pytest.raises(CheckpointError, match=f"2 tensors that the model .*{names[0]} among"):
        open_tensors(folder)


def test_a_tensor_nobody_promised_is_refused_by_name(folder: Path) -> None:
    bias = "model.layers.0.self_attn.q_proj.bias"
    change_weights(folder, lambda weights: weights.update({bias: torch.zeros(64)}))
    with pytest.raises(UnsupportedModelError, match=f"1 tensors that a mixtral does not.*{bias}"):
        open_tensors(folder)


def test_the_constants_of_old_conversions_are_no_offence(folder: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change_weights(folder, lambda weights: weights.update({name: torch.zeros(8)}))
    assert open_tensors(folder).read("final_norm").shape == (64,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth"])
def test_weights_of_a_kind_we_do_not_read_are_named(folder: Path, name: str) -> None:
    os.rename(folder / "model.safetensors", folder / name)
    with pytest.raises(
        CheckpointError, match=rf"needs model\.safetensors or {INDEX}, found {name}, which cannot"
    ):
        Checkpoint(folder)


def test_a_gguf_file_in_a_checkpoints_folder_is_pointed_at(folder: Path) -> None:
    file = folder / "model.gguf"
    os.rename(folder / "model.safetensors", file)
    with pytest.raises(CheckpointError, match=f"give the file itself: {file}"):
        Checkpoint(folder)


def test_no_weights_at_all_are_said_so(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=f"needs model.safetensors or {INDEX}, found none"):
        Checkpoint(folder)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (None, "missing. A checkpoint folder needs it"),
        (b"", "not JSON"),
        (b"\xff", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[1]", "holds list, but a JSON object is needed"),
        (b" " * (64 * 2**20 + 1), "67108865 bytes, but at most 67108864 are expected"),
    ],
)
def test_a_config_that_is_none_is_refused(folder: Path, text: bytes | None, wanted: str) -> None:
    (folder / "config.json").unlink()
    if text is not None:
        (folder / "config.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=rf"config\.json: {wanted}"):
        Checkpoint(folder)


# Shards come and go


SHARDINGS: Mapping[str, Callable[[str], str]] = {
    "a shard for each layer": by_layer,
    "shards that cut layers": lambda name: f"model-{hash_of(name) % 5}.safetensors",
    "one shard": lambda name: "model-all.safetensors",
}


def hash_of(name: str) -> int:
    return sum(name.encode())


@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("calibrated", [True, False])
def test_every_shard_is_fetched_and_released_once(
    tmp_path: Path, sharding: str, tied: bool, calibrated: bool
) -> None:
    config = config_with(tie_word_embeddings=tied)
    write_tiny_mixtral(tmp_path / "from", config, shard_of=SHARDINGS[sharding])
    shards = CountingShards(tmp_path / "from")
    options = Options(calibrated=calibrated)
    convert(tmp_path / "from", tmp_path / "to", options, shards=shards)
    names = sorted(path.name for path in (tmp_path / "from").glob("*.safetensors"))
    assert sorted(shards.fetched) == names
    assert sorted(shards.released) == names


def test_a_shard_goes_before_the_next_layer_comes(tmp_path: Path) -> None:
    """What bounds the disk a download needs."""
    write_tiny_mixtral(tmp_path / "from", shard_of=by_layer)
    shards = CountingShards(tmp_path / "from")
    held = []
    convert(
        tmp_path / "from",
        tmp_path / "to",
        shards=shards,
        progress=lambda _: held.append(set(shards.fetched) - set(shards.released)),
    )
    layers = {"model-0.safetensors", "model-1.safetensors"}
    assert max(len(now & layers) for now in held) == 1


def test_tensors_nobody_reads_hold_no_shard_back(tmp_path: Path) -> None:
    """A tied head may be stored all the same, and old rotary constants in any shard."""
    config = config_with(tie_word_embeddings=True)
    weights = write_tiny_mixtral(tmp_path / "from", config, shard_of=by_layer)
    unread = {
        "lm_head.weight": weights["model.embed_tokens.weight"],
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8),
    }
    index = json.loads((tmp_path / "from" / INDEX).read_text())
    for name, tensor in unread.items():
        shard = by_layer(name)
        path = tmp_path / "from" / shard
        save_file({**load_file(path), name: tensor.clone()}, path)
        index["weight_map"][name] = shard
    (tmp_path / "from" / INDEX).write_text(json.dumps(index))
    shards = CountingShards(tmp_path / "from")
    convert(tmp_path / "from", tmp_path / "to", shards=shards)
    assert sorted(shards.released) == sorted(set(index["weight_map"].values()))


@pytest.mark.parametrize("calibrated", [True, False])
def test_going_on_never_fetches_what_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calibrated: bool
) -> None:

    def shard_of(name: str) -> str:
        return "model-embedding.safetensors" if "embed" in name else by_layer(name)

    write_tiny_mixtral(tmp_path / "from", shard_of=shard_of)
    options = Options(calibrated=calibrated)
    shards = CountingShards(tmp_path / "from")
    convert(tmp_path / "from", tmp_path / "whole", options, shards=shards)
    fetches: dict[str, set[int]] = {}
    call, finished = 0, False
    while not finished:
        call += 4
        first, second = (CountingShards(tmp_path / "from") for _ in range(2))
        folder = tmp_path / f"to-{call}"
        finished = not stopped_at(call, tmp_path / "from", folder, options, first, monkeypatch)
        convert(tmp_path / "from", folder, options, shards=second)
        assert contents(folder) == contents(tmp_path / "whole")
        # What the first run let go was done; nobody asks for it again.
        assert not set(first.released) & set(second.fetched), call
        for name in second.fetched:
            fetches.setdefault(name, set()).add(call)
        if not finished:
            assert sorted({*first.released, *second.released}) == sorted(
                path.name for path in (tmp_path / "from").glob("*.safetensors")
            )
    assert fetches["model-embedding.safetensors"] < fetches["model-0.safetensors"]
    assert fetches["model-0.safetensors"] < fetches["model-1.safetensors"]


def stopped_at(
    call: int,
    source: Path,
    folder: Path,
    options: Options,
    shards: CountingShards,
    monkeypatch: pytest.MonkeyPatch,
) -> bool:
    """Whether a conversion is stopped by a fault at this call of the operating system."""

    def before_call(number: int, name: str) -> None:
        if number >= call:
            raise OSError("stopped by the test")

    with monkeypatch.context() as patch:
        patch.setattr(files, "os", FaultyOs(before_call=before_call))
        try:
            convert(source, folder, options, shards=shards)
        except FolderError:
            return True
    return False
