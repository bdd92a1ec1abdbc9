"""What a plan counts is what a folder holds and a model takes, byte for byte."""

import pytest

from lowmoe.checkpoint.layout import Recipe, folder_layout
from lowmoe.decoder.native import NativeComputation
from lowmoe.decoder.native_states import numbered
from lowmoe.families import read_config
from lowmoe.families.aliases import ALIASES
from lowmoe.plan.sizes import model_sizes
from lowmoe.spec import GroupedQueryAttention, ModelSpec

# Every kind of attention and feed-forward, and few enough experts for a layout to take no time.
SHAPES = [
    "dbrx",
    "ernie-4.5-21b-a3b",
    "glm-4.7-flash",
    "gpt-oss-20b",
    "granite-3.1-3b-a800m",
    "llama-3.1-8b",
    "llama-4-scout",
    "minimax-text-01",
    "mixtral-8x22b",
    "olmoe-1b-7b",
    "phi-3.5-moe",
    "qwen1.5-moe-a2.7b",
    "qwen3.5-35b-a3b",
]


def spec_of(name: str) -> ModelSpec:
    return read_config(ALIASES[name].config).spec


@pytest.mark.parametrize(
    ("name", "n_planes"),
    [*((name, 2) for name in SHAPES), ("mixtral-8x22b", 1), ("glm-4.7-flash", 3)],
)
def test_disk_bytes_are_the_sum_of_a_folders_spans(name: str, n_planes: int) -> None:
    spec, recipe = spec_of(name), Recipe(expert_planes=n_planes)
    places = folder_layout(spec, recipe).places.values()
    assert model_sizes(spec, recipe, "float16").disk_bytes == sum(p.n_bytes for p in places)


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
