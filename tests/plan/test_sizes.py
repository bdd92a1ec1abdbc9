"""What a plan counts is what a folder holds and a model takes, byte for byte."""

from pathlib import Path

import pytest

from lowmoe.checkpoint.folder import ModelFolder
from lowmoe.checkpoint.layout import Recipe, folder_layout
from lowmoe.decoder.native import NativeComputation
from lowmoe.decoder.native_states import numbered
from lowmoe.decoder.weights import from_folder
from lowmoe.families import read_config
from lowmoe.families.aliases import ALIASES
from lowmoe.families.fewer_layers import with_layers
from lowmoe.kernels.cpu import Pool, isas
from lowmoe.loader.synthetic import write_synthetic
from lowmoe.plan.memory import scratch_bytes
from lowmoe.plan.sizes import model_sizes
from lowmoe.spec import GroupedQueryAttention, ModelSpec


def spec_of(name: str) -> ModelSpec:
    return read_config(ALIASES[name].config).spec


# Few enough that the layout of hundreds of experts takes no time, and experts in all shapes.
N_LAYERS = 4


@pytest.mark.parametrize("n_planes", [1, 2, 3])
@pytest.mark.parametrize("name", sorted(ALIASES))
def test_disk_bytes_are_the_sum_of_a_folders_spans(name: str, n_planes: int) -> None:
    spec = read_config(with_layers(ALIASES[name].config, N_LAYERS)).spec
    recipe = Recipe(expert_planes=n_planes)
    places = folder_layout(spec, recipe).places
    sizes = model_sizes(spec, recipe, "float16")
    assert sizes.disk_bytes == sum(p.n_bytes for p in places.values())
    # One expert's planes, of any layer.
    prefix = next(n for n in places if ".experts.0." in n).rpartition(".")[0]
    assert sizes.expert_bytes == sum(p.n_bytes for n, p in places.items() if n.startswith(prefix))


@pytest.mark.parametrize("name", ["gpt2", "granite-3.1-3b-a800m"])
def test_disk_bytes_are_those_of_a_folder_that_was_written(name: str, tmp_path: Path) -> None:
    """Two of the smallest: others have experts of gigabytes in a layer."""
    config, recipe = with_layers(ALIASES[name].config, 1), Recipe(expert_planes=1)
    family = read_config(config)
    write_synthetic(tmp_path, config, family, recipe, name=name, progress=lambda done, total: None)
    sizes = model_sizes(family.spec, recipe, "float16")
    with ModelFolder(tmp_path) as folder:
        spans = folder.manifest.spans.values()
        assert sum(span.place.n_bytes for span in spans) == sizes.disk_bytes
    on_disk = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    # Headers of a few hundred names, and padding to sectors between spans.
    assert sizes.disk_bytes <= on_disk <= sizes.disk_bytes + 2**20


def test_a_pass_takes_what_native_code_takes_for_it(tmp_path: Path) -> None:
    config = with_layers(ALIASES["granite-3.1-3b-a800m"].config, 1)
    family, recipe = read_config(config), Recipe(expert_planes=1, dense_planes=1)
    write_synthetic(tmp_path, config, family, recipe, name="x", progress=lambda done, total: None)
    with ModelFolder(tmp_path) as folder:
        weights = from_folder(folder, family.spec)
    for n_tokens, n_threads in ((512, 1), (128, 2)):
        taken = NativeComputation(
            family.spec, weights, recipe.code, Pool(n_threads, []), isa=isas()[0], kv="float16",
            max_tokens=n_tokens, n_context=512,
        ).working_bytes  # fmt: skip
        # Partial sums of attention and tiles are for threads and contexts, not for tokens.
        assert 0 <= taken - scratch_bytes(family.spec, n_tokens, n_threads) < 2**20


@pytest.mark.parametrize("name", ["mixtral-8x22b", "qwen3-30b-a3b", "olmoe-1b-7b"])
def test_a_token_is_multiplied_by_what_the_makers_say(name: str) -> None:
    """39B, 3.3B and 1.3B active parameters, of which a token reads one row of the embedding."""
    said = {"mixtral-8x22b": 39e9, "qwen3-30b-a3b": 3.3e9, "olmoe-1b-7b": 1.3e9}
    spec = spec_of(name)
    sizes = model_sizes(spec, Recipe(), "float16")
    counted = sizes.active_weights + spec.n_vocab * spec.n_hidden
    assert counted == pytest.approx(said[name], rel=0.03)  # they round


def test_fewer_planes_of_a_folder_are_the_folder_with_fewer() -> None:
    spec = spec_of("olmoe-1b-7b")
    fewer = model_sizes(spec, Recipe(expert_planes=3), "int8", n_planes=1)
    assert fewer == model_sizes(spec, Recipe(expert_planes=1), "int8")


@pytest.mark.parametrize("kv", ["float32", "float16", "int8"])
@pytest.mark.parametrize("name", ["minimax-text-01", "qwen3-30b-a3b", "qwen3-next-80b-a3b"])
def test_a_cached_token_takes_what_the_native_cache_takes(name: str, kv: str) -> None:
    spec = spec_of(name)
    computation = NativeComputation.__new__(NativeComputation)
    computation._spec, computation._kv = spec, kv  # type: ignore[assignment]
    computation._whole = numbered(spec, GroupedQueryAttention)
    sizes = model_sizes(spec, Recipe(), kv)  # type: ignore[arg-type]
    assert sizes.kv_bytes_per_token * 4096 + sizes.states_bytes == computation.cache_bytes(4096)


def test_layers_that_keep_states_take_what_the_docs_say() -> None:
    """docs/families.md, "Layers that keep a state"; those without keep nothing of the kind."""
    said = {"minimax-text-01": 294e6, "olmoe-1b-7b": 0, "qwen3-next-80b-a3b": 79e6}
    for name, n_bytes in said.items():
        sizes = model_sizes(spec_of(name), Recipe(), "int8")
        assert sizes.state_bytes == pytest.approx(n_bytes, rel=0.01)
