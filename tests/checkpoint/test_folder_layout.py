"""Does everything lie where one aligned read finds it, and nothing beside it?"""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import lowmoe.loader.convert
from lowmoe.checkpoint.folder import ModelFolder
from lowmoe.checkpoint.layout import Recipe, expert_span, folder_layout
from lowmoe.families import read_config
from lowmoe.spec import ModelSpec
from quant.layout import PlaneLayout
from tests.checkpoint.tiny_mixtral import config_with, contents, convert

SHAPES: list[dict[str, Any]] = [
    {},
    {"hidden_size": 65, "head_dim": 6, "intermediate_size": 33, "vocab_size": 19},
    {"hidden_size": 128, "intermediate_size": 1, "num_local_experts": 2, "num_hidden_layers": 3},
    {"tie_word_embeddings": True, "vocab_size": 1},
]
RECIPES = [
    Recipe(),
    Recipe(expert_planes=3, dense_planes=1),
    Recipe(expert_planes=1),
    *(Recipe(format=name) for name in ("nf4", "bf16", "fp16", "fp32")),
]


def spec_with(changes: dict[str, Any]) -> ModelSpec:
    return read_config(config_with(**changes)).spec


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_experts_are_aligned_and_files_have_no_holes(shape: dict[str, Any], recipe: Recipe) -> None:
    spec = spec_with(shape)
    layout = folder_layout(spec, recipe)
    part_bytes = recipe.expert_format(spec).part_bytes
    for file, size in layout.sizes.items():
        places = [p for p in layout.places.values() if p.file == file]
        position = len(layout.headers[file])
        assert position % 4096 == 0
        for place in places:
            assert place.offset == position
            position += place.n_bytes
            if file.startswith("experts-"):
                assert place.offset % 4096 == place.n_bytes % 4096 == 0
                assert 0 <= place.n_bytes - part_bytes[0] < 4096
        assert position == size
    assert layout.total_bytes == sum(layout.sizes.values())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_expert_has_one_span_a_part_in_the_order_it_is_read(shape: dict[str, Any]) -> None:
    spec = spec_with(shape)
    layout = folder_layout(spec, Recipe())
    n_experts = spec.layers[0].feed_forward.n_experts
    for part in ("plane0", "plane1"):
        wanted = [
            expert_span(layer_id, expert_id, part)
            for layer_id in range(len(spec.layers))
            for expert_id in range(n_experts)
        ]
        file = f"experts-{part}-00001.safetensors"
        assert [n for n, p in layout.places.items() if p.file == file] == wanted


def test_dense_matrices_take_the_bytes_their_formats_say() -> None:
    spec = spec_with(SHAPES[1])
    trellis, plain = (folder_layout(spec, Recipe(format=f)).places for f in ("trellis", "bf16"))
    # 2 x 2 key-value heads and 4 query heads of 6 over 65 channels.
    for name, n_out, n_in in (("layers.1.qkv", 48, 65), ("layers.1.attention_out", 65, 24)):
        for plane in range(3):
            assert trellis[f"{name}.plane{plane}"].n_bytes == PlaneLayout(n_out, n_in).plane_bytes
        assert trellis[f"{name}.d"].n_bytes == n_in * 2
        assert plain[name].n_bytes == n_out * n_in * 2
    for places in (trellis, plain):
        assert places["layers.1.router"].n_bytes == 4 * 65 * 4
        assert places["final_norm"].n_bytes == 65 * 4
    assert "head.d" in trellis


def test_a_tied_head_is_stored_once() -> None:
    places = folder_layout(spec_with({"tie_word_embeddings": True}), Recipe()).places
    assert "embedding.d" in places
    assert not [name for name in places if name.startswith("head")]


@pytest.mark.parametrize(
    ("max_file_bytes", "n_files"), [(8192 * 8, 1), (8192 * 8 - 1, 2), (8192 * 3, 3), (1, 8)]
)
def test_several_files_of_experts_hold_the_same(
    tiny_checkpoint: Path,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    max_file_bytes: int,
    n_files: int,
) -> None:
    small = partial(folder_layout, max_file_bytes=max_file_bytes)
    monkeypatch.setattr(lowmoe.loader.convert, "folder_layout", small)
    convert(tiny_checkpoint, tmp_path / "many")
    assert len([n for n in contents(tmp_path / "many") if n.startswith("experts-")]) == 2 * n_files
    with ModelFolder(model) as one, ModelFolder(tmp_path / "many") as many:
        assert one.manifest.spans.keys() == many.manifest.spans.keys()
        for name in one.manifest.spans:
            assert torch.equal(one.read(name), many.read(name)), name


@pytest.mark.parametrize(("expert_planes", "dense_planes"), [(0, 3), (2, 4)])
def test_a_recipe_of_planes_nobody_implemented_is_refused(
    expert_planes: int, dense_planes: int
) -> None:
    with pytest.raises(ValueError, match="planes, but 1 to 3 are implemented"):
        Recipe(expert_planes=expert_planes, dense_planes=dense_planes)


def test_a_recipe_of_an_unknown_format_is_refused() -> None:
    with pytest.raises(ValueError, match="format is 'int3', but must be one of trellis, nf4, bf16"):
        Recipe(format="int3")
